"""The UNet of a whole LCM, which is told the guidance scale, and the checkpoint it is written as."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lcm_compile.checkpoint.checkpoint import Checkpoint
from lcm_compile.checkpoint.empty_modules import empty_unet
from lcm_compile.checkpoint.load import load_component, quiet_libraries
from lcm_compile.checkpoint.write_folder import write_settings
from lcm_compile.system.files import replacing_output
from lcm_compile.training.loop import Weights, copy_of

GUIDANCE_WIDTH = 256  # of the guidance scale's embedding, as in the published LCMs
GUIDANCE_WEIGHT = "time_embedding.cond_proj.weight"


def with_guidance(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "time_cond_proj_dim": GUIDANCE_WIDTH}


def student_of(teacher: Any) -> Any:
    """A copy of a UNet, to be trained, that takes a guidance embedding and starts by ignoring it."""
    student = empty_unet(with_guidance(teacher.config))
    weights = copy_of(teacher.state_dict())
    weights[GUIDANCE_WEIGHT] = torch.zeros(student.get_parameter(GUIDANCE_WEIGHT).shape)
    student.load_state_dict(weights, assign=True)
    return student.eval().requires_grad_(True)


def save_checkpoint(weights: Weights, checkpoint: Checkpoint, out: Path) -> None:
    """Writes a base with a student's weights as its UNet, a diffusers folder, whole or not at all."""
    with replacing_output(out) as part, quiet_libraries():
        write_settings(checkpoint, part, lcm=True)
        unet = empty_unet(with_guidance(checkpoint.unet))
        unet.load_state_dict(weights, assign=True)
        unet.save_pretrained(part / "unet")
        for name in ("vae", *checkpoint.text_encoders):
            copy_component(checkpoint, name, part / name)


def copy_component(checkpoint: Checkpoint, name: str, to: Path) -> None:
    """A model's config and the weights that were read, under their plain names."""
    component = checkpoint.components[name]
    if component.folder is None:
        module: Any = load_component(checkpoint, name)
        module.save_pretrained(to)
        return
    infix = f".{component.variant}" if component.variant else ""
    to.mkdir()
    for path in component.content_files():
        copy = to / path.name.replace(infix, "")
        if path.suffix == ".json":  # a list of shards names them
            copy.write_text(path.read_text(encoding="utf-8").replace(infix, ""), encoding="utf-8")
        else:
            shutil.copyfile(path, copy)
