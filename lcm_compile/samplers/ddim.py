"""DDIM (Song et al. 2021, arXiv 2010.02502)."""

from __future__ import annotations

import math

import numpy as np

from lcm_compile.samplers.noise_levels import spaced
from lcm_compile.samplers.step import Schedule, limits_of, step_to
from lcm_compile.scheduler import SchedulerSettings, alphas_cumprod


def ddim(num_steps: int, settings: SchedulerSettings, eta: float | None = None) -> Schedule:
    """Returns the schedule of DDIMScheduler: formula 12 of the paper, with η = `eta`, 0 if it is None.

    x̂0 is clipped unless the settings say that it is not. Raises UsageError as `spaced` does.
    """
    alphas = alphas_cumprod(settings).astype(np.float64)
    last = alphas[0] if settings.set_alpha_to_one is False else 1.0
    limits = limits_of(settings, settings.clip_sample is not False)
    steps = []
    for t in np.round(spaced(num_steps, settings, "leading")).astype(int):
        before = t - settings.num_train_timesteps // num_steps
        alpha, after = alphas[t], alphas[before] if before >= 0 else last
        variance = (1 - after) / (1 - alpha) * (1 - alpha / after)
        added = (eta or 0.0) * math.sqrt(variance)
        left = math.sqrt(max(0.0, 1 - after - added**2))
        steps.append(step_to(settings, float(t), alpha, math.sqrt(after), left, added, **limits))
    return Schedule(tuple(steps))
