"""The samplers: the timesteps of a picture, the arithmetic of each step, and the scale of the first noise.

Each is the scheduler of diffusers of its name, made from the same config. Latents are always the model's
input, √ᾱ·x0 + √(1 − ᾱ)·ε. Schedulers that count noise in σ = √((1 − ᾱ)/ᾱ) keep latents of √(σ² + 1) times
that size, and the steps here have that factor in their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcm_compile.errors import UsageError
from lcm_compile.scheduler import LcmStep, SchedulerSettings, alphas_cumprod, lcm_steps, x0_coefficients

LEAST_ALPHA = 2.0**-24  # ᾱ where the schedule ends at zero SNR: σ stays finite


@dataclass(frozen=True)
class Schedule:
    """The steps of a picture from noisy to clean, and the factor of the noise that it begins with."""

    steps: tuple[LcmStep, ...]
    first_noise: float = 1.0

    def first(self, noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the first latent, of the shape and type of the noise."""
        return noise if self.first_noise == 1 else noise * np.float32(self.first_noise)


@dataclass(frozen=True)
class Sampler:
    """A sampler: its name in A1111's web UI, and what gives its schedule for a number of steps."""

    label: str
    schedule: Callable[[int, SchedulerSettings], Schedule]


def schedule(sampler: str, num_steps: int, settings: SchedulerSettings) -> Schedule:
    """Returns the schedule of a picture drawn in `num_steps`.

    `sampler` is a name in SAMPLERS. Raises UsageError if it can't draw in that many steps or with these
    settings.
    """
    if sampler != "lcm":
        most = settings.num_train_timesteps
        if not 1 <= num_steps <= most:
            raise UsageError(f"steps must be from 1 to {most}, not {num_steps}")
        clips = settings.clip is not None or (sampler == "ddim" and settings.clip_sample is None)
        if clips:
            has = (
                "no clip_sample, for which DDIMScheduler takes true"
                if settings.clip is None
                else "clip_sample"
            )
            raise UsageError(
                f"the sampler {sampler} can't clip, and the config of the base's scheduler has {has}",
                "--sampler lcm, or clip_sample false in scheduler/scheduler_config.json and a new build",
            )
    return SAMPLERS[sampler].schedule(num_steps, settings)


def lcm(num_steps: int, settings: SchedulerSettings) -> Schedule:
    """Returns the schedule of LCMScheduler."""
    return Schedule(tuple(lcm_steps(num_steps, settings)))


def spaced(num_steps: int, settings: SchedulerSettings, spacing: str) -> NDArray[np.floating[Any]]:
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
        timesteps = np.round(np.arange(count, 0, -count / num_steps)) - 1
    else:
        raise UsageError(f"timestep_spacing is {spacing!r}, and must be one of leading, linspace, trailing")
    if timesteps[0] >= count:
        raise UsageError(
            f"{num_steps} steps begin at timestep {timesteps[0]:.0f} of {count}", "take fewer steps"
        )
    return timesteps


def ddim(num_steps: int, settings: SchedulerSettings) -> Schedule:
    """Returns the schedule of DDIMScheduler with η = 0 (Song et al. 2021, arXiv 2010.02502, formula 12).

    Raises UsageError as `spaced` does.
    """
    alphas = alphas_cumprod(settings).astype(np.float64)
    last = alphas[0] if settings.set_alpha_to_one is False else 1.0
    steps = []
    for t in np.round(spaced(num_steps, settings, "leading")).astype(int):
        before = t - settings.num_train_timesteps // num_steps
        alpha, next_alpha = alphas[t], alphas[before] if before >= 0 else last
        steps.append(step_to(settings, float(t), alpha, next_alpha))
    return Schedule(tuple(steps))


def euler(num_steps: int, settings: SchedulerSettings) -> Schedule:
    """Returns the schedule of EulerDiscreteScheduler (Karras et al. 2022, arXiv 2206.00364, algorithm 2).

    Raises UsageError as `spaced` does.
    """
    timesteps, alphas = noise_levels(num_steps, settings)
    levels = zip(timesteps, alphas, [*alphas[1:], 1.0], strict=True)
    steps = tuple(step_to(settings, t, alpha, after) for t, alpha, after in levels)
    return Schedule(steps, first_noise(settings, alphas[0]))


def euler_ancestral(num_steps: int, settings: SchedulerSettings) -> Schedule:
    """Returns the schedule of EulerAncestralDiscreteScheduler: each step adds noise again, but the last.

    Raises UsageError as `spaced` does.
    """
    timesteps, alphas = noise_levels(num_steps, settings)
    steps = []
    for t, alpha, after in zip(timesteps, alphas, [*alphas[1:], 1.0], strict=True):
        sigma, sigma_after = sigma_of(alpha), sigma_of(after)
        up = math.sqrt(sigma_after**2 * (sigma**2 - sigma_after**2) / sigma**2)
        down = math.sqrt(sigma_after**2 - up**2)
        step = step_to(settings, t, alpha, 1 / (down**2 + 1))
        # The step ends at the lower noise `down`, and noise of `up` brings it to `after`.
        size = math.sqrt(after)
        steps.append(replace(step, denoised_scale=size * math.sqrt(down**2 + 1), noise_scale=size * up))
    return Schedule(tuple(steps), first_noise(settings, alphas[0]))


def noise_levels(num_steps: int, settings: SchedulerSettings) -> tuple[list[float], list[float]]:
    """Returns the timesteps, which may lie between those of training, and ᾱ at each, interpolated in σ."""
    alphas = alphas_cumprod(settings).astype(np.float64)
    if settings.rescale_betas_zero_snr:
        alphas[-1] = LEAST_ALPHA
    timesteps = spaced(num_steps, settings, "linspace")
    sigmas = np.interp(timesteps, np.arange(len(alphas)), np.sqrt((1 - alphas) / alphas))
    return [float(t) for t in timesteps], [float(alpha) for alpha in 1 / (sigmas**2 + 1)]


def sigma_of(alpha: float) -> float:
    """Returns σ, the noise next to a picture of size 1, at ᾱ."""
    return math.sqrt((1 - alpha) / alpha)


def first_noise(settings: SchedulerSettings, alpha: float) -> float:
    """Returns the factor of the first noise: 1 for leading timesteps, else that of σ without a picture."""
    return 1.0 if settings.timestep_spacing == "leading" else math.sqrt(1 - alpha)


def step_to(settings: SchedulerSettings, t: float, alpha: float, after: float) -> LcmStep:
    """Returns the step along the straight line from x̂0 to the latent: next = √ᾱ'·x̂0 + √(1 − ᾱ')·ε̂.

    `alpha` is ᾱ at timestep `t` and `after` is ᾱ'. In DDIM's form, ε̂ = (latent − √ᾱ·x̂0)/√(1 − ᾱ). Euler's
    step in σ is the same.
    """
    root, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    ratio = math.sqrt(1 - after) / noise
    x0_latent, x0_output = x0_coefficients(settings.prediction_type, root, noise)
    return LcmStep(t, x0_latent, x0_output, ratio, math.sqrt(after) - root * ratio, 1.0, 0.0)


SAMPLERS = {
    "lcm": Sampler("LCM", lcm),
    "ddim": Sampler("DDIM", ddim),
    "euler": Sampler("Euler", euler),
    "euler-a": Sampler("Euler a", euler_ancestral),
}
