"""How much a timing changed, and how surely, where processes differ more than their samples do.

Samples of one process are correlated, and two processes of the same program often differ by more than their
samples do: memory lies elsewhere, other threads meet on a core. So the process is the unit; where there
is one process only, blocks of its consecutive samples are. After Kalibera and Jones, "Quantifying Performance
Changes with Effect Size Confidence Intervals" (2012); blocks after Künsch (1989).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
# Standard deviation between processes of the logarithm of their medians; stands in where one process took all
# samples, and so can't show it.
PROCESS_SPREAD = 0.02
# What a lone process must give. Of several each may give one: a process starts once.
MIN_SAMPLES = 3


@dataclass(frozen=True)
class Spread:
    """A quantile of log times: its mean over processes, the variance of that, and its degrees of freedom."""

    value: float
    variance: float
    freedom: float


@dataclass(frozen=True)
class Change:
    """New over base, minus 1, with its confidence interval."""

    value: float
    low: float
    high: float


def fewest_samples(quantile: float, processes: int) -> int:
    """How many samples every process must have for its median, or its tail, to mean something."""
    of_tail = round(1 / (1 - quantile)) if quantile > 0.5 else 1
    return max(of_tail, MIN_SAMPLES if processes == 1 else 1)


def spread(processes: Sequence[np.ndarray], quantile: float) -> Spread:
    """`processes` holds each process's log times in the order they were taken, `fewest_samples` or more."""
    n = len(processes)
    values = np.array([np.quantile(p, quantile) for p in processes])
    if n > 1:
        # What a bootstrap over processes converges to, without its shrinkage by (n − 1)/n.
        return Spread(float(values.mean()), float(values.var(ddof=1)) / n, n - 1)
    (samples,) = processes
    rng = np.random.default_rng(0)  # the same files give the same verdict
    redrawn = np.quantile(draw_blocks(samples, rng), quantile, axis=1)
    blocks = len(samples) / block_length(len(samples))
    return Spread(float(values[0]), float(redrawn.var()) + PROCESS_SPREAD**2, blocks - 1)


def draw_blocks(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(DRAWS, at least len(samples)): each row drawn again, in blocks that keep neighbours together."""
    n, length = len(samples), block_length(len(samples))
    starts = rng.integers(n - length + 1, size=(DRAWS, -(-n // length), 1))
    return samples[(starts + np.arange(length)).reshape(DRAWS, -1)]


def block_length(n: int) -> int:
    return max(1, round(n ** (1 / 3)))


def change(base: Spread, new: Spread, alpha: float) -> Change:
    """The relative change, in an interval that each side's error leaves with a chance of `alpha`.

    Welch's interval, with the bootstrap's variances: few processes make it wide, as they should.
    """
    difference, variance = new.value - base.value, new.variance + base.variance
    shares = base.variance**2 / base.freedom + new.variance**2 / new.freedom
    reach = 0.0
    if shares > 0:
        reach = t_quantile(1 - alpha, variance**2 / shares) * float(np.sqrt(variance))
    value, low, high = np.expm1([difference, difference - reach, difference + reach])
    return Change(float(value), float(low), float(high))


def t_quantile(p: float, freedom: float) -> float:
    """Student's t for p ≥ ½. With t = √ν·tan θ, θ has a density in proportion to cosᵛ⁻¹ θ."""
    theta = (np.arange(200_000) + 0.5) * (np.pi / 2 / 200_000)
    mass = np.cumsum(np.cos(theta) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * p - 1, mass / mass[-1], theta)))
