"""Writes the files of a diffusers folder except the models: the index, the scheduler and the tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lcm_compile.checkpoint.checkpoint import SCHEDULER, Checkpoint, is_tiny
from lcm_compile.checkpoint.load import load_tokenizer, quiet_libraries


def write_settings(checkpoint: Checkpoint, folder: Path, lcm: bool) -> None:
    """Writes the settings of a checkpoint to a new folder.

    With `lcm`, the scheduler is LCMScheduler with the base's noise schedule. Raises CheckpointError if a
    tokenizer can't be read.
    """
    import diffusers

    folder.mkdir(exist_ok=True)
    for name in checkpoint.tokenizers:
        write_tokenizer(checkpoint, name, folder / name)
    kind = "LCMScheduler" if lcm else checkpoint.scheduler_config.get("_class_name", "PNDMScheduler")
    if lcm:
        with quiet_libraries():
            settings = checkpoint.scheduler.to_dict()
            diffusers.LCMScheduler(**settings).save_pretrained(folder / "scheduler")
    else:
        (folder / SCHEDULER).parent.mkdir()
        (folder / SCHEDULER).write_text(json.dumps(dict(checkpoint.scheduler_config), indent=2))
    index = {"_diffusers_version": diffusers.__version__, **index_of(checkpoint, kind)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def index_of(checkpoint: Checkpoint, scheduler: str) -> dict[str, Any]:
    """Returns the content of model_index.json: each component's library and class, and no safety checker."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny" if is_tiny(checkpoint.vae) else "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if checkpoint.architecture == "sd15":
        return {**index, "safety_checker": [None, None], "requires_safety_checker": False}
    return {
        **index,
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": checkpoint.zero_negative_prompt,
    }


def write_tokenizer(checkpoint: Checkpoint, name: str, to: Path) -> None:
    """Writes a tokenizer: the base's own files or, for random weights without any, the stand-in tokenizer."""
    if (checkpoint.folder / name).is_dir():
        shutil.copytree(checkpoint.folder / name, to)
        return
    tokenizer = load_tokenizer(checkpoint, name)
    to.mkdir()
    (to / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.max_length,
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    (to / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
