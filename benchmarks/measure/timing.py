"""Samples taken in turn, and what they say: medians, ratios of pairs, and when a machine is too noisy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import numpy as np

from lcm_compile.benchmarks.measure.worker import Sample, Worker

LEAST_ROUNDS = 3
# Warm-up: at least two pictures (some executors optimise after the first), and more while they are quick.
WARM_UP, WARM_UP_MOST, WARM_UP_SECONDS = 2, 5, 5.0
WARM_UP_SEED = 1_000_000  # none of the measured ones
# Where the middle half of the ratios spreads over more than this part of their median, the machine is
# called too noisy. Two equal programs on an idle machine stay under 3 %, on a shared one under 10 %.
NOISY = 0.15

Report = Callable[[int, int], None]


def requests(prompt: str) -> Iterator[tuple[str, int]]:
    """Prompts and seeds, none of which comes twice: nothing kept from an earlier prompt is of use."""
    i = 0
    while True:
        yield f"{prompt}, number {i}", i
        i += 1


def in_turn(names: Sequence[str], round_: int) -> Sequence[str]:
    """The order of a round: A B, then B A, so that none is always the one that follows the other."""
    return names if round_ % 2 == 0 else names[::-1]


def warm_up(worker: Worker, prompt: str) -> None:
    start = time.perf_counter()
    for i in range(WARM_UP_MOST):
        if i >= WARM_UP and time.perf_counter() - start > WARM_UP_SECONDS:
            return
        worker.draw(f"{prompt}, to warm up {i}", WARM_UP_SEED + i)


def take_turns(
    workers: Mapping[str, Worker],
    prompt: str,
    runs: int,
    seconds: float,
    report: Report = lambda done, total: None,
) -> dict[str, list[Sample]]:
    """Rounds in which each worker draws the same prompt and seed; sample i of each is of round i.

    Ends after `runs` rounds, or after `seconds` and no fewer than LEAST_ROUNDS of them.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in workers}
    start = time.perf_counter()
    for i, (words, seed) in zip(range(runs), requests(prompt), strict=False):
        if i >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in in_turn(list(workers), i):
            samples[name].append(workers[name].draw(words, seed))
        report(i + 1, runs)
    return samples


def quantile(samples: Sequence[float], part: float) -> float:
    return float(np.quantile(samples, part))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """How many times as long a rival took, pair by pair."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def relative_spread(values: Sequence[float]) -> float:
    """The width of the middle half, as a part of the median."""
    return (quantile(values, 0.75) - quantile(values, 0.25)) / median(values)


def too_noisy(ours: Sequence[float], rivals: Mapping[str, Sequence[float]]) -> str | None:
    """What spreads too far for a figure to be relied on, or None. Without rivals, our own samples."""
    told = {f"the ratios to {name}": ratios(ours, theirs) for name, theirs in rivals.items()}
    wide = {name: relative_spread(values) for name, values in (told or {"the samples": list(ours)}).items()}
    worst = max(wide, key=wide.__getitem__)
    if wide[worst] <= NOISY:
        return None
    return (
        f"this machine is too noisy to tell: the middle half of {worst} spreads over {wide[worst]:.0%} of "
        f"their median, more than {NOISY:.0%}; end other programs, or measure for longer with --seconds"
    )
