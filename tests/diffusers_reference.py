"""Pictures of a bundle beside those that diffusers draws of the same checkpoint, prompt and seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.pipeline import LcmPipeline
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db

sde = partial(DPMSolverMultistepScheduler.from_config, algorithm_type="sde-dpmsolver++")
# What makes the scheduler of each sampler from a config.
SCHEDULERS = {
    "lcm": LCMScheduler.from_config,
    "tcd": TCDScheduler.from_config,
    "ddim": DDIMScheduler.from_config,
    "euler": EulerDiscreteScheduler.from_config,
    "euler-karras": partial(EulerDiscreteScheduler.from_config, use_karras_sigmas=True),
    "euler-a": EulerAncestralDiscreteScheduler.from_config,
    "dpm++2m": DPMSolverMultistepScheduler.from_config,
    "dpm++2m-karras": partial(DPMSolverMultistepScheduler.from_config, use_karras_sigmas=True),
    "dpm++2m-sde": sde,
    "dpm++2m-sde-karras": partial(sde, use_karras_sigmas=True),
}

# The PSNR in dB that fp32 engines must reach.
FLOOR = 65.0


@dataclass
class Pair:
    """Our pipeline, and diffusers' on the same files."""

    ours: LcmPipeline
    theirs: DiffusionPipeline
    height: int
    width: int

    def psnr(self, prompt="a large red star on white", seed=7, **options) -> list[float]:
        drawn = self.ours.draw(Request(prompt, seed, **options)).pictures
        images = self.theirs(
            prompt,
            negative_prompt=options.get("negative_prompt"),
            num_inference_steps=options.get("steps", 4),
            guidance_scale=options.get("guidance_scale", 1.0),
            num_images_per_prompt=options.get("num_images", 1),
            generator=torch.Generator("cpu").manual_seed(seed),
            height=self.height,
            width=self.width,
            output_type="np",
        ).images
        images = eight_bits(images)
        assert drawn.shape == images.shape
        assert images.std() > 5
        return [psnr_db(a, b) for a, b in zip(images, drawn, strict=True)]


def least_psnr(ours, theirs, sampler, steps, scale, mine, others, **options) -> float:
    """The least PSNR in dB of two pictures of one seed, drawn by our pipeline and by diffusers'.

    `mine` and `others` are the options of each alone, `options` those of both.
    """
    theirs.scheduler = SCHEDULERS[sampler](theirs.scheduler.config)
    drawn = theirs(
        "a red star",
        num_inference_steps=steps,
        guidance_scale=scale,
        num_images_per_prompt=2,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
        **others,
        **options,
    ).images
    asked = {"sampler": sampler, "steps": steps, "guidance_scale": scale}
    found = ours("a red star", seed=7, num_images=2, **asked, **mine, **options)
    expected = eight_bits(drawn)
    assert expected.std() > 5
    return min(psnr_db(a, np.asarray(b)) for a, b in zip(expected, found, strict=True))


def reference(checkpoint):
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe
