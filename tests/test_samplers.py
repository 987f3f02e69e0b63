"""The samplers against diffusers' schedulers: every timestep, and the latents of whole pictures."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers_reference import SCHEDULERS

from lcm_compile.errors import UsageError
from lcm_compile.samplers import SAMPLERS, schedule
from lcm_compile.scheduler import SchedulerSettings, alphas_cumprod

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
CONFIGS = {
    "plain": {},
    "sd15": {"steps_offset": 1, "set_alpha_to_one": False},
    "sdxl": {"steps_offset": 1, "timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace", "set_alpha_to_one": False},
    "v": {"prediction_type": "v_prediction"},
    "x0": {"prediction_type": "sample", "timestep_spacing": "trailing"},
    "zero SNR": {**ZERO_SNR, "timestep_spacing": "trailing"},
    "clips": {"clip_sample": True, "clip_sample_range": 0.6},
    "says nothing of clipping": {"clip_sample": None},
    "Karras": {"use_karras_sigmas": True},
    "ends with noise": {"final_sigmas_type": "sigma_min", "solver_type": "heun"},
    "Euler at the end": {
        "final_sigmas_type": "sigma_min",
        "euler_at_final": True,
        "lower_order_final": False,
    },
    "Heun": {"solver_type": "heun", "timestep_spacing": "leading", "steps_offset": 1},
    "others": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 500},
    "thresholds": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.4},
    "thresholds to 1": {"thresholding": True, "clip_sample": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


def test_every_sampler_is_tested():
    assert SCHEDULERS.keys() == SAMPLERS.keys()


@pytest.mark.parametrize("config", ["sdxl", "thresholds"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fp32_arrays_stay_fp32(sampler, config):
    """An engine takes no other type than its contract's: ONNX Runtime refuses float64."""
    settings = SchedulerSettings.from_dict({**BETAS, **CONFIGS[config]})
    plan, ones = schedule(sampler, 4, settings), np.ones((2, 4, 8, 8), np.float32)
    assert plan.first(ones).dtype == np.float32
    for step in plan.steps:
        assert {array.dtype for array in step(ones, ones, ones, ones)} == {np.dtype(np.float32)}


def output(latent, i, xp):
    """A UNet's output, of the latent's size, that depends on the latent."""
    return xp.sin(0.3 * latent + i)


