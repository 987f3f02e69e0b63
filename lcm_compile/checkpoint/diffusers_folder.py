"""A diffusers folder's settings and weight files, found and checked; no weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_compile.checkpoint.checkpoint import MODELS, SCHEDULER, Component
from lcm_compile.errors import CheckpointError
from lcm_compile.scheduler import SchedulerSettings

HINT = "give --base a folder written by diffusers' save_pretrained"
Variants = Sequence[str | None]
FULL_FIRST: Variants = (None, "fp16")
HALF_FIRST: Variants = ("fp16", None)


@dataclass(frozen=True)
class Settings:
    """What a diffusers folder says of its pipeline: its models' configs, by name, and the rest."""

    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    zero_negative_prompt: bool


def read_settings(folder: Path, unet: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a text-to-image pipeline's folder, or those with another `unet` in its place.

    CheckpointError names what is missing or senseless.
    """
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is no diffusers checkpoint: it has no model_index.json", HINT)
    index = read_json(folder / "model_index.json")
    present = [name for name in MODELS if isinstance(index.get(name), list) and any(index[name])]
    for name in ("text_encoder", "unet", "vae"):
        if name not in present:
            kind = index.get("_class_name", "an unknown pipeline")
            raise CheckpointError(f"{folder} ({kind}) has no {name}; a Stable Diffusion base needs one", HINT)
    for name in present:
        tokenizer = name.replace("text_encoder", "tokenizer")
        if name.startswith("text_encoder") and not (folder / tokenizer).is_dir():
            raise CheckpointError(f"{folder} has no {tokenizer} folder", HINT)
    configs = {
        name: unet if unet and name == "unet" else read_json(folder / name / "config.json")
        for name in present
    }
    check_configs(folder, configs)
    scheduler = read_json(folder / SCHEDULER)
    try:
        SchedulerSettings.from_dict(scheduler)
    except ValueError as error:
        raise CheckpointError(f"the LCM loop can't use {folder / SCHEDULER}: {error}", HINT) from error
    two = "text_encoder_2" in present
    return Settings(configs, scheduler, two and bool(index.get("force_zeros_for_empty_prompt", True)))


# The settings that graphs are shaped by, and how many whole numbers each may list, 0 for a plain number;
# diffusers checks the others.
NEEDED: dict[str, dict[str, Sequence[int]]] = {
    "unet": {"in_channels": [0], "cross_attention_dim": [0], "sample_size": [0, 2]},
    "vae": {"latent_channels": [0], "block_out_channels": range(1, 9)},
    "text_encoder_2": {"projection_dim": [0]},
}

# What a UNet is told by besides a prompt, a timestep and SDXL's size ids; in text-to-image bases, by nothing.
FOREIGN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "addition_embed_type")


def check_configs(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """CheckpointError for a setting that is missing or senseless, or a UNet that is for another task."""
    for name in NEEDED.keys() & configs.keys():
        for key, lengths in NEEDED[name].items():
            value = configs[name].get(key)
            length, numbers = (len(value), value) if isinstance(value, list) else (0, [value])
            if length not in lengths or not all(type(n) is int and n > 0 for n in numbers):
                raise CheckpointError(
                    f"{folder / name}/config.json: {key} is {value!r}", "download the checkpoint again"
                )
    foreign = [key for key in FOREIGN if configs["unet"].get(key) not in (None, "text_time")]
    if foreign:
        raise CheckpointError(
            f"{folder / 'unet'}/config.json: {foreign[0]} is {configs['unet'][foreign[0]]!r}, which no "
            "Stable Diffusion has",
            "give a text-to-image base to --base",
        )
    takes, gives = configs["unet"]["in_channels"], configs["vae"]["latent_channels"]
    if takes != gives:
        raise CheckpointError(
            f"{folder} does not draw from text alone: its unet takes {takes} channels, its vae gives {gives}",
            "give a text-to-image base to --base",
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", "download the checkpoint again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}", "download the checkpoint again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object", "download the checkpoint again")
    return data


def find_component(folder: Path, name: str, variants: Variants = FULL_FIRST) -> Component:
    """The weight files of the model in `folder`, of the first variant that is there."""
    config = read_json(folder / "config.json")
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    for variant in variants:
        infix = f".{variant}" if variant else ""
        single = folder / f"{stem}{infix}.safetensors"
        if single.is_file():
            return Component(name, config, (single,), variant, folder)
        for shard_index in (f"{stem}.safetensors.index{infix}.json", f"{stem}{infix}.safetensors.index.json"):
            path = folder / shard_index
            if path.is_file():
                weight_map = read_json(path).get("weight_map")
                shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
                missing = [s for s in shards if not (folder / s).is_file()]
                if missing or not shards:
                    raise CheckpointError(
                        f"{folder} lacks the weight files {', '.join(missing)}",
                        "download the checkpoint again",
                    )
                return Component(name, config, (path, *(folder / s for s in shards)), variant, folder)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".ckpt", ".pt"))
    if pickles:
        raise CheckpointError(
            f"{folder} has weights only as a pickle ({pickles[0]}), which is never opened",
            "convert it: diffusers' save_pretrained(folder, safe_serialization=True)",
        )
    raise CheckpointError(
        f"{folder} has no weights (looked for {stem}.safetensors, its fp16 variant and shards)",
        "download the checkpoint again",
    )


def needed_files(names: Iterable[str], variants: Variants, models: Iterable[str] = MODELS) -> list[str]:
    """Those of a hub repository's files that a base is opened from: of each model's weights one variant.

    For a repository that is a UNet alone, give the model "".
    """
    names = list(names)
    needed = [n for n in names if n == "model_index.json" or re.fullmatch(SETTINGS, n)]
    for model in models:
        place = f"{model}/" if model else ""
        inside = [n.removeprefix(place) for n in names if n.startswith(place)]
        weights = [n for n in inside if re.fullmatch(WEIGHTS, n)]
        chosen = next((v for v in variants if any((".fp16" in n) == bool(v) for n in weights)), None)
        needed += [f"{place}{n}" for n in weights if (".fp16" in n) == bool(chosen)]
        needed += [f"{place}config.json"] if "config.json" in inside else []
    return needed


SETTINGS = r"scheduler/[^/]+\.json|tokenizer(_2)?/([^/]+\.json|merges\.txt)"
WEIGHTS = r"(model|diffusion_pytorch_model)(\.fp16)?(-\d+-of-\d+)?\.safetensors(\.index(\.fp16)?\.json)?"
