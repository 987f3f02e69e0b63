"""What ControlNets and T2I-Adapters add to the UNet's steps, and how strongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import UsageError
from lcm_compile.graphs import CONTROLS, GUIDES, T2I_ADAPTERS
from lcm_compile.pipeline.control_picture import for_each
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.source_picture import SourcePicture
from lcm_compile.samplers.step import Step
from lcm_compile.spec import Shape

Arrays = Mapping[str, Array]


def check_control(
    pictures: Sequence[SourcePicture], stages: Sequence[str], builds: str = "", give: str = ""
) -> None:
    """Raises UsageError unless there is a control picture for each stage that reads one.

    `stages` are the names of these. `builds` is the command that builds a bundle with one, and `give` how the
    pictures are given, if it is not by `lcm-compile run`.
    """
    if len(pictures) == len(stages):
        return
    if not stages:
        raise UsageError(
            "a control picture is given, and this bundle has no ControlNet and no T2I-Adapter",
            builds or "lcm-compile build --controlnet DIR, or --t2i-adapter DIR, builds one that has",
        )
    one = len(stages) == 1
    count = len(pictures)
    given = f"{count} are" if count > 1 else "only one is" if count else "no control picture is"
    raise UsageError(
        f"this bundle has {counted(stages)}, which {'reads' if one else 'read'} a control picture"
        f"{'' if one else ' each'}, and {given} given",
        give
        or f"give {' '.join(['--control PICTURE'] * len(stages))}; "
        "--control-weight 0 draws without its effect",
    )


def counted(stages: Sequence[str]) -> str:
    """Returns in words how many ControlNets and T2I-Adapters there are among stages."""
    kinds = Counter("ControlNet" if name in CONTROLS else "T2I-Adapter" for name in stages)
    return " and ".join(f"a {kind}" if n == 1 else f"{n} {kind}s" for kind, n in kinds.items())


@dataclass(frozen=True)
class Control:
    """What guides a drawing by pictures, on the device.

    `pictures` has the picture (b, 3, h, w) of each ControlNet's stage. `strengths` has for each of these and
    each T2I-Adapter the strength (1,) in each step, or None in a step in which it is 0, and adds nothing.
    `timesteps` has the timestep (1,) of each step. `features` are what the T2I-Adapters give, which are run
    once: the sums of the features of those that are on in some step, by their names. `nothing` are the
    residuals and features of a step without any.
    """

    pictures: Arrays
    strengths: Mapping[str, Sequence[Array | None]]
    timesteps: Sequence[Array]
    features: Mapping[tuple[str, ...], Arrays]
    nothing: Arrays

    def added(self, runners: Mapping[str, Runner], i: int, inputs: Arrays) -> Arrays:
        """Returns what is added to the UNet in step i: the sums of residuals and of features, by name.

        `inputs` are the step's own. What one ControlNet gives may be the memory of its engine.
        """
        on = [name for name, own in self.strengths.items() if own[i] is not None]
        residuals: dict[str, Array] = {}
        for name in on:
            if name in self.pictures:
                own = {"control": self.pictures[name], "strength": self.strengths[name][i]}
                given = runners[name]({**inputs, **own, "timestep": self.timesteps[i]})
                residuals = total(residuals, given)
        features = self.features.get(tuple(name for name in on if name not in self.pictures), {})
        return {**self.nothing, **residuals, **features}

    def copy(self, other: Control) -> None:
        """Overwrites these arrays with those of another that runs the same stages, on a GPU."""
        for name, picture in self.pictures.items():
            picture.copy_(other.pictures[name])
            for own, given in zip(self.strengths[name], other.strengths[name], strict=True):
                if own is not None:
                    own.copy_(given)
        for names, features in self.features.items():
            for name, feature in features.items():
                feature.copy_(other.features[names][name])


def total(sums: Arrays, more: Arrays) -> dict[str, Array]:
    """Returns sums of arrays by name, of which there may be none yet, with more arrays added."""
    return {name: sums[name] + array if sums else array for name, array in more.items()}


def control_stages(names: Iterable[str]) -> list[str]:
    """Returns the names of a bundle's ControlNets among its stages."""
    found = {*names}
    return [name for name in CONTROLS if name in found]


def guide_stages(names: Iterable[str]) -> list[str]:
    """Returns the names of a bundle's ControlNets, and then of its T2I-Adapters, among its stages."""
    found = {*names}
    return [name for name in GUIDES if name in found]


def strengths_of(request: Request, settings: PipelineSettings) -> tuple[tuple[float, ...], ...]:
    """Returns the strength of each ControlNet and T2I-Adapter in each step: 0 outside of its span.

    The rule is diffusers' `controlnet_keep`: a step counts if it lies in the span as a whole. With a start of
    0 it is that of `adapter_conditioning_factor`. The span is one of the steps that are drawn, from an image
    too.
    """
    count, steps = len(settings.control_weights), request.steps - request.first_step
    each = zip(
        for_each(request.control_weight or settings.control_weights, count, 1.0),
        for_each(request.control_start, count, 0.0),
        for_each(request.control_end, count, 1.0),
        strict=True,
    )
    return tuple(
        tuple(0.0 if i / steps < start or (i + 1) / steps > end else weight for i in range(steps))
        for weight, start, end in each
    )


def put_control(
    runners: Mapping[str, Runner], request: Request, settings: PipelineSettings, steps: Sequence[Step]
) -> Control | None:
    """Returns what guides a drawing by pictures, on the device, or None if a bundle has no stage for that.

    The T2I-Adapters are run, unless their strength is 0 in every step.
    """
    if not (names := guide_stages(runners)):
        return None
    step = runners["step"]

    def put(number: float) -> Array:
        return step.to_device(np.asarray([number], np.float32))

    pictures = dict(zip(names, request.control, strict=True))
    each = zip(names, strengths_of(request, settings), strict=True)
    strengths = {name: [put(one) if one else None for one in own] for name, own in each}
    adapters = [name for name in names if name in T2I_ADAPTERS]
    given: dict[str, Arrays] = {}
    for name in adapters:
        # The strength is the same in every step in which it is not 0.
        if (strength := next((one for one in strengths[name] if one is not None), None)) is not None:
            runner = runners[name]
            outputs = runner({"control": put_picture(runner, pictures[name]), "strength": strength})
            # Copies, which CUDA graphs may overwrite; an engine's own arrays they may not.
            given[name] = {key: array + 0 for key, array in outputs.items()}
    features: dict[tuple[str, ...], Arrays] = {}
    for i in range(len(steps)):
        on = tuple(name for name in adapters if strengths[name][i] is not None)
        if on and on not in features:
            sums: Arrays = {}
            for name in on:
                sums = total(sums, given[name])
            features[on] = sums
    empty = [spec for spec in step.contract.inputs if spec.name.startswith(("residual_", "feature_"))]
    return Control(
        {name: put_picture(runners[name], pictures[name]) for name in control_stages(names)},
        strengths,
        [put(one.timestep) for one in steps],
        features,
        {spec.name: step.to_device(np.zeros(spec.shape, np.float32)) for spec in empty},
    )


def put_picture(runner: Runner, picture: SourcePicture) -> Array:
    """Returns a control picture as a stage takes it, on the device: of so many pictures and channels.

    Where one channel is read, it is the mean of the three.
    """
    batch, channels, height, width = next(s.shape for s in runner.contract.inputs if s.name == "control")
    planes = picture.planes(Shape(batch, height, width))
    return runner.to_device(planes.mean(1, keepdims=True) if channels == 1 else planes)
