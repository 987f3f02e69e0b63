"""The sampler that LCM is compared with: diffusers' Euler scheduler around a bundle's own engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler

from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.loop import put_coefficients
from lcm_compile.pipeline.noise import TorchNoise
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.pipeline.request import Request
from lcm_compile.scheduler import LcmStep

Draw = Callable[[Request], np.ndarray]


def euler_sampler(bundle: EngineBundle, pipeline: Pipeline) -> Draw:
    """Returns the function that draws a picture, (height, width, 3) in 8 bits, as diffusers does with Euler.

    The scheduler's settings are those of the bundle's base.
    """
    config = dict(open_checkpoint(bundle.manifest.spec.base).scheduler_config)
    step, decode = pipeline.runners["step"], pipeline.runners["decode"]
    prompts = pipeline.prompts
    latent_shape = next(spec.shape for spec in step.contract.inputs if spec.name == "latent")

    # The step's graph also computes LCM's next latent. That result is not used, so its coefficients are 0.
    [numbers] = put_coefficients(pipeline.runners, [LcmStep(0, 0, 0, 0, 0, 0, 0)])

    def predict(latent: torch.Tensor, condition: dict[str, Any]) -> torch.Tensor:
        noisy = step.to_device(latent.numpy())
        given = step({"latent": noisy, "noise": noisy, **numbers, **condition})
        return torch.from_numpy(step.to_host(given["prediction"]) + 0)

    def draw(request: Request) -> np.ndarray:
        scheduler = EulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(request.steps)
        timesteps = [float(timestep) for timestep in scheduler.timesteps]
        negative = request.negative_prompt
        if negative is None and not pipeline.settings.zero_negative_prompt:
            negative = ""
        conditions, plain_conditions = (
            prompts.conditions(prompts.text(prompt), timesteps) for prompt in (request.prompt, negative)
        )
        latent = torch.from_numpy(TorchNoise(request.seed)(latent_shape)) * scheduler.init_noise_sigma
        for timestep, condition, plain_condition in zip(
            scheduler.timesteps, conditions, plain_conditions, strict=True
        ):
            noisy = scheduler.scale_model_input(latent, timestep)
            output = predict(noisy, condition)
            if request.guidance_scale > 1:
                plain = predict(noisy, plain_condition)
                output = plain + request.guidance_scale * (output - plain)
            latent = scheduler.step(output, timestep, latent).prev_sample
        drawn = decode.to_host(decode({"latent": decode.to_device(latent.numpy())})["picture"])
        return eight_bits(drawn[0])

    return draw
