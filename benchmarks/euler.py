"""The loop that LCM is measured against: diffusers' Euler sampler around a bundle's own engines."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler

from lcm_compile.bundle import EngineBundle
from lcm_compile.checkpoints import open_checkpoint
from lcm_compile.noise import TorchNoise
from lcm_compile.pipeline import LcmPipeline, Request

Draw = Callable[[Request], np.ndarray]


def euler_sampler(bundle: EngineBundle, pipeline: LcmPipeline) -> Draw:
    """Draws a picture (height, width, 3), float32 in 0…1, with the base's own scheduler as diffusers does."""
    config = dict(open_checkpoint(bundle.manifest.spec.base).scheduler_config)
    step, decode = pipeline.runners["step"], pipeline.runners["decode"]
    latent_shape = next(spec.shape for spec in step.contract.inputs if spec.name == "latent")

    def predict(latent: torch.Tensor, timestep: torch.Tensor, conditioning: dict) -> torch.Tensor:
        inputs = {"latent": latent.numpy(), "timestep": timestep.float().reshape(1).numpy()}
        device = {name: step.to_device(array) for name, array in inputs.items()}
        return torch.from_numpy(step.to_host(step({**device, **conditioning})["prediction"]) + 0)

    def draw(request: Request) -> np.ndarray:
        scheduler = EulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(request.steps)
        conditioning, _ = pipeline.encode(request.prompt)
        unconditional = pipeline.encode_negative(request.negative_prompt, conditioning)
        latent = torch.from_numpy(TorchNoise(request.seed)(latent_shape)) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(latent, timestep)
            output = predict(noisy, timestep, conditioning)
            if request.guidance_scale > 1:
                plain = predict(noisy, timestep, unconditional)
                output = plain + request.guidance_scale * (output - plain)
            latent = scheduler.step(output, timestep, latent).prev_sample
        return decode.to_host(decode({"latent": decode.to_device(latent.numpy())})["picture"])[0]

    return draw
