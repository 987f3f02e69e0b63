"""Proof that engines compute what torch computes: recorded at build time, replayed by `verify`.

A real 4-step picture is drawn with the fp32 torch modules; each stage's inputs and outputs are kept.
An engine is given the same inputs, and its error is told as signal-to-noise, 10·log10(Σr²/Σ(r−e)²) dB,
the worst output of the worst call. The whole picture, of 8 bits, is compared as PSNR.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.bundles.manifest import Parity, PipelineSettings, Proof
from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import REBUILD, BundleError, ParityError
from lcm_compile.graphs import DRAW, StageContract
from lcm_compile.pipeline.load import load, load_tokenizers
from lcm_compile.pipeline.pipeline import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.whole_loop import open_pipeline
from lcm_compile.precisions import product_type

if TYPE_CHECKING:
    from lcm_compile.stages.stage import Stage

# Signal-to-noise that an engine of each precision must reach, in dB. Measured on random SDXL and SD1.5
# architectures: fp32 engines give 117 to 140, fp16 54 to 74, bf16 34.7 to 50: with 8 bits of mantissa it is
# 18 dB coarser than fp16 with 11, so its floor is about as much lower. A step in 8 bits is lossy: the floor
# only tells it from a broken one, and the picture decides. The demo's gives 28.7 in int8; in fp8, where only
# Linear layers are, 41.7, and a picture of 45.6.
STAGE_FLOORS = {"fp32": 80.0, "fp16": 45.0, "bf16": 30.0, "int8": 15.0, "fp8": 15.0}
# The whole picture, where four steps feed each error to the next.
PICTURE_FLOORS = {"fp32": 65.0, "fp16": 35.0, "bf16": 25.0, "int8": 25.0, "fp8": 25.0}
# What an output of 8 bits must reach: there, one value of 60 that is rounded the other way is 60 dB.
EIGHT_BIT_FLOOR = 60.0
# A standard deviation of all pixels under this, of 255, is no picture.
FLAT = 2.5
PROOF_SEED = 0
PROOF_STEPS = 4


Call = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
# Each stage's calls while one picture was drawn, in the order of the stages.
Trace = dict[str, list[Call]]


def snr_db(reference: np.ndarray, actual: np.ndarray) -> float:
    """10·log10(Σ r² / Σ (r − a)²); 200 where they are equal, −200 where `actual` is not finite."""
    reference, actual = reference.astype(np.float64), actual.astype(np.float64)
    if not np.isfinite(actual).all():
        return -200.0
    noise, signal = float(((reference - actual) ** 2).sum()), float((reference**2).sum())
    if noise == 0.0:
        return 200.0
    return 10 * math.log10(signal / noise) if signal > 0 else -200.0


def psnr_db(reference: np.ndarray, actual: np.ndarray, peak: float = 255.0) -> float:
    """10·log10(peak² / mean (r − a)²), with the same ends as snr_db."""
    reference, actual = reference.astype(np.float64), actual.astype(np.float64)
    if not np.isfinite(actual).all():
        return -200.0
    mse = float(((reference - actual) ** 2).mean())
    return 200.0 if mse == 0.0 else 10 * math.log10(peak**2 / mse)


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


def relay(
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


def require_picture(trace: Trace) -> None:
    """ParityError where torch itself, in fp32, draws nothing."""
    picture = picture_of(trace)
    if float(picture.std()) < FLAT:
        raise ParityError(
            f"the model draws a flat picture (standard deviation {picture.std():.1f} of 255) in fp32 torch",
            "check the base, the LoRAs and their weights",
        )


def require_same(unshaped: Call, shaped: Call) -> None:
    """ParityError where a rewritten stage does not give in fp32 what the model gave, or that is NaN."""
    for name, reference in unshaped[1].items():
        if not np.isfinite(reference).all():
            raise ParityError("the model draws NaN in fp32 torch", "check the base and the LoRAs")
        actual = shaped[1][name]
        if actual.dtype == np.uint8:
            reference = eight_bits(reference)
        db = snr_db(reference, actual)
        if db < (floor := EIGHT_BIT_FLOOR if actual.dtype == np.uint8 else STAGE_FLOORS["fp32"]):
            raise ParityError(
                f"shaped for LCM, the model's {name} is {db:.1f} dB from what it was, not {floor:g}",
                "please report it; --without leaves a rewrite out",
            )


def compare_calls(runner: Runner, calls: Sequence[Call]) -> float:
    """The worst signal-to-noise of a runner over recorded calls, in dB; of whole pictures the PSNR."""
    worst = 200.0
    for inputs, expected in calls:
        actual = runner({name: runner.to_device(array) for name, array in inputs.items()})
        for name, reference in expected.items():
            found = runner.to_host(actual[name])
            if runner.contract.name == DRAW:
                db = psnr_db(reference, found, 255.0 if found.dtype == np.uint8 else 1.0)
            else:
                db = snr_db(reference, found)
            worst = min(worst, db)
    return worst


def require(figures: Mapping[str, Parity]) -> None:
    """ParityError naming every figure that missed its floor."""
    missed = {name: p for name, p in figures.items() if not p.passed}
    if missed:
        told = "; ".join(
            f"{name} {p.db:.1f} dB, needs {p.floor:g} ({p.checked})" for name, p in missed.items()
        )
        raise ParityError(f"the engines do not compute what torch does: {told}", "try --precision fp32")


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


def verify(bundle: EngineBundle) -> dict[str, Parity]:
    """Replays a bundle's proof on its engines here: a figure for each stage and for the whole picture.

    Where the proof is a twin's, for one smaller picture, only the stages that do not depend on its size or
    number can be replayed; the whole picture is drawn nevertheless, and must be one. ParityError where it
    is not.
    """
    manifest = bundle.manifest
    precisions = {stage.contract.name: stage.precision for stage in manifest.stages}
    proof = manifest.proof
    whole = proof.shape == manifest.pipeline.shape
    as_many = proof.shape.batch == manifest.pipeline.shape.batch
    figures = {}
    with load(bundle) as pipeline:
        for name, runner in pipeline.runners.items():
            if whole or (name == "encode" and as_many):
                db = compare_calls(runner, read_calls(bundle.path(f"proof/{name}.npz"), runner.contract))
                figures[name] = Parity(db, stage_floor(runner.contract, precisions[name]), "engine")
        picture = pipeline.draw(Request(proof.prompt, proof.seed, steps=proof.steps)).pictures[0]
        if float(picture.std()) < FLAT:
            raise ParityError(
                f"the engines draw a flat picture (standard deviation {picture.std():.1f} of 255)", REBUILD
            )
        if whole:
            reference = read_arrays(bundle.path("proof/picture.npz")).get("picture")
            if reference is None or reference.shape != picture.shape:
                raise BundleError(f"{bundle.folder}/proof/picture.npz is no picture of this bundle", REBUILD)
            db = psnr_db(reference, picture)
            figures["picture"] = Parity(db, picture_floor(precisions.values()), "engine")
    return figures


def stage_floor(contract: StageContract, precision: str) -> float:
    if contract.name == DRAW:
        return picture_floor([precision])
    eight_bits = any(spec.dtype == "uint8" for spec in contract.outputs)
    return min(STAGE_FLOORS[product_type(precision)], EIGHT_BIT_FLOOR if eight_bits else math.inf)


def picture_floor(precisions: Any) -> float:
    return min(PICTURE_FLOORS[product_type(p)] for p in precisions)
