"""Writes a diffusers folder: its models, its index, its scheduler and its tokenizers.

Every version of diffusers and transformers since 2023 opens what is written here.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

from lcm_compile.checkpoint.checkpoint import (
    FUSED_FEW_STEP,
    SCHEDULER,
    TEXT_ENCODERS,
    Checkpoint,
    is_tiny,
)
from lcm_compile.checkpoint.load import load_tokenizer, quiet_libraries
from lcm_compile.samplers import SAMPLERS
from lcm_compile.scheduler import SchedulerSettings


def write_settings(
    checkpoint: Checkpoint, folder: Path, sampler: str | None, few_step: str | None = None
) -> None:
    """Writes the settings of a checkpoint to a new folder.

    The scheduler is that of a sampler, with the base's settings, or for None the base's own. `few_step` are
    the few-step weights that are fused. Raises CheckpointError if a tokenizer can't be read.
    """
    import diffusers

    folder.mkdir(exist_ok=True)
    for name in checkpoint.tokenizers:
        write_tokenizer(checkpoint, name, folder / name)
    kind = checkpoint.scheduler_config.get("_class_name", "PNDMScheduler")
    if sampler is not None:
        kind = SAMPLERS[sampler].scheduler
        with quiet_libraries():
            make_scheduler(sampler, checkpoint.scheduler).save_pretrained(folder / "scheduler")
        if few_step is not None:
            config = json.loads((folder / SCHEDULER).read_text())
            (folder / SCHEDULER).write_text(json.dumps({**config, FUSED_FEW_STEP: few_step}, indent=2))
    else:
        (folder / SCHEDULER).parent.mkdir()
        (folder / SCHEDULER).write_text(json.dumps(dict(checkpoint.scheduler_config), indent=2))
    index = {"_diffusers_version": diffusers.__version__, **index_of(checkpoint, kind)}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def make_scheduler(sampler: str, settings: SchedulerSettings) -> Any:
    """Returns diffusers' scheduler of a sampler, with these settings."""
    import diffusers

    chosen = SAMPLERS[sampler]
    scheduler = getattr(diffusers, chosen.scheduler)
    known = inspect.signature(scheduler).parameters
    values = {**settings.to_dict(), **chosen.options}
    return scheduler(**{name: value for name, value in values.items() if name in known and value is not None})


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


def save_model(name: str, module: Any, folder: Path) -> None:
    """Writes a model's config and weights to its folder in a checkpoint.

    A text encoder's keys begin with `text_model.`, as on the hub. transformers 5 saves the first encoder's
    without it, and transformers 4 finds no weights under such keys.
    """
    if name not in TEXT_ENCODERS:
        module.save_pretrained(folder)
        return
    outer = ("text_model.", "text_projection.")
    weights = {
        key if key.startswith(outer) else f"text_model.{key}": weight
        for key, weight in module.state_dict().items()
    }
    module.save_pretrained(folder, state_dict=weights)


def write_tokenizer(checkpoint: Checkpoint, name: str, to: Path) -> None:
    """Writes a tokenizer: the base's own files or, for random weights without any, the stand-in tokenizer.

    transformers 5 saves `tokenizer.json` alone. transformers 4 reads vocab.json and merges.txt, so these are
    written beside it.
    """
    if (checkpoint.folder / name).is_dir():
        shutil.copytree(checkpoint.folder / name, to)
    else:
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
    if checkpoint.embeddings:
        id_of = json.loads(load_tokenizer(checkpoint, name).json)["added_tokens"]
        added = {token["content"]: token["id"] for token in id_of}
        (to / "added_tokens.json").write_text(json.dumps(added, ensure_ascii=False), encoding="utf-8")
    if not (to / "vocab.json").exists():
        model = json.loads((to / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        # Old versions of the library write a merge as one string, new ones as a pair.
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        merges = "\n".join(["#version: 0.2", *pairs, ""])
        (to / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (to / "merges.txt").write_text(merges, encoding="utf-8")
