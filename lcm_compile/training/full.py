"""The UNet of a whole LCM, which is told the guidance scale, and the checkpoint it is written as."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lcm_compile.components import Checkpoint
from lcm_compile.folders import read_json
from lcm_compile.loading import quiet_libraries
from lcm_compile.training.files import replacing
from lcm_compile.training.loop import Weights, copy_of

GUIDANCE_WIDTH = 256  # of the guidance scale's embedding, as in the published LCMs
GUIDANCE_WEIGHT = "time_embedding.cond_proj.weight"


def empty_unet(config: Mapping[str, Any]) -> Any:
    """A UNet of shapes without weights, on torch's meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"), quiet_libraries():
        return UNet2DConditionModel.from_config(config)


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
    from diffusers import LCMScheduler

    index = read_json(checkpoint.folder / "model_index.json")
    with replacing(out) as part, quiet_libraries():
        unet = empty_unet(with_guidance(checkpoint.unet))
        unet.load_state_dict(weights, assign=True)
        unet.save_pretrained(part / "unet")
        LCMScheduler(**checkpoint.scheduler.to_dict()).save_pretrained(part / "scheduler")
        kept = ("unet", "vae", *checkpoint.text_encoders, *checkpoint.tokenizers)
        for name in kept[1:]:
            copy_component(checkpoint, name, part / name)
        parts = {name: kind if name in kept else [None, None] for name, kind in components(index).items()}
        # Without its safety checker, which the base may have lacked as well.
        more = {"requires_safety_checker": False} if "safety_checker" in parts else {}
        index = {**index, **parts, **more, "scheduler": ["diffusers", "LCMScheduler"]}
        (part / "model_index.json").write_text(json.dumps(index, indent=2))


def components(index: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in index.items() if isinstance(kind, list) and len(kind) == 2}


def copy_component(checkpoint: Checkpoint, name: str, to: Path) -> None:
    """A tokenizer's files, or a model's config and the weights that were read, under their plain names."""
    if name in checkpoint.tokenizers:
        shutil.copytree(checkpoint.folder / name, to)
        return
    component = checkpoint.components[name]
    infix = f".{component.variant}" if component.variant else ""
    to.mkdir()
    for path in (checkpoint.folder / name / "config.json", *component.files):
        copy = to / path.name.replace(infix, "")
        if path.suffix == ".json":  # a list of shards names them
            copy.write_text(path.read_text(encoding="utf-8").replace(infix, ""), encoding="utf-8")
        else:
            shutil.copyfile(path, copy)
