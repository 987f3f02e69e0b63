"""The arithmetic of one denoising step, which is the same for every sampler: they differ in its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcm_compile.scheduler import SchedulerSettings

# The numbers that a graph of a step takes as its input `coefficients`, in this order.
COEFFICIENTS = (
    *("x0_latent", "x0_output", "clip"),
    *("latent_scale", "output_scale", "x0_scale", "previous_scale", "noise_scale"),
)
UNCLIPPED = float(np.finfo(np.float32).max)  # what a graph clips x̂0 to if the sampler does not


@dataclass(frozen=True)
class Step:
    """One denoising step as plain numbers.

    Calling it returns the next latent and x̂0, the picture that the UNet foresees:

    x̂0 = x0_latent·latent + x0_output·output, clipped to ±clip
    next = latent_scale·latent + output_scale·output + x0_scale·x̂0 + previous_scale·x̂0′
           + noise_scale·noise

    `output` is the UNet's prediction and x̂0′ the x̂0 of the step before. All are arrays of one shape and of
    any library: only +, * and the method clip are used. Without `clip` x̂0 is not clipped.
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
        if self.clip is not None:
            x0 = x0.clip(-self.clip, self.clip)
        # A NaN of the UNet reaches the latent even where clipping would hide it, because 0·NaN is NaN.
        after = latent * self.latent_scale + output * self.output_scale + x0 * self.x0_scale
        if previous is not None:
            after = after + previous * self.previous_scale
        if noise is not None:
            after = after + noise * self.noise_scale
        return after, x0


@dataclass(frozen=True)
class Schedule:
    """The steps of a picture from noisy to clean, and the factor of the noise that it begins with."""

    steps: tuple[Step, ...]
    first_noise: float = 1.0

    def first(self, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the first latent, of the shape and type of the noise."""
        return noise if self.first_noise == 1 else noise * np.float32(self.first_noise)


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
    clip: float | None = None,
) -> Step:
    """Returns the step next = x0_scale·x̂0 + noise_left·ε̂ + noise_added·noise. `alpha` is ᾱ at timestep `t`.

    With clipping only x̂0 is clipped, and ε̂ is that of the x̂0 before.
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
        clip=clip,
    )
