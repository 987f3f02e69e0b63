"""Short trainings that the tests share."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from lcm_compile.training import distill
from lcm_compile.training.distill import DistillSpec

PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}


def write_pictures(folder: Path, count: int, captions: bool = True) -> Path:
    """Plain pictures of as many reds, called `picture 0` and so on."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 30), (10 * i, 0, 0)).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text(f"picture {i}\n")
    return folder


def settings_for(base, **changes) -> DistillSpec:
    values = {"steps": 3, "rank": 2, "batch": 2, "lr": 1e-2, "data": "demo", "seed": 3}
    return DistillSpec(str(base), **{**values, **changes})


def losses_of(spec: DistillSpec, out: Path, resume: bool = False) -> list[float]:
    return [progress.loss for progress in distill.distill(spec, out, resume)]
