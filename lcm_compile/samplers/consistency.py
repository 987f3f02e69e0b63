"""Samplers of consistency models: LCM (Luo et al. 2023) and TCD (Zheng et al. 2024)."""

from __future__ import annotations

import math

import numpy as np

from lcm_compile.samplers.step import Schedule, Step, limits_of, step_to, x0_numbers
from lcm_compile.scheduler import SchedulerSettings, alphas_cumprod, boundary_scalings, lcm_timesteps


def lcm(num_steps: int, settings: SchedulerSettings, eta: float | None = None) -> Schedule:
    """Returns the schedule of LCMScheduler: each step goes to a clean picture, and back to the next noise.

    The clean picture is c_skip·latent + c_out·x̂0, as in Luo et al. 2023, "Latent Consistency Models", section
    4 and appendix. `eta` has no effect. Raises UsageError as lcm_timesteps does.
    """
    alphas, timesteps = alphas_cumprod(settings), lcm_timesteps(num_steps, settings)
    steps = []
    for i, t in enumerate(timesteps):
        root_alpha, root_beta = math.sqrt(alphas[t]), math.sqrt(1 - alphas[t])
        after = 1.0 if i == num_steps - 1 else float(alphas[timesteps[i + 1]])
        c_skip, c_out = boundary_scalings(t, settings.timestep_scaling)
        steps.append(
            Step(
                t,
                *x0_numbers(settings, root_alpha, root_beta),
                latent_scale=math.sqrt(after) * c_skip,
                x0_scale=math.sqrt(after) * c_out,
                noise_scale=math.sqrt(1 - after),
                alpha=alphas[t],
                **limits_of(settings, settings.clip_sample is True),
            )
        )
    return Schedule(tuple(steps))


def tcd(num_steps: int, settings: SchedulerSettings, eta: float | None = None) -> Schedule:
    """Returns the schedule of TCDScheduler, with LCM's timesteps (Zheng et al. 2024, arXiv 2402.19159, 4.2).

    A step goes along the trajectory to timestep s = (1 − η)·t', and adds noise up to the next timestep t'.
    `eta` is η, γ in the paper, and 0 if it is None, as in diffusers' pipelines. The last step ends at
    timestep 0 without noise. Nothing limits x̂0. Raises UsageError as lcm_timesteps does.
    """
    eta = eta or 0.0
    alphas, timesteps = alphas_cumprod(settings).astype(float), lcm_timesteps(num_steps, settings)
    steps = []
    for t, after in zip(timesteps, [*timesteps[1:], 0], strict=True):
        s = int(np.float32(1 - eta) * np.float32(after))  # in fp32, as diffusers rounds
        ratio = alphas[after] / alphas[s]
        size = math.sqrt(ratio)
        scales = size * math.sqrt(alphas[s]), size * math.sqrt(1 - alphas[s]), math.sqrt(1 - ratio)
        steps.append(step_to(settings, float(t), alphas[t], *scales))
    return Schedule(tuple(steps))
