"""Makes the UNet of a complete LCM, which takes the guidance scale as an input, and writes its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lcm_compile.checkpoint.checkpoint import Checkpoint
from lcm_compile.checkpoint.empty_modules import empty_unet
from lcm_compile.checkpoint.load import load_component, quiet_libraries
from lcm_compile.checkpoint.write_folder import save_model, write_settings
from lcm_compile.system.files import replacing_output
from lcm_compile.training.loop import Weights, copy_of

GUIDANCE_WIDTH = 256  # length of the guidance scale's embedding, as in the published LCMs
GUIDANCE_WEIGHT = "time_embedding.cond_proj.weight"


def with_guidance(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a UNet's config with an input for the guidance embedding, which a full LCM's has already."""
    return {**config, "time_cond_proj_dim": config.get("time_cond_proj_dim") or GUIDANCE_WIDTH}


def student_of(teacher: Any) -> Any:
    """Returns a trainable copy of a UNet that also takes a guidance embedding.

    The weights of the new input are 0, so that before training the copy computes the same as the UNet.
    """
    student = empty_unet(with_guidance(teacher.config))
    weights = copy_of(teacher.state_dict())
    weights[GUIDANCE_WEIGHT] = torch.zeros(student.get_parameter(GUIDANCE_WEIGHT).shape)
    student.load_state_dict(weights, assign=True)
    return student.eval().requires_grad_(True)


def save_checkpoint(weights: Weights, checkpoint: Checkpoint, out: Path) -> None:
    """Writes a base as a diffusers folder, with the student's weights as its UNet and with LCMScheduler.

    The folder is written completely or not at all. Raises LcmCompileError if it can't be written.
    """
    with replacing_output(out) as partial, quiet_libraries():
        write_settings(checkpoint, partial, "lcm")
        unet = empty_unet(with_guidance(checkpoint.unet))
        unet.load_state_dict(weights, assign=True)
        save_model("unet", unet, partial / "unet")
        for name in ("vae", *checkpoint.text_encoders):
            save_model(name, load_component(checkpoint, name), partial / name)