def latents_of(sampler, settings, num_steps, eta, noise, theirs):
    """Yields our latents and diffusers' before each step, and at the end."""
    seeded = torch.Generator().manual_seed(0)
    latent = torch.randn(noise[0].shape, generator=seeded) * theirs.init_noise_sigma
    ours = schedule(sampler, num_steps, settings, eta)
    mine, previous = ours.first(noise[0].numpy()).astype(np.float64), None
    options = (
        {"generator": seeded} if (sampler != "euler" and "karras" not in sampler) or "dpm" in sampler else {}
    )
    if SAMPLERS[sampler].takes_eta:
        options["eta"] = eta or 0.0
    for i, (t, step) in enumerate(zip(theirs.timesteps, ours.steps, strict=True)):
        given = theirs.scale_model_input(latent, t)
        yield mine, given
        latent = theirs.step(output(given, i, torch), t, latent, **options).prev_sample
        fresh = noise[i + 1].numpy() if step.noise_scale else None
        mine, previous = step(mine, output(mine, i, np), fresh, previous)
    yield mine, latent


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 12, 25, 50])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latents_are_those_of_diffusers(sampler, config, num_steps):
    if sampler == "euler-a" and config.get("prediction_type") == "sample":
        pytest.skip("diffusers has no such Euler ancestral")
    karras = sampler.startswith("dpm++2m") and sampler.endswith("karras")
    if karras and config == CONFIGS["ends with noise"]:
        pytest.skip("diffusers returns NaN: Karras' last σ is that of the end, and it divides by the step")
    if karras and config == CONFIGS["cosine"]:
        pytest.skip(
            "diffusers cuts timesteps off at the point, so that noise in their last digit is a timestep"
        )
    config = {name: value for name, value in {**BETAS, **config}.items() if value is not None}
    if sampler == "lcm" and "clip_sample" not in config:
        config = {**config, "clip_sample": False}
    theirs = SCHEDULERS[sampler](config)
    theirs.set_timesteps(num_steps)
    if hasattr(theirs, "sigmas"):
        theirs.set_begin_index(0)  # if the first two timesteps are equal, it would begin with the second
        theirs.sigmas = theirs.sigmas.double()  # sums of their squares lose all digits in float32
    # Diffusers computes with σ in float32, up to 4096 here, and what is lost of it is not ours.
    largest = float(theirs.sigmas.max()) if hasattr(theirs, "sigmas") else 1.0
    close = {"rtol": 1e-3, "atol": max(2e-4, largest * 2**-22)}
    settings = SchedulerSettings.from_dict(config)
    steps = schedule(sampler, num_steps, settings).steps
    np.testing.assert_allclose([s.timestep for s in steps], theirs.timesteps.numpy(), atol=5e-3)
    noise = torch.randn(num_steps + 1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for mine, latent in latents_of(sampler, settings, num_steps, None, noise, theirs):
        np.testing.assert_allclose(mine, latent, **close)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("config", ["plain", "sd15", "trailing", "v", "clips"])
@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if sampler.takes_eta])
def test_latents_with_noise_added_again(sampler, config, eta):
    config = {**BETAS, **CONFIGS[config]}
    theirs = SCHEDULERS[sampler](config)
    theirs.set_timesteps(5)
    noise = torch.randn(6, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for mine, latent in latents_of(sampler, SchedulerSettings.from_dict(config), 5, eta, noise, theirs):
        np.testing.assert_allclose(mine, latent, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_timestep_in_float64(sampler, prediction):
    """A picture of a step at each timestep of training, with the same noise schedule on both sides."""
    config = {**BETAS, "prediction_type": prediction, "timestep_spacing": "trailing"}
    if sampler == "euler-a" and prediction == "sample":
        pytest.skip("diffusers has no such Euler ancestral")
    count = 400 if "karras" in sampler else 1000
    config["original_inference_steps"] = count
    theirs, settings = SCHEDULERS[sampler](config), SchedulerSettings.from_dict(config)
    theirs.alphas_cumprod = torch.from_numpy(alphas_cumprod(settings)).double()
    theirs.set_timesteps(count)
    exact = not hasattr(theirs, "sigmas")  # the others round latents to float32 in every step
    if not exact:
        theirs.sigmas = theirs.sigmas.double()
        theirs.set_begin_index(0)
    random = torch.Generator().manual_seed(1)
    latents, outputs = torch.randn(2, count, 1, 1, 2, 2, generator=random, dtype=torch.float64)
    steps = schedule(sampler, count, settings).steps
    known = inspect.signature(theirs.step).parameters
    options = {name: value for name, value in {"generator": random, "eta": 0.0}.items() if name in known}
    previous = None
    for i, (t, step) in enumerate(zip(theirs.timesteps, steps, strict=True)):
        assert step.timestep == pytest.approx(float(t), abs=5e-3)
        size = 1.0
        if hasattr(theirs, "sigmas") and theirs.init_noise_sigma != 1:
            size = float(theirs.sigmas[i] ** 2 + 1) ** 0.5
            theirs.is_scale_input_called = True
        state = random.get_state()
        after = theirs.step(outputs[i], t, latents[i] * size, **options).prev_sample
        noise = torch.randn(latents[i].shape, generator=random.set_state(state)) if step.noise_scale else None
        if size != 1:
            after = after / float(theirs.sigmas[i + 1] ** 2 + 1) ** 0.5
        mine, previous = step(latents[i], outputs[i], noise, previous)
        close = {"rtol": 1e-9, "atol": 1e-9} if exact and noise is None else {"rtol": 2e-4, "atol": 2e-5}
        torch.testing.assert_close(mine.double(), after.double(), **close)


def test_trailing_timesteps_where_arange_gives_one_too_many():
    settings = SchedulerSettings.from_dict({**BETAS, "timestep_spacing": "trailing"})
    for sampler in ("ddim", "euler", "euler-a", "dpm++2m"):
        timesteps = [step.timestep for step in schedule(sampler, 61, settings).steps]
        assert len(timesteps) == 61 and timesteps[-1] > 0


def test_what_can_not_be_drawn():
    plain = SchedulerSettings.from_dict(BETAS)
    for sampler in SAMPLERS.keys() - {"lcm", "tcd"}:
        for steps in (0, 1001):
            with pytest.raises(UsageError, match="from 1 to 1000"):
                schedule(sampler, steps, plain)
    for sampler in ("ddim", "euler", "dpm++2m"):
        with pytest.raises(UsageError, match="timestep_spacing is 'odd'"):
            schedule(sampler, 4, SchedulerSettings(timestep_spacing="odd"))
    with pytest.raises(UsageError, match="begin at timestep 1000"):
        schedule("euler", 1000, SchedulerSettings(timestep_spacing="leading", steps_offset=1))
    with pytest.raises(UsageError, match="euler has no eta"):
        schedule("euler", 4, plain, 0.5)
    for name, value in {"use_beta_sigmas": True, "sigma_max": 80.0, "lambda_min_clipped": -5.1}.items():
        settings = SchedulerSettings.from_dict({**BETAS, name: value})
        with pytest.raises(UsageError, match=name):
            schedule("dpm++2m", 4, settings)
        assert schedule("ddim", 4, settings) == schedule("ddim", 4, plain)
