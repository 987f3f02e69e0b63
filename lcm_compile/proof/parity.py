"""Measures whether engines compute what torch computes: the proof of a bundle.

The build draws a real 4-step picture with the fp32 torch modules, and records the inputs and outputs of each
stage. An engine is called with the same inputs. Its parity is the signal-to-noise ratio,
10·log10(Σr²/Σ(r−e)²) dB for the reference r and the engine's output e, of the worst output of the worst call.
The complete 8-bit picture is compared by PSNR. `verify` repeats the comparison on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lcm_compile.bundles.manifest import Parity, StageFile
from lcm_compile.engines.runner import Runner
from lcm_compile.errors import ParityError
from lcm_compile.graphs import DRAW, StageContract
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.precisions import Precision
from lcm_compile.proof.recording import Call, Trace, picture_of
from lcm_compile.samplers.step import COEFFICIENTS

# The signal-to-noise ratio that an engine of each precision must reach, in dB. Measured on the SDXL and SD1.5
# architectures with random weights, fp32 engines reach 117 to 140, fp16 54 to 74, and bf16 34.7 to 50. The
# mantissa of bf16 has 8 bits, which is 18 dB coarser than fp16's 11 bits, so its floor is lower by about as
# much. A step in 8 bits is lossy: its floor only separates it from a broken step, and the picture decides.
# The demo's step reaches 28.7 in int8. In fp8, where only the Linear layers have 8 bits, it reaches 41.7, and
# its picture 45.6.
STAGE_FLOORS = {"fp32": 80.0, "fp16": 45.0, "bf16": 30.0, "int8": 15.0, "fp8": 15.0}
# How accurate half precision is depends on the model too. In bf16 diffusers itself reaches 36 dB on SD1.5's
# architecture, and 28.6 on SDXL's at timestep 999, whose UNet has 70 transformer blocks in a row. So a stage
# for which torch itself, in that precision, comes near the floor may be so many dB worse than torch, but
# never below the lowest floor.
TORCH_MARGIN = 3.0
LOWEST_FLOORS = {"fp16": 35.0, "bf16": 20.0}
# The PSNR that the complete picture must reach, in dB. Each of the four steps passes its error on.
PICTURE_FLOORS = {"fp32": 65.0, "fp16": 35.0, "bf16": 25.0, "int8": 25.0, "fp8": 25.0}
# What an 8-bit output must reach, in dB: this is its figure if one value in 60 is rounded the other way.
EIGHT_BIT_FLOOR = 60.0
# A picture is flat, and so broken, if the standard deviation of its pixels (0 to 255) is below this.
FLAT = 2.5


def snr_db(reference: np.ndarray, actual: np.ndarray) -> float:
    """Returns 10·log10(Σ r² / Σ (r − a)²) dB; 200 if both are equal, −200 if `actual` is not finite."""
    reference, actual = reference.astype(np.float64), actual.astype(np.float64)
    if not np.isfinite(actual).all():
        return -200.0
    noise, signal = float(((reference - actual) ** 2).sum()), float((reference**2).sum())
    if noise == 0.0:
        return 200.0
    return 10 * math.log10(signal / noise) if signal > 0 else -200.0


def psnr_db(reference: np.ndarray, actual: np.ndarray, peak: float = 255.0) -> float:
    """Returns 10·log10(peak² / mean (r − a)²) dB; 200 if both are equal, −200 if `actual` is not finite."""
    reference, actual = reference.astype(np.float64), actual.astype(np.float64)
    if not np.isfinite(actual).all():
        return -200.0
    mse = float(((reference - actual) ** 2).mean())
    return 200.0 if mse == 0.0 else 10 * math.log10(peak**2 / mse)


def require_picture(trace: Trace) -> None:
    """Raises ParityError if torch itself draws a flat picture in fp32."""
    picture = picture_of(trace)
    if float(picture.std()) < FLAT:
        raise ParityError(
            f"the model draws a flat picture (standard deviation {picture.std():.1f} of 255) in fp32 torch",
            "check the base, the LoRAs and their weights",
        )


def require_same(before: Call, after: Call) -> None:
    """Raises ParityError if a rewritten stage differs in fp32 from the model before the rewrite.

    It also raises ParityError if the model returned NaN before the rewrite.
    """
    for name, reference in before[1].items():
        if not np.isfinite(reference).all():
            raise ParityError("the model draws NaN in fp32 torch", "check the base and the LoRAs")
        actual = after[1][name]
        if actual.dtype == np.uint8:
            reference = eight_bits(reference)
        db = snr_db(reference, actual)
        if db < (floor := EIGHT_BIT_FLOOR if actual.dtype == np.uint8 else STAGE_FLOORS["fp32"]):
            raise ParityError(
                f"rewritten for LCM, the model's {name} is {db:.1f} dB from what it was, and needs {floor:g}",
                "please report it; --without omits a rewrite",
            )


def compare_calls(runner: Runner, calls: Sequence[Call]) -> float:
    """Returns the worst signal-to-noise ratio of recorded calls, in dB; for the stage `draw` the PSNR."""
    worst = 200.0
    for inputs, expected in calls:
        actual = runner({name: runner.to_device(array) for name, array in inputs.items()})
        for name in expected:
            db = output_db(runner.contract, (inputs, expected), name, runner.to_host(actual[name]))
            worst = min(worst, db)
    return worst


def output_db(contract: StageContract, call: Call, name: str, output: np.ndarray) -> float:
    """Returns the signal-to-noise ratio of a stage's output in dB; for the stage `draw` the PSNR.

    `call` is the recorded one. The step's x0 is the latent's and the prediction's together, and has the
    prediction's error times a factor, which is large where there is much noise. So its error is held to that
    part of it which the prediction makes. The error of a `std` is held to the latent that it is a part of,
    because that of a trained VAE is close to 0, and its rounding of no effect.
    """
    inputs, expected = call
    reference = expected[name]
    if contract.name == DRAW:
        return psnr_db(reference, output, 255.0 if output.dtype == np.uint8 else 1.0)
    if name == "x0":
        factor = inputs["coefficients"][COEFFICIENTS.index("x0_output")]
        predicted = factor * expected["prediction"]
        return snr_db(predicted, predicted + (output - reference))
    if name == "std":
        mean = expected["mean"]
        return snr_db(np.stack([mean, reference]), np.stack([mean, output]))
    return snr_db(reference, output)


def require(figures: Mapping[str, Parity]) -> None:
    """Raises ParityError if a figure is below its floor. The message names all such figures."""
    missed = {name: p for name, p in figures.items() if not p.passed}
    if missed:
        misses = "; ".join(
            f"{name} {p.db:.1f} dB, needs {p.floor:g} ({p.checked})" for name, p in missed.items()
        )
        raise ParityError(f"the engines do not compute what torch does: {misses}", "try --precision fp32")


def stage_floor(stage: StageFile) -> float:
    """Returns the dB that an engine of this stage must reach."""
    if stage.contract.name == DRAW:
        return picture_floor([stage.precision])
    product = stage.precision.product
    eight_bits = any(spec.dtype == "uint8" for spec in stage.contract.outputs)
    floor = min(STAGE_FLOORS[product], EIGHT_BIT_FLOOR if eight_bits else math.inf)
    if stage.torch_db is None:
        return floor
    return min(floor, round(max(stage.torch_db - TORCH_MARGIN, LOWEST_FLOORS[product]), 1))


def picture_floor(precisions: Iterable[Precision]) -> float:
    """Returns the PSNR in dB that a picture must reach, for engines of these precisions."""
    return min(PICTURE_FLOORS[precision.product] for precision in precisions)
