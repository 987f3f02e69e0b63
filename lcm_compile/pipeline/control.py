"""What ControlNets add to the UNet's steps, and how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import UsageError
from lcm_compile.graphs import CONTROLS
from lcm_compile.pipeline.control_picture import for_each
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.source_picture import SourcePicture
from lcm_compile.samplers.step import Step


def check_control(pictures: Sequence[SourcePicture], stages: int, builds: str = "") -> None:
    """Raises UsageError unless there are as many control pictures as a bundle has ControlNets.

    `stages` counts these. `builds` is the command that builds such a bundle.
    """
    if len(pictures) == stages:
        return
    if not stages:
        raise UsageError(
            "a control picture is given, and this bundle has no ControlNet",
            builds or "lcm-compile build --controlnet DIR builds one that has",
        )
    nets = "a ControlNet, which reads" if stages == 1 else f"{stages} ControlNets, which read"
    count = len(pictures)
    given = f"{count} are" if count > 1 else "only one is" if count else "no control picture is"
    raise UsageError(
        f"this bundle has {nets} a control picture{' each' if stages > 1 else ''}, and {given} given",
        "give " + " ".join(["--control PICTURE"] * stages) + "; --control-weight 0 draws without its effect",
    )


@dataclass(frozen=True)
class Control:
    """What the ControlNets of a drawing read besides text and latent, on the device.

    `pictures` has the picture (b, 3, h, w) of each stage, and `strengths` its strength (1,) in each step, or
    None in a step in which it is 0, and the stage is not run. `timesteps` has the timestep (1,) of each step.
    `nothing` are the residuals of a step without any.
    """

    pictures: Mapping[str, Array]
    strengths: Mapping[str, Sequence[Array | None]]
    timesteps: Sequence[Array]
    nothing: Mapping[str, Array]

    def residuals(
        self, runners: Mapping[str, Runner], i: int, inputs: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """Returns what the ControlNets add to the UNet in step i: the sums of their residuals, by name.

        `inputs` are the step's own. What one ControlNet gives may be the memory of its engine.
        """
        total: dict[str, Array] = {}
        for name, picture in self.pictures.items():
            if (strength := self.strengths[name][i]) is not None:
                own = {"timestep": self.timesteps[i], "control": picture, "strength": strength}
                given = runners[name]({**inputs, **own})
                total = {key: total[key] + array for key, array in given.items()} if total else given
        return total or self.nothing

    def copy(self, other: Control) -> None:
        """Overwrites these arrays with those of another that runs the same stages, on a GPU."""
        for name, picture in self.pictures.items():
            picture.copy_(other.pictures[name])
            for own, given in zip(self.strengths[name], other.strengths[name], strict=True):
                if own is not None:
                    own.copy_(given)


def control_stages(runners: Mapping[str, Any]) -> list[str]:
    """Returns the names of a bundle's ControlNets among its stages."""
    return [name for name in CONTROLS if name in runners]


def strengths_of(request: Request, settings: PipelineSettings) -> tuple[tuple[float, ...], ...]:
    """Returns the strength of each ControlNet in each step: its weight, and 0 outside of its span.

    The rule is diffusers' `controlnet_keep`: a step counts if it lies in the span as a whole. The span is one
    of the steps that are drawn, from an image too.
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
    """Returns what a bundle's ControlNets read for a request, on the device, or None if it has none."""
    if not (names := control_stages(runners)):
        return None
    first = runners[names[0]]

    def put(number: float) -> Array:
        return first.to_device(np.asarray([number], np.float32))

    pictures = [first.to_device(picture.planes(settings.shape)) for picture in request.control]
    strengths = [[put(one) if one else None for one in own] for own in strengths_of(request, settings)]
    return Control(
        dict(zip(names, pictures, strict=True)),
        dict(zip(names, strengths, strict=True)),
        [put(step.timestep) for step in steps],
        {s.name: first.to_device(np.zeros(s.shape, np.float32)) for s in first.contract.outputs},
    )
