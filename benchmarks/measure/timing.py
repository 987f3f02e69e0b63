"""Takes samples in turn and evaluates them: quantiles, ratios of pairs, and noise of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import numpy as np

from lcm_compile.benchmarks.measure.worker import Sample, Worker

LEAST_ROUNDS = 3  # this many rounds are taken even if they exceed the time limit
# A warm-up draws at least two pictures, because some executors optimise after the first, and more while they
# are quick.
WARM_UP = 2  # pictures, at least
WARM_UP_MOST = 5  # pictures, at most
WARM_UP_SECONDS = 5.0  # after this time, no picture beyond the first WARM_UP is started
WARM_UP_SEED = 1_000_000  # the first seed of a warm-up; the measured pictures never use it
# The machine is called too noisy if the interquartile range of the ratios exceeds this fraction of their
# median. Two equal programs on an idle machine stay under 3 %, on a shared one under 10 %.
NOISY = 0.15

# Receives the current activity, how many of its steps are done, and how many there are.
ProgressReport = Callable[[str, int, int], None]


def silent(activity: str, done: int, total: int) -> None:
    """Ignores the progress: a ProgressReport that shows nothing."""


def requests(prompt: str) -> Iterator[tuple[str, int]]:
    """Yields prompts and seeds without end. None repeats, so that caching an earlier prompt gains nothing."""
    i = 0
    while True:
        yield f"{prompt}, number {i}", i
        i += 1


def in_turn(names: Sequence[str], round_: int) -> Sequence[str]:
    """Returns the order of a round: A B, then B A, so that no program always runs after the other."""
    return names if round_ % 2 == 0 else names[::-1]


def warm_up(worker: Worker, prompt: str) -> None:
    """Draws WARM_UP to WARM_UP_MOST pictures, which are not measured."""
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
    report: ProgressReport = silent,
) -> dict[str, list[Sample]]:
    """Takes rounds in which each worker draws the same prompt and seed, and returns the samples by worker.

    Sample i of every worker is from round i. Ends after `runs` rounds, or once `seconds` have passed and
    LEAST_ROUNDS rounds are done.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in workers}
    start = time.perf_counter()
    for i, (words, seed) in zip(range(runs), requests(prompt), strict=False):
        if i >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in in_turn(list(workers), i):
            samples[name].append(workers[name].draw(words, seed))
        report("draw in turn", i + 1, runs)
    return samples


def quantile(samples: Sequence[float], fraction: float) -> float:
    """Returns the quantile below which this fraction of the samples lies, interpolated linearly."""
    return float(np.quantile(samples, fraction))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Returns the rival's time divided by ours, for each pair of samples."""
    return [rival / own for own, rival in zip(ours, theirs, strict=True)]


def relative_spread(values: Sequence[float]) -> float:
    """Returns the interquartile range as a fraction of the median."""
    return (quantile(values, 0.75) - quantile(values, 0.25)) / median(values)


def too_noisy(ours: Sequence[float], rivals: Mapping[str, Sequence[float]]) -> str | None:
    """Returns a warning if the ratios to a rival spread too far to be relied on, else None.

    Without rivals, the spread of our own samples decides.
    """
    checked = {f"the ratios to {name}": ratios(ours, theirs) for name, theirs in rivals.items()}
    if not checked:
        checked = {"the samples": list(ours)}
    spreads = {name: relative_spread(values) for name, values in checked.items()}
    worst = max(spreads, key=spreads.__getitem__)
    if spreads[worst] <= NOISY:
        return None
    return (
        f"this machine is too noisy for reliable figures: the interquartile range of {worst} is "
        f"{spreads[worst]:.0%} of their median, above the limit of {NOISY:.0%}; end other programs, or "
        "measure for longer with --seconds"
    )
