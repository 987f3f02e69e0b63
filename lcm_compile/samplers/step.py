"""The arithmetic of one denoising step, which is the same for every sampler: they differ in its numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcm_compile.scheduler import SchedulerSettings

# The numbers that a graph of a step takes as its input `coefficients`, in this order.
COEFFICIENTS = (
    *("x0_latent", "x0_output", "clip", "threshold"),
    *("latent_scale", "output_scale", "x0_scale", "previous_scale", "noise_scale"),
)
UNCLIPPED = float(np.finfo(np.float32).max)  # what a graph clips x̂0 to if the sampler does not


@dataclass(frozen=True)
class Step:
    """One denoising step as plain numbers.

    Calling it returns the next latent and x̂0, the picture that the UNet foresees:

    x̂0 = x0_latent·latent + x0_output·output, clipped to ±clip, or by dynamic thresholding
    next = latent_scale·latent + output_scale·output + x0_scale·x̂0 + previous_scale·x̂0′
           + noise_scale·noise

    `output` is the UNet's prediction and x̂0′ the x̂0 of the step before. All are arrays (b, c, h, w) of NumPy
    or torch. Without `clip` x̂0 is not clipped. With a `ratio` it is thresholded (see `thresholded`), and
    `threshold` is the most that it is divided by. `alpha` is ᾱ of the latent that the step begins with; only
    a picture that begins in the middle needs it.
    """

    timestep: float
    x0_latent: float
    x0_output: float
    latent_scale: float = 0.0
    output_scale: float = 0.0
    x0_scale: float = 0.0
    previous_scale: float = 0.0
    noise_scale: float = 0.0
    clip: float | None = None
    threshold: float = 1.0
    ratio: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        # NumPy's own numbers are float64, and would make float64 of an engine's float32 arrays. A graph has
        # tensors here.
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The numbers that a graph of a step takes, in the order of COEFFICIENTS."""
        values = {**vars(self), "clip": UNCLIPPED if self.clip is None else self.clip}
        return tuple(values[name] for name in COEFFICIENTS)

    def __call__(self, latent: Any, output: Any, noise: Any = None, previous: Any = None) -> tuple[Any, Any]:
        """Returns the next latent and x̂0. A term whose array is None is left out."""
        x0 = latent * self.x0_latent + output * self.x0_output
        if self.ratio is not None:
            x0 = self.thresholded(x0, self.ratio)
        elif self.clip is not None:
            x0 = x0.clip(-self.clip, self.clip)
        # A NaN of the UNet reaches the latent even where clipping would hide it, because 0·NaN is NaN.
        after = latent * self.latent_scale + output * self.output_scale + x0 * self.x0_scale
        if previous is not None:
            after = after + previous * self.previous_scale
        if noise is not None:
            after = after + noise * self.noise_scale
        return after, x0

    def thresholded(self, x0: Any, ratio: float) -> Any:
        """Returns x̂0 clipped to ±s and divided by s, after Saharia et al. 2022, arXiv 2205.11487, 2.3.

        s is the quantile `ratio` of each picture's |x̂0|, from 1 to `threshold`. A graph has the quantile for
        every sampler. One that does not threshold has a `threshold` of 1, so that s is 1, and the greater
        `clip` decides.
        """
        size = quantile(abs(x0).reshape(len(x0), -1), ratio).reshape(-1, 1, 1, 1)
        size = size.clip(min=1.0).clip(max=self.threshold)
        bound = size.clip(min=self.clip)
        return x0.clip(-bound, bound) / size

    def noisy(self, latent: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns a clean latent with as much noise as the latent has that the step begins with."""
        assert self.alpha is not None
        return latent * np.float32(self.alpha**0.5) + noise * np.float32((1 - self.alpha) ** 0.5)


def quantile(rows: Any, ratio: float) -> Any:
    """Returns the quantile of each row (n, m), interpolated between the two next values, as (n,).

    Rows are NumPy's or torch's. torch.quantile has no counterpart in ONNX, but its largest values have.
    """
    if isinstance(rows, np.ndarray):
        return np.quantile(rows, ratio, axis=1)
    position = ratio * (rows.shape[1] - 1)
    below = min(int(position), rows.shape[1] - 2)
    largest = rows.topk(rows.shape[1] - below).values
    return largest[:, -1] + (position - below) * (largest[:, -2] - largest[:, -1])


@dataclass(frozen=True)
class Schedule:
    """The steps of a picture from noisy to clean, and the factor of the noise that it begins with."""

    steps: tuple[Step, ...]
    first_noise: float = 1.0

    def first(self, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the first latent, of the shape and type of the noise."""
        return noise if self.first_noise == 1 else noise * np.float32(self.first_noise)

    def begun_at(self, first: int) -> Schedule:
        """Returns the schedule without the steps before step `first`.

        A solver of several steps then begins with one of order 1, which is the same step where the x̂0 before
        equals its own.
        """
        begin, *others = self.steps[first:]
        begin = replace(begin, x0_scale=begin.x0_scale + begin.previous_scale, previous_scale=0.0)
        return replace(self, steps=(begin, *others))


def x0_numbers(settings: SchedulerSettings, root_alpha: float, root_beta: float) -> tuple[float, float]:
    """Returns (a, b) for x̂0 = a·latent + b·output, where latent = √ᾱ·x0 + √(1 − ᾱ)·ε.

    `root_alpha` is √ᾱ and `root_beta` is √(1 − ᾱ).
    """
    if settings.prediction_type == "epsilon":
        return 1 / root_alpha, -root_beta / root_alpha
    if settings.prediction_type == "v_prediction":
        return root_alpha, -root_beta
    return 0.0, 1.0


def noise_numbers(settings: SchedulerSettings, root_alpha: float, root_beta: float) -> tuple[float, float]:
    """Returns (a, b) for ε̂ = a·latent + b·output, where latent = √ᾱ·x0 + √(1 − ᾱ)·ε. See x0_numbers."""
    if settings.prediction_type == "epsilon":
        return 0.0, 1.0
    if settings.prediction_type == "v_prediction":
        return root_beta, root_alpha
    return 1 / root_beta, -root_alpha / root_beta


def step_to(
    settings: SchedulerSettings,
    t: float,
    alpha: float,
    x0_scale: float,
    noise_left: float,
    noise_added: float = 0.0,
    **limits: float,
) -> Step:
    """Returns the step next = x0_scale·x̂0 + noise_left·ε̂ + noise_added·noise. `alpha` is ᾱ at timestep `t`.

    `limits` are those of limits_of. Only x̂0 is clipped by them, and ε̂ is that of the x̂0 before.
    """
    root_alpha, root_beta = alpha**0.5, (1 - alpha) ** 0.5
    of_latent, of_output = noise_numbers(settings, root_alpha, root_beta)
    return Step(
        t,
        *x0_numbers(settings, root_alpha, root_beta),
        latent_scale=noise_left * of_latent,
        output_scale=noise_left * of_output,
        x0_scale=x0_scale,
        noise_scale=noise_added,
        alpha=alpha,
        **limits,
    )


def limits_of(settings: SchedulerSettings, clips: bool) -> dict[str, float]:
    """Returns what limits x̂0, as keywords of a Step: thresholding if asked for, or clipping if it `clips`."""
    if settings.thresholding:
        ratio, most = settings.dynamic_thresholding_ratio, settings.sample_max_value
        return {"clip": 0.0, "threshold": most, "ratio": ratio}
    return {"clip": settings.clip_sample_range} if clips else {}
