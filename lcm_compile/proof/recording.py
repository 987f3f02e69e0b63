"""Recordings of the stages while a picture is drawn: made with torch, kept in a bundle, played to engines."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings, Proof
from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import REBUILD, BundleError
from lcm_compile.graphs import StageContract
from lcm_compile.pipeline.load import load_tokenizers
from lcm_compile.pipeline.pipeline import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.whole_loop import open_pipeline

if TYPE_CHECKING:
    from lcm_compile.stages.stage import Stage


PROOF_SEED = 0


PROOF_STEPS = 4


Call = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


# Each stage's calls while one picture was drawn, in the order of the stages.
Trace = dict[str, list[Call]]


class TorchRunner(Runner):
    """A stage's torch module as a runner, which it keeps on `device` until it is closed."""

    def __init__(self, stage: Stage, device: str = "cpu") -> None:
        super().__init__(stage.contract)
        self.module = stage.module
        self._device = device
        if device != "cpu":
            self._move(device)

    def _move(self, device: str) -> None:
        import torch

        from lcm_compile.stages.stage import move

        torch.backends.cudnn.allow_tf32 = False  # as for convolutions it is by default; fp32 is the reference
        move(self.module, device)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        given = [torch.from_numpy(np.array(inputs[s.name])).to(self._device) for s in self.contract.inputs]
        with torch.inference_mode():
            outputs = self.module(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {s.name: o.cpu().numpy() for s, o in zip(self.contract.outputs, outputs, strict=True)}

    def close(self) -> None:
        """The module is the caller's, who gets it back on the processor."""
        if self._device != "cpu":
            self._move("cpu")


class Recorder(Runner):
    """Another runner, whose calls it keeps."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.contract)
        self.runner = runner
        self.calls: list[Call] = []

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = self.runner(inputs)
        kept = [
            {s.name: np.array(self.to_host(arrays[s.name])) for s in specs}
            for arrays, specs in ((inputs, self.contract.inputs), (outputs, self.contract.outputs))
        ]
        self.calls.append((kept[0], kept[1]))
        return outputs

    def to_device(self, array: np.ndarray) -> Array:
        return self.runner.to_device(array)

    def to_host(self, array: Array) -> np.ndarray:
        return self.runner.to_host(array)

    def close(self) -> None:
        self.runner.close()


class Replay(Runner):
    """A stage that gives what it gave before."""

    def __init__(self, contract: StageContract, calls: Sequence[Call], like: Runner) -> None:
        super().__init__(contract)
        self._outputs = iter([outputs for _, outputs in calls])
        self._like = like

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {name: self._like.to_device(array) for name, array in next(self._outputs).items()}

    def close(self) -> None:
        """It holds nothing."""


def record_calls(
    runner: Runner,
    contracts: Mapping[str, StageContract],
    settings: PipelineSettings,
    folder: Path,
    trace: Trace,
    calls: int = PROOF_STEPS,
    request: Request | None = None,
) -> list[Call]:
    """The first calls of a stage while a picture is drawn, the stages before replayed from its trace.

    The picture is the proof's unless another one of as many steps is asked for.

    So a picture can be drawn with one stage in memory at a time.
    """
    name, recorder = runner.contract.name, Recorder(runner)
    runners = {stage: Replay(contract, trace.get(stage, []), runner) for stage, contract in contracts.items()}
    request = request or Request(settings.sample_prompt, PROOF_SEED, steps=PROOF_STEPS)
    pipeline = open_pipeline(settings, {**runners, name: recorder}, load_tokenizers(folder, settings))
    progress = pipeline.progress(request)
    while len(recorder.calls) < (calls if name == "step" else 1):
        next(progress)
    return recorder.calls


def picture_of(trace: Trace) -> np.ndarray:
    """The first picture (h, w, 3) of a trace, of 8 bits."""
    *_, last = trace.values()
    return eight_bits(last[-1][1]["picture"][0])


def joined_call(contract: StageContract, trace: Trace) -> Call:
    """The stages' calls in a picture as the one call of a graph of them all."""
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
    """Keeps torch's trace in `folder/proof`, for `verify` to replay on any machine; returns its index."""
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
    """The arrays of an .npz; BundleError where it is none. Pickled objects are never loaded."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} can't be read: {error}", REBUILD) from error


def read_calls(path: Path, contract: StageContract) -> list[Call]:
    """The calls that write_proof kept. BundleError unless the file holds some, all as in the contract."""
    arrays = read_arrays(path)
    calls: list[Call] = []
    while any(key.startswith(f"{len(calls)}.") for key in arrays):
        sides: list[dict[str, np.ndarray]] = []
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
