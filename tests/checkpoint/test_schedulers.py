"""A base's scheduler config, against the pipeline with which diffusers opens the base."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.samplers import schedule

CLASSES = {
    kind.__name__: kind
    for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline, LatentConsistencyModelPipeline)
}
SD, XL, LCM = CLASSES
SCHEDULERS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler")
SETTINGS = {
    "clip": {"clip_sample": True},
    "clip by default": {"clip_sample": None},  # DDIM's and DDPM's own default is true
    "a range": {"clip_sample": True, "clip_sample_range": 1.5},
    "no set_alpha_to_one": {"set_alpha_to_one": False, "steps_offset": 0},
    "trailing": {"timestep_spacing": "trailing", "steps_offset": 0},
    "no betas": {"beta_start": None, "beta_end": None, "beta_schedule": None},
    "zero SNR": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "karras": {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "interpolation_type": "linear"},
    "others": {"original_inference_steps": 100, "timestep_scaling": 5.0, "variance_type": "fixed_small"},
}


@pytest.fixture
def bases(sd15_checkpoint, sdxl_checkpoint, tmp_path):
    """Returns a base whose pipeline is of a class, with settings of its scheduler and UNet changed."""

    def make(kind, scheduler, **unet):
        base = shutil.copytree(sdxl_checkpoint if kind == XL else sd15_checkpoint, tmp_path / "base")
        classes = {"scheduler": ["diffusers", scheduler["_class_name"]]} if "_class_name" in scheduler else {}
        change_json(base / "model_index.json", _class_name=kind, **classes)
        change_json(base / "scheduler/scheduler_config.json", **scheduler)
        change_json(base / "unet/config.json", **unet)
        return base

    return make


def change_json(path, **settings):
    data = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def diffusers_pipeline(kind, base):
    safety = {} if kind == XL else {"safety_checker": None, "requires_safety_checker": False}
    return CLASSES[kind].from_pretrained(base, local_files_only=True, **safety)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"]
)
@pytest.mark.parametrize("kind", [SD, XL])
def test_every_setting_as_the_pipeline_draws_with_it(bases, kind, scheduler, settings):
    base = bases(kind, {"_class_name": scheduler, **settings})
    theirs = LCMScheduler.from_config(diffusers_pipeline(kind, base).scheduler.config)
    assert_same_steps(open_checkpoint(str(base)).scheduler, theirs)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_full_lcm_draws_with_its_own_scheduler(bases, settings):
    base = bases(LCM, {"_class_name": "LCMScheduler", **settings})
    assert_same_steps(open_checkpoint(str(base)).scheduler, diffusers_pipeline(LCM, base).scheduler)


def assert_same_steps(settings, theirs):
    random = np.random.default_rng(1)
    latent, output = random.normal(scale=2, size=(2, 1, 4, 8, 8)).astype(np.float32)
    theirs.set_timesteps(4)
    steps = schedule("lcm", 4, settings).steps
    for step in steps:
        mine, _ = step(latent, output)
        found = theirs.step(torch.from_numpy(output), step.timestep, torch.from_numpy(latent))
        size = (1 - step.noise_scale**2) ** 0.5  # of a picture in the next latent
        np.testing.assert_allclose(mine / size, found.denoised.numpy(), rtol=2e-4, atol=2e-5)
    assert [step.timestep for step in steps] == theirs.timesteps.tolist()


@pytest.mark.parametrize("kind", [SD, LCM])
@pytest.mark.parametrize(("version", "size"), [("0.6.0", 32), ("0.9.0", 32), ("0.8.1", 96), (None, 32)])
def test_an_old_sample_size(bases, kind, version, size):
    base = bases(kind, {}, _diffusers_version=version, sample_size=size)
    side = diffusers_pipeline(kind, base).unet.config.sample_size * 8
    assert open_checkpoint(str(base)).default_size == (side, side)


REFUSED = {
    "zero SNR": ({"rescale_betas_zero_snr": True}, ["zero SNR", "epsilon", "rescale_betas_zero_snr"]),
    "a beta of 1": ({"trained_betas": [*[0.001] * 999, 1.0]}, ["zero SNR", "a beta is 1"]),
    "no noise": ({"beta_start": 0.0, "beta_end": 0.0, "rescale_betas_zero_snr": True}, "NaN"),
    "EDM": ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler"),
    "flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
    "VE": ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler"),
    "flow sigmas": ({"use_flow_sigmas": True}, "flow matching"),
    "a ratio": ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio is 1.5"),
}


@pytest.mark.parametrize(("settings", "told"), REFUSED.values(), ids=REFUSED)
def test_what_lcm_cannot_sample(bases, refused, tmp_path, settings, told):
    base = bases(SD, settings)
    out = tmp_path / "bundle"
    told = [told] if isinstance(told, str) else told
    refused(1, [base, *told], "build", "--base", base, "--no-lcm", "--gpu", "cpu", "--out", out)
    assert not out.exists()


def test_zero_snr_of_a_model_that_predicts_x0(bases):
    base = bases(SD, {"prediction_type": "sample", "rescale_betas_zero_snr": True})
    assert open_checkpoint(str(base)).scheduler.rescale_betas_zero_snr
