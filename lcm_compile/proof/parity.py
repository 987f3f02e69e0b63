"""Proof that engines compute what torch computes: recorded at build time, replayed by `verify`.

A real 4-step picture is drawn with the fp32 torch modules; each stage's inputs and outputs are kept.
An engine is given the same inputs, and its error is told as signal-to-noise, 10·log10(Σr²/Σ(r−e)²) dB,
the worst output of the worst call. The whole picture, of 8 bits, is compared as PSNR.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lcm_compile.bundles.manifest import Parity
from lcm_compile.engines.runner import Runner
from lcm_compile.errors import ParityError
from lcm_compile.graphs import DRAW, StageContract
from lcm_compile.pipeline.pipeline import eight_bits
from lcm_compile.precisions import Precision
from lcm_compile.proof.recording import Call, Trace, picture_of

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


def stage_floor(contract: StageContract, precision: Precision) -> float:
    if contract.name == DRAW:
        return picture_floor([precision])
    eight_bits = any(spec.dtype == "uint8" for spec in contract.outputs)
    return min(STAGE_FLOORS[precision.product], EIGHT_BIT_FLOOR if eight_bits else math.inf)


def picture_floor(precisions: Iterable[Precision]) -> float:
    return min(PICTURE_FLOORS[precision.product] for precision in precisions)
