"""Which timesteps a picture of N steps visits, and how noisy it is at each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcm_compile.errors import UsageError
from lcm_compile.scheduler import SchedulerSettings, alphas_cumprod

LEAST_ALPHA = 2.0**-24  # ᾱ where the schedule ends at zero SNR: σ stays finite
KARRAS_RHO = 7.0


def spaced(num_steps: int, settings: SchedulerSettings, spacing: str) -> NDArray[Any]:
    """Returns timesteps from noisy to clean, not rounded; `spacing` holds if the settings have none.

    The names are those of Lin et al. 2023 (arXiv 2305.08891), table 2. Raises UsageError for another name, or
    if a timestep is beyond those of training.
    """
    count, spacing = settings.num_train_timesteps, settings.timestep_spacing or spacing
    if spacing == "linspace":
        return np.linspace(0, count - 1, num_steps)[::-1]
    if spacing == "leading":
        timesteps = np.arange(num_steps)[::-1] * float(count // num_steps) + (settings.steps_offset or 0)
    elif spacing == "trailing":
        # For some numbers of steps, such as 61, a rounding error gives arange one timestep more: −1.
        timesteps = np.round(np.arange(count, 0, -count / num_steps))[:num_steps] - 1
    else:
        raise unknown_spacing(spacing)
    check_first(num_steps, timesteps[0], settings)
    return timesteps


def spaced_to_zero(num_steps: int, settings: SchedulerSettings, spacing: str) -> NDArray[Any]:
    """Returns rounded timesteps of which a last one more would be 0; the DPM solvers have these.

    Raises UsageError as `spaced` does.
    """
    count, spacing = settings.num_train_timesteps, settings.timestep_spacing or spacing
    if spacing == "linspace":
        return np.round(np.linspace(0, count - 1, num_steps + 1))[::-1][:-1]
    if spacing == "leading":
        each = count // (num_steps + 1)
        timesteps = np.arange(num_steps + 1)[::-1][:-1] * float(each) + (settings.steps_offset or 0)
        check_first(num_steps, timesteps[0], settings)
        return timesteps
    return spaced(num_steps, settings, spacing)


def check_first(num_steps: int, first: float, settings: SchedulerSettings) -> None:
    """Raises UsageError if the first timestep is beyond those of training."""
    if first >= (count := settings.num_train_timesteps):
        raise UsageError(f"{num_steps} steps begin at timestep {first:.0f} of {count}", "take fewer steps")


def unknown_spacing(spacing: str) -> UsageError:
    """Returns the error for a spacing that has no rule."""
    return UsageError(f"timestep_spacing is {spacing!r}, and must be one of leading, linspace, trailing")


def training_alphas(settings: SchedulerSettings) -> NDArray[np.float64]:
    """Returns ᾱ at every timestep of training, nowhere 0 in a schedule that ends at zero SNR."""
    alphas = alphas_cumprod(settings).astype(np.float64)
    if settings.rescale_betas_zero_snr:
        alphas[-1] = LEAST_ALPHA
    return alphas


def sigma_of(alpha: Any) -> Any:
    """Returns σ, the noise next to a picture of size 1, at ᾱ."""
    return ((1 - alpha) / alpha) ** 0.5


def alpha_of(sigma: Any) -> Any:
    """Returns ᾱ at σ."""
    return 1 / (sigma**2 + 1)


def karras(num_steps: int, most: float, least: float) -> NDArray[np.float64]:
    """Returns σ from `most` to `least` as in Karras et al. 2022 (arXiv 2206.00364), formula 5, with ρ = 7."""
    ends = most ** (1 / KARRAS_RHO), least ** (1 / KARRAS_RHO)
    return (ends[0] + np.linspace(0, 1, num_steps) * (ends[1] - ends[0])) ** KARRAS_RHO


def timesteps_of(sigmas: NDArray[np.float64], training: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the timesteps, not rounded, with the log σ of `sigmas`; `training` has σ at every timestep."""
    return np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))


def first_noise(settings: SchedulerSettings, alpha: float, spacing: str) -> float:
    """Returns the factor of Euler's first noise: 1 for leading timesteps, or that of σ without a picture."""
    return 1.0 if (settings.timestep_spacing or spacing) == "leading" else math.sqrt(1 - alpha)
