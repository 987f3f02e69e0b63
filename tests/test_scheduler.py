"""The scheduler against diffusers' LCMScheduler: every step count, timestep and prediction type."""

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler

from lcm_compile.errors import UsageError
from lcm_compile.samplers import schedule
from lcm_compile.scheduler import SchedulerSettings, alphas_cumprod, boundary_scalings, lcm_timesteps

CONFIGS = {
    "sdxl": {"steps_offset": 1, "set_alpha_to_one": False},
    "v": {"prediction_type": "v_prediction", "set_alpha_to_one": False},
    "sample": {"prediction_type": "sample"},
    "zero-snr v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "clip": {"clip_sample": True, "clip_sample_range": 0.8},
    "100 original": {"original_inference_steps": 100, "timestep_scaling": 7.0},
    "trained": {"trained_betas": [0.001 + 1e-5 * i for i in range(1000)]},
}


def diffusers_scheduler(config):
    return LCMScheduler(**config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_alphas(config):
    ours = alphas_cumprod(SchedulerSettings.from_dict(diffusers_scheduler(config).config))
    theirs = diffusers_scheduler(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_timesteps_of_every_step_count(config):
    theirs = diffusers_scheduler(config)
    settings = SchedulerSettings.from_dict(theirs.config)
    for n in range(1, settings.original_inference_steps + 1):
        theirs.set_timesteps(n)
        assert lcm_timesteps(n, settings) == theirs.timesteps.tolist()


def test_boundary_scalings_of_every_timestep():
    theirs = diffusers_scheduler({})
    for t in range(1000):
        assert boundary_scalings(t) == pytest.approx(
            theirs.get_scalings_for_boundary_condition_discrete(t), rel=1e-12
        )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 7, 50])
def test_every_step_of_a_picture(config, num_steps):
    """The next latent from the same latent, model output and noise, in float64 on our side."""
    theirs = diffusers_scheduler(config)
    theirs.set_timesteps(num_steps)
    steps = schedule("lcm", num_steps, SchedulerSettings.from_dict(theirs.config)).steps
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    output = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    for i, step in enumerate(steps):
        generator = torch.Generator().manual_seed(i)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)).numpy()
        expected = theirs.step(output, theirs.timesteps[i], latent, generator, return_dict=False)[0].numpy()
        actual, _ = step(latent.double().numpy(), output.double().numpy(), noise)
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["sdxl", "v", "sample"])
def test_coefficients_at_every_usable_timestep(name):
    """One-step pictures started anywhere: x̂0 and c_skip, c_out for all 1000 timesteps."""
    latent = torch.full((1, 1, 1, 1), 0.7)
    output = torch.full((1, 1, 1, 1), -0.4)
    for original in (50, 1000):
        scheduler = LCMScheduler(**CONFIGS[name], original_inference_steps=original)
        settings = SchedulerSettings.from_dict(scheduler.config)
        scheduler.set_timesteps(original)
        for step in schedule("lcm", original, settings).steps:
            scheduler._step_index = None
            _, denoised = scheduler.step(output, torch.tensor(step.timestep), latent, return_dict=False)
            ours, _ = step(0.7, -0.4)
            size = (1 - step.noise_scale**2) ** 0.5  # of a picture in the next latent
            assert ours / size == pytest.approx(denoised.item(), rel=3e-5, abs=1e-6)


def test_four_steps_of_sd15_and_sdxl():
    assert lcm_timesteps(4, SchedulerSettings()) == [999, 759, 499, 259]


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_steps_out_of_range(steps):
    with pytest.raises(UsageError, match="from 1 to 50"):
        lcm_timesteps(steps, SchedulerSettings())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "from 0 to 1"),
        ({"prediction_type": "flow"}, "flow"),
        ({"beta_schedule": "spline"}, "spline"),
    ],
)
def test_settings_lcm_cannot_use(config, reason):
    with pytest.raises(ValueError, match=reason):
        SchedulerSettings.from_dict(config)
