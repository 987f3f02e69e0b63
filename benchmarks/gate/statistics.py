"""Estimates how much a time changed, with a confidence interval.

Samples of one process are correlated, and two processes of the same program often differ by more than the
samples within one do, because memory is laid out differently and other threads share a core. The unit of the
statistics is therefore the process; if there is only one process, it is a block of its consecutive samples.
After Kalibera and Jones, "Quantifying Performance Changes with Effect Size Confidence Intervals" (2012); the
blocks are after Künsch (1989).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000  # bootstrap resamples
# The standard deviation, between processes, of the logarithm of their medians. It is assumed where one
# process took all samples, from which it can't be estimated.
PROCESS_SPREAD = 0.02
# The least number of samples from a single process. If there are several processes, one sample from each is
# enough, because a cold start happens once in a process.
MIN_SAMPLES = 3


@dataclass(frozen=True)
class Spread:
    """A quantile of log times: its mean over processes, that mean's variance and its degrees of freedom."""

    value: float
    variance: float
    freedom: float


@dataclass(frozen=True)
class Change:
    """The new time divided by the baseline's, minus 1, with its confidence interval from `low` to `high`."""

    value: float
    low: float
    high: float


def fewest_samples(quantile: float, processes: int) -> int:
    """Returns how many samples every process must have to estimate this quantile.

    A quantile above the median needs as many as put one sample above it on average.
    """
    for_tail = round(1 / (1 - quantile)) if quantile > 0.5 else 1
    return max(for_tail, MIN_SAMPLES if processes == 1 else 1)


def spread(processes: Sequence[np.ndarray], quantile: float) -> Spread:
    """Returns the estimate of a quantile.

    `processes` holds each process's log times in the order in which they were taken, `fewest_samples` or
    more.
    """
    n = len(processes)
    values = np.array([np.quantile(p, quantile) for p in processes])
    if n > 1:
        # The variance that a bootstrap over processes converges to, without its shrinkage by (n − 1)/n.
        return Spread(float(values.mean()), float(values.var(ddof=1)) / n, n - 1)
    (samples,) = processes
    rng = np.random.default_rng(0)  # seeded, so that the same files give the same verdict
    redrawn = np.quantile(draw_blocks(samples, rng), quantile, axis=1)
    blocks = len(samples) / block_length(len(samples))
    return Spread(float(values[0]), float(redrawn.var()) + PROCESS_SPREAD**2, blocks - 1)


def draw_blocks(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns an array of shape (DRAWS, len(samples) or a little more) of bootstrap resamples.

    Each row consists of randomly chosen blocks of consecutive samples, which preserve their correlation.
    """
    n, length = len(samples), block_length(len(samples))
    starts = rng.integers(n - length + 1, size=(DRAWS, -(-n // length), 1))
    return samples[(starts + np.arange(length)).reshape(DRAWS, -1)]


def block_length(n: int) -> int:
    """Returns the bootstrap's block length for n samples: the cube root of n, rounded."""
    return max(1, round(n ** (1 / 3)))


def change(base: Spread, new: Spread, alpha: float) -> Change:
    """Returns the relative change with an interval that misses it with probability `alpha` on either side.

    This is Welch's interval, with the variances of `spread`. Few processes make it wide, as they should.
    """
    difference, variance = new.value - base.value, new.variance + base.variance
    shares = base.variance**2 / base.freedom + new.variance**2 / new.freedom
    reach = 0.0
    if shares > 0:
        reach = t_quantile(1 - alpha, variance**2 / shares) * float(np.sqrt(variance))
    value, low, high = np.expm1([difference, difference - reach, difference + reach])
    return Change(float(value), float(low), float(high))


def t_quantile(p: float, freedom: float) -> float:
    """Returns the quantile p ≥ ½ of Student's t distribution with ν = `freedom`.

    With t = √ν·tan θ, the density of θ is proportional to cosᵛ⁻¹ θ, which is summed numerically.
    """
    theta = (np.arange(200_000) + 0.5) * (np.pi / 2 / 200_000)
    mass = np.cumsum(np.cos(theta) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * p - 1, mass / mass[-1], theta)))
