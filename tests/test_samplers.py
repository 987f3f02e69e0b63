"""The samplers against diffusers' schedulers: every timestep, and the latents of whole pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler

from lcm_compile.errors import UsageError
from lcm_compile.samplers import SAMPLERS, schedule
from lcm_compile.scheduler import SchedulerSettings

SCHEDULERS = {
    "lcm": LCMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-a": EulerAncestralDiscreteScheduler,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
CONFIGS = {
    "plain": {},
    "sd15": {"steps_offset": 1, "set_alpha_to_one": False},
    "sdxl": {"steps_offset": 1, "timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace", "set_alpha_to_one": False},
    "v": {"prediction_type": "v_prediction"},
    "zero SNR": {**ZERO_SNR, "timestep_spacing": "trailing"},
    "others": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 500},
}


def test_every_sampler_is_tested():
    assert SCHEDULERS.keys() == SAMPLERS.keys()


def output(latent, i, xp):
    """A UNet's output, of the latent's size, that depends on the latent."""
    return xp.sin(0.3 * latent + i)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 25, 50])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_are_those_of_diffusers(sampler, config, num_steps):
    theirs = SCHEDULERS[sampler].from_config({**BETAS, **config})
    theirs.set_timesteps(num_steps)
    if hasattr(theirs, "sigmas"):
        theirs.sigmas = theirs.sigmas.double()  # sums of their squares lose all digits in float32
    # Diffusers keeps latents of size σ in float32, up to 4096 here, and what is lost of them is not ours.
    close = {"rtol": 1e-3, "atol": max(2e-4, float(theirs.init_noise_sigma) * 2**-22)}
    ours = schedule(sampler, num_steps, SchedulerSettings.from_dict({**BETAS, **config}))
    np.testing.assert_allclose([s.timestep for s in ours.steps], theirs.timesteps.numpy(), atol=1e-3)
    noise = torch.randn(num_steps + 1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seeded = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 4, 8, 8, generator=seeded) * theirs.init_noise_sigma
    mine = ours.first(noise[0].numpy()).astype(np.float64)
    for i, (t, step) in enumerate(zip(theirs.timesteps, ours.steps, strict=True)):
        given = theirs.scale_model_input(latent, t)
        np.testing.assert_allclose(mine, given, **close)
        options = {} if sampler in ("ddim", "euler") else {"generator": seeded}
        latent = theirs.step(output(given, i, torch), t, latent, **options).prev_sample
        fresh = None if i == num_steps - 1 else noise[i + 1].numpy()
        mine = step(mine, output(mine, i, np), fresh)
    np.testing.assert_allclose(mine, latent, **close)


def test_what_can_not_be_drawn():
    plain = SchedulerSettings.from_dict(BETAS)
    for sampler in ("ddim", "euler", "euler-a"):
        for steps in (0, 1001):
            with pytest.raises(UsageError, match="from 1 to 1000"):
                schedule(sampler, steps, plain)
        with pytest.raises(UsageError, match="clip_sample"):
            schedule(sampler, 4, SchedulerSettings(clip_sample=True))
        with pytest.raises(UsageError, match="timestep_spacing is 'odd'"):
            schedule(sampler, 4, SchedulerSettings(clip_sample=False, timestep_spacing="odd"))
    with pytest.raises(UsageError, match="no clip_sample"):
        schedule("ddim", 4, SchedulerSettings())
    with pytest.raises(UsageError, match="begin at timestep 1000"):
        schedule("euler", 1000, SchedulerSettings(timestep_spacing="leading", steps_offset=1))
