"""Euler's method in σ, without and with noise added at each step (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from lcm_compile.samplers.noise_levels import (
    alpha_of,
    first_noise,
    karras,
    sigma_of,
    spaced,
    timesteps_of,
    training_alphas,
)
from lcm_compile.samplers.step import Schedule, step_to
from lcm_compile.scheduler import SchedulerSettings


def euler(
    num_steps: int, settings: SchedulerSettings, eta: float | None = None, use_karras: bool = False
) -> Schedule:
    """Returns the schedule of EulerDiscreteScheduler: algorithm 2 of the paper. `eta` has no effect.

    With `use_karras`, or if the settings say so, σ is spaced as in `karras`, between the first and the last
    timestep's. Raises UsageError as `spaced` does.
    """
    timesteps, sigmas = levels(num_steps, settings)
    if use_karras or settings.use_karras_sigmas:
        sigmas = karras(num_steps, sigmas[0], sigmas[-1])
        timesteps = timesteps_of(sigmas, sigma_of(training_alphas(settings)))
    last = sigma_of(training_alphas(settings)[0]) if settings.final_sigmas_type == "sigma_min" else 0.0
    steps = []
    for t, (sigma, after) in zip(timesteps, pairwise([*sigmas, last]), strict=True):
        size = math.sqrt(alpha_of(after))
        steps.append(step_to(settings, float(t), alpha_of(sigma), size, size * after))
    return Schedule(tuple(steps), first_noise(settings, alpha_of(sigmas.max()), "linspace"))


def euler_ancestral(num_steps: int, settings: SchedulerSettings, eta: float | None = None) -> Schedule:
    """Returns the schedule of EulerAncestralDiscreteScheduler: each step adds noise again, but the last.

    `eta` has no effect. Raises UsageError as `spaced` does.
    """
    timesteps, sigmas = levels(num_steps, settings)
    steps = []
    for t, (sigma, after) in zip(timesteps, pairwise([*sigmas, 0.0]), strict=True):
        up = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
        down = math.sqrt(after**2 - up**2)
        size = math.sqrt(alpha_of(after))
        # The step ends at the lower noise `down`, and noise of `up` brings it to `after`.
        steps.append(step_to(settings, float(t), alpha_of(sigma), size, size * down, size * up))
    return Schedule(tuple(steps), first_noise(settings, alpha_of(sigmas.max()), "linspace"))


def levels(num_steps: int, settings: SchedulerSettings) -> tuple[np.ndarray, np.ndarray]:
    """Returns the timesteps, which may lie between those of training, and σ at each, interpolated."""
    timesteps, training = spaced(num_steps, settings, "linspace"), sigma_of(training_alphas(settings))
    return timesteps, np.interp(timesteps, np.arange(len(training)), training)
