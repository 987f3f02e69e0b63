"""What other programs with a loop of their own can draw, told before anything is written for them.

They would not refuse the rest in plain words: the LCM scheduler of OpenVINO GenAI computes nothing for a
model that predicts v, and stable-diffusion.cpp builds its models with widths of its own.
"""

from __future__ import annotations

from dataclasses import replace

from lcm_compile.bundles.manifest import BundleManifest
from lcm_compile.checkpoint.open import open_base
from lcm_compile.scheduler import SchedulerSettings
from lcm_compile.spec import BuildSpec

SD_CPP_WIDTH = 320  # of the first level of every UNet that stable-diffusion.cpp builds
SD_CPP_VAE = (128, 256, 512, 512)  # the widths of its VAE
# The settings that say which noise is added when, and which it has as constants.
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
SPACING = ("original_inference_steps", "rescale_betas_zero_snr")


def spec_of_rivals(manifest: BundleManifest) -> BuildSpec:
    """Returns the spec of the weights that rivals draw with: the bundle's, but for a tiny autoencoder.

    That is the user's choice for speed. Rivals keep the base's own VAE, so that the comparison includes what
    this choice gains.
    """
    return replace(manifest.spec, vae=None) if "decode" in manifest.lossy else manifest.spec


def cannot_draw(name: str, manifest: BundleManifest) -> str | None:
    """Returns why the peer `name` can't draw what this bundle draws, or None.

    Raises CheckpointError if stable-diffusion.cpp is meant and the base can't be opened.
    """
    settings, scheduler = manifest.pipeline, manifest.pipeline.scheduler
    if settings.sampler != "lcm" or scheduler.timesteps:
        own = f"{settings.sampler} at timesteps of its own" if scheduler.timesteps else settings.sampler
        return f"{name} is compared with LCM's usual steps alone, and this bundle draws with {own}"
    if (prediction := scheduler.prediction_type) != "epsilon":
        return f"{name} expects a model that predicts noise, and this one predicts {prediction}"
    if scheduler.thresholding or (scheduler.clip_sample and name != "openvino-genai"):
        return f"{name} does not clip the predicted picture, and the scheduler of this base does"
    return None if name == "openvino-genai" else cannot_draw_with_sd_cpp(name, manifest)


def cannot_draw_with_sd_cpp(name: str, manifest: BundleManifest) -> str | None:
    """Returns why stable-diffusion.cpp, here called `name`, can't draw with this bundle's base, or None."""
    usual = SchedulerSettings()
    for setting in (*NOISE, *SPACING):
        found, known = getattr(manifest.pipeline.scheduler, setting), getattr(usual, setting)
        if found != known:
            return f"{name} has {setting} {known} as a constant, and the scheduler of this base {found}"
    if any(spec.name == "guidance" for stage in manifest.stages for spec in stage.contract.inputs):
        return f"{name} does not read the guidance of a full LCM, and {manifest.spec.base} is one"
    return cannot_read(name, spec_of_rivals(manifest))


def cannot_read(name: str, spec: BuildSpec) -> str | None:
    """Returns why stable-diffusion.cpp, here called `name`, can't read a base's weights, or None."""
    models = open_base(spec, half=True).components
    width = models["unet"].config["block_out_channels"][0]
    if width != SD_CPP_WIDTH:
        return (
            f"{name} reads UNets whose first level is {SD_CPP_WIDTH} wide, and that of {spec.base} is {width}"
        )
    widths = tuple(models["vae"].config["block_out_channels"])
    if widths != SD_CPP_VAE:
        return f"{name} reads VAEs with the widths {SD_CPP_VAE}, and that of {spec.base} has {widths}"
    return None
