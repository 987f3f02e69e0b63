"""Recordings of the stages' calls while torch draws a picture. A bundle keeps them, to check its engines."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings, Proof
from lcm_compile.engines.runner import Array, ForwardingRunner, Runner
from lcm_compile.errors import REBUILD, BundleError
from lcm_compile.graphs import CONTROLS, DRAW, ENCODE_IMAGE, StageContract
from lcm_compile.pipeline.control_picture import sample_picture
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.load import load_tokenizers
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.whole_loop import pipeline_class

if TYPE_CHECKING:
    import torch

    from lcm_compile.stages.stage import Stage


PROOF_SEED = 0  # seed of the picture that is recorded
PROOF_STEPS = 4  # denoising steps of the picture

# One call of a stage: its inputs and its outputs, by name.
Call = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
# The calls of each stage while one picture was drawn, in the order of the stages.
Trace = dict[str, list[Call]]


@dataclass
class Recordings:
    """The recordings of the stages so far.

    `reference` has the calls of torch in fp32 for the proof's picture, and `cast` those in the precision of
    the engines for the same picture. `calibration` has the calls of torch in fp32 for each picture from which
    the scales of an 8-bit step are chosen.
    """

    reference: Trace
    cast: Trace
    calibration: Sequence[Trace] = ()

    @classmethod
    def empty(cls, calibration: int = 0) -> Recordings:
        """Returns recordings without any stage, for a number of calibration pictures."""
        return cls({}, {}, [{} for _ in range(calibration)])

    def copy(self) -> Recordings:
        """Returns a copy to which stages can be added without changing this object."""
        return Recordings(dict(self.reference), dict(self.cast), [dict(trace) for trace in self.calibration])


class TorchRunner(Runner):
    """Runs a stage's torch module on the processor."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.contract)
        self.module = stage.module

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        from lcm_compile.stages.half_precision import SummedInFp32

        with torch.inference_mode(), SummedInFp32():
            outputs = self.module(*(self.tensor(inputs[spec.name]) for spec in self.contract.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {s.name: o.cpu().numpy() for s, o in zip(self.contract.outputs, outputs, strict=True)}

    def tensor(self, array: Array) -> torch.Tensor:
        """Returns a copy of an array as a tensor on the module's device."""
        import torch

        return torch.from_numpy(np.array(array))

    def close(self) -> None:
        """Does nothing, because the module belongs to the caller."""


class Recorder(ForwardingRunner):
    """Calls another runner, and keeps the inputs and outputs of every call."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.contract)
        self._runner = runner
        self.calls: list[Call] = []

    def runner(self) -> Runner:
        """Returns the runner that is recorded."""
        return self._runner

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = super().__call__(inputs)
        kept = [
            {s.name: np.array(self.to_host(arrays[s.name])) for s in specs}
            for arrays, specs in ((inputs, self.contract.inputs), (outputs, self.contract.outputs))
        ]
        self.calls.append((kept[0], kept[1]))
        return outputs


class Replay(Runner):
    """Returns the recorded outputs of a stage, call by call, on the device of another runner."""

    def __init__(self, contract: StageContract, calls: Sequence[Call], device: Runner) -> None:
        super().__init__(contract)
        self._outputs = iter([outputs for _, outputs in calls])
        self._device = device

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {name: self._device.to_device(array) for name, array in next(self._outputs).items()}

    def close(self) -> None:
        """Does nothing, because a replay has no resources."""


@dataclass(frozen=True)
class Rehearsal:
    """Draws a picture with one stage in memory at a time, by replaying the stages before it.

    `contracts` are those of all stages for pictures of `settings.shape`. `folder` has the tokenizers' files.
    """

    contracts: Mapping[str, StageContract]
    settings: PipelineSettings
    folder: Path

    def runner_of(self, stage: Stage) -> TorchRunner:
        """Returns the runner that computes a stage while it is recorded."""
        return TorchRunner(stage)

    def record(
        self,
        runner: Runner,
        trace: Trace,
        request: Request | None = None,
        most: int = PROOF_STEPS,
        beside: Mapping[str, Runner] = {},
    ) -> list[Call]:
        """Draws until all calls of the runner's stage are recorded, and returns these calls.

        The stages before it are replayed from `trace`, but for those `beside` it, which are run: a ControlNet
        needs the step, whose latents it reads. The picture is the proof's, or that of a `request` with the
        same number of steps. At most `most` calls of the stages that are run in each step are recorded. The
        stage ENCODE_IMAGE encodes the picture that was drawn.
        """
        name, recorder = runner.contract.name, Recorder(runner)
        if name == ENCODE_IMAGE:
            drawn = picture_of(trace).astype(np.float32) / 255
            recorder({"image": runner.to_device(drawn[None])})
            return recorder.calls
        runners: dict[str, Runner] = {
            stage: Replay(contract, trace.get(stage, []), runner)
            for stage, contract in self.contracts.items()
        }
        runners |= {**beside, name: recorder}
        request = request or Request(self.settings.sample_prompt, PROOF_SEED, steps=PROOF_STEPS)
        request = with_sample(request, self.settings)
        tokenizers = load_tokenizers(self.folder, self.settings)
        pipeline = pipeline_class(runners)(self.settings, runners, tokenizers)
        pipeline.prompts.loras.proof_factors = True
        progress = pipeline.progress(request)
        while len(recorder.calls) < (most if name in ("step", *CONTROLS) else 1):
            next(progress)
        return recorder.calls


def with_sample(request: Request, settings: PipelineSettings) -> Request:
    """Returns a request in which each ControlNet and the IP-Adapter of a bundle read a picture made here.

    Its strength is 1, whatever the bundle's own is, so that each is run.
    """
    count, sample = len(settings.control_weights), sample_picture(settings.shape)
    if settings.ip_weight is not None:
        request = replace(request, ip_image=sample, ip_weight=1.0)
    return replace(request, control=(sample,) * count, control_weight=(1.0,) * count)


def picture_of(trace: Trace) -> np.ndarray:
    """Returns the first picture (h, w, 3) of a trace, in 8 bits."""
    last = trace[DRAW if DRAW in trace else "decode"]
    return eight_bits(last[-1][1]["picture"][0])


def joined_call(contract: StageContract, trace: Trace) -> Call:
    """Returns the calls of all stages for a picture as the single call of the stage `draw`."""
    steps = [inputs for inputs, _ in trace["step"]]
    noise = [steps[0]["latent"], *(step["noise"] for step in steps[:-1])]
    given = {
        **trace["encode"][0][0],
        **trace["context"][0][0],
        "noise": np.stack(noise),
        "coefficients": np.stack([step["coefficients"] for step in steps]),
    }
    return {spec.name: given[spec.name] for spec in contract.inputs}, trace["decode"][0][1]


def write_proof(trace: Trace, peaks: Mapping[str, Any], settings: PipelineSettings, folder: Path) -> Proof:
    """Writes a trace of torch to `folder/proof`, for `verify` on any machine; returns its manifest entry.

    `peaks` has for each stage the largest input and output of each layer.
    """
    proof = folder / "proof"
    proof.mkdir()
    files = []
    for stage, calls in trace.items():
        arrays: dict[str, np.ndarray] = {}
        for i, (inputs, outputs) in enumerate(calls):
            arrays |= {f"{i}.in.{name}": array for name, array in inputs.items()}
            arrays |= {f"{i}.out.{name}": array for name, array in outputs.items()}
        np.savez_compressed(proof / f"{stage}.npz", **arrays)  # type: ignore[arg-type]
        files.append(f"proof/{stage}.npz")
    np.savez_compressed(proof / "picture.npz", picture=picture_of(trace))
    (proof / "activations.json").write_text(
        json.dumps({stage: {k: list(v) for k, v in seen.items()} for stage, seen in peaks.items()})
    )
    files += ["proof/picture.npz", "proof/activations.json"]
    return Proof(settings.sample_prompt, PROOF_SEED, PROOF_STEPS, settings.shape, tuple(files))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file, never pickled objects. Raises BundleError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} can't be read: {error}", REBUILD) from error


def read_calls(path: Path, contract: StageContract) -> list[Call]:
    """Returns the calls that write_proof wrote for a stage.

    Raises BundleError if the file has no call, or one whose arrays do not fit the contract.
    """
    arrays = read_arrays(path)
    calls: list[Call] = []
    while any(key.startswith(f"{len(calls)}.") for key in arrays):
        sides: list[dict[str, np.ndarray]] = []  # the inputs, and the outputs
        for side, specs in (("in", contract.inputs), ("out", contract.outputs)):
            found = {spec.name: arrays.get(f"{len(calls)}.{side}.{spec.name}") for spec in specs}
            wrong = [s.name for s in specs if getattr(found[s.name], "shape", None) != s.shape]
            if wrong:
                raise BundleError(
                    f"{path} does not fit the {contract.name} stage's {', '.join(wrong)}", REBUILD
                )
            sides.append({name: array for name, array in found.items() if array is not None})
        calls.append((sides[0], sides[1]))
    if not calls:
        raise BundleError(f"{path} proves nothing: it holds no recorded call", REBUILD)
    return calls
