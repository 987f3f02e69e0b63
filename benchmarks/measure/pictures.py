"""Compares the pictures of samples: how many there are, and how near they are to diffusers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lcm_compile.benchmarks.measure import timing
from lcm_compile.benchmarks.measure.rivals import RIVALS, SELF
from lcm_compile.benchmarks.measure.worker import Sample
from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.proof.parity import psnr_db

REFERENCE = "eager"  # the rival whose pictures all others are compared with


def other_batches(samples: Mapping[str, Sequence[Sample]]) -> dict[str, int]:
    """Returns the batch of each program that does not draw as many pictures at a time as ours."""
    batches = {name: len(drawn[0].drawn.pictures) for name, drawn in samples.items()}
    return {name: batch for name, batch in batches.items() if batch != batches[SELF]}


def recorded_parities(bundles: Mapping[str, EngineBundle]) -> dict[str, float]:
    """Returns each bundle's PSNR to torch's picture in dB, as its build recorded it."""
    figures = {name: bundle.manifest.parity.get("picture") for name, bundle in bundles.items()}
    return {name: round(figure.db, 2) for name, figure in figures.items() if figure is not None}


def parities(samples: Mapping[str, Sequence[Sample]]) -> dict[str, float]:
    """Returns each program's worst PSNR in dB to diffusers' picture, over the first LEAST_ROUNDS rounds.

    Every run has these rounds. Programs with another batch are left out, because they draw other pictures
    from the same seed. Rivals without the few-step LoRA are left out too. Returns nothing if REFERENCE was
    not measured.
    """
    if REFERENCE not in samples:
        return {}
    compared = range(min(timing.LEAST_ROUNDS, len(samples[REFERENCE])))
    reference = [samples[REFERENCE][i].drawn.pictures for i in compared]
    others = other_batches(samples)
    return {
        name: round(min(psnr_db(reference[i], drawn[i].drawn.pictures, 255.0) for i in compared), 2)
        for name, drawn in samples.items()
        if name not in (REFERENCE, *others) and (name not in RIVALS or RIVALS[name].few_step)
    }
