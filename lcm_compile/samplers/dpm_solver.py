"""DPM-Solver++ of order 2 in several steps, for the ODE and the SDE (Lu et al. 2022, arXiv 2211.01095)."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from lcm_compile.samplers.noise_levels import (
    alpha_of,
    karras,
    sigma_of,
    spaced_to_zero,
    timesteps_of,
    training_alphas,
)
from lcm_compile.samplers.step import Schedule, Step, limits_of, x0_numbers
from lcm_compile.scheduler import SchedulerSettings


def dpm_solver_2m(
    num_steps: int,
    settings: SchedulerSettings,
    eta: float | None = None,
    use_karras: bool = False,
    sde: bool = False,
) -> Schedule:
    """Returns the schedule of DPMSolverMultistepScheduler: dpmsolver++, or with `sde` sde-dpmsolver++.

    The first step has order 1, and so has the last one if it ends without noise. With `use_karras`, or if the
    settings say so, σ is spaced as in `karras`. `eta` has no effect. Raises UsageError as `spaced` does.
    """
    training = sigma_of(training_alphas(settings))
    if use_karras or settings.use_karras_sigmas:
        sigmas = karras(num_steps, training[-1], training[0])
        timesteps = timesteps_of(sigmas, training)
        cosine = settings.beta_schedule == "squaredcos_cap_v2"
        timesteps = np.trunc(timesteps) if cosine else np.round(timesteps)
    else:
        timesteps = spaced_to_zero(num_steps, settings, "linspace")
        sigmas = training[timesteps.astype(int)]
    last = training[0] if settings.final_sigmas_type == "sigma_min" else 0.0
    first_order_end = last == 0 or settings.euler_at_final or (settings.lower_order_final and num_steps < 15)
    steps: list[Step] = []
    for i, (sigma, after) in enumerate(pairwise([*sigmas, last])):
        # h is the step in λ = log(√ᾱ/√(1 − ᾱ)) = −log σ, and infinite to a picture without noise.
        decay = min(1.0, after / sigma)  # exp(−h)
        h = -math.log(decay) if decay > 0 else math.inf
        kept, gained = (decay**2, 1 - decay**2) if sde else (decay, 1 - decay)
        ahead = 0.0
        if i > 0 and h > 0 and not (i == num_steps - 1 and first_order_end):
            slope = gained / 2
            if settings.solver_type == "heun":
                slope = 1 - gained / (2 * h if sde else h)
            ahead = slope * h / math.log(sigmas[i - 1] / sigma)
        size, root = math.sqrt(alpha_of(after)), math.sqrt(alpha_of(sigma))
        # Latents have the size √ᾱ of a picture; kept is a factor of noise next to a picture of size 1.
        steps.append(
            Step(
                float(timesteps[i]),
                *x0_numbers(settings, root, root * sigma),
                latent_scale=size / root * kept,
                x0_scale=size * (gained + ahead),
                previous_scale=-size * ahead,
                noise_scale=size * after * math.sqrt(1 - decay**2) if sde else 0.0,
                alpha=alpha_of(sigma),
                **limits_of(settings, clips=False),
            )
        )
    return Schedule(tuple(steps))
