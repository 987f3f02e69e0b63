"""Finds and checks the settings and weight files of a diffusers folder. No weight is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_compile.checkpoint.checkpoint import MODELS, SCHEDULER, Component, is_inpainting
from lcm_compile.errors import CheckpointError
from lcm_compile.scheduler import SchedulerSettings

HINT = "give --base a folder written by diffusers' save_pretrained"
# The variants of weight files, in the order in which they are looked for. None is the one without a suffix.
Variants = Sequence[str | None]
FULL_FIRST: Variants = (None, "fp16")
HALF_FIRST: Variants = ("fp16", None)


@dataclass(frozen=True)
class Settings:
    """The settings of a diffusers folder: each model's config by name, the scheduler's config, and a flag.

    With `zero_negative_prompt`, a request without a negative prompt is conditioned on zeros in its place.
    `notes` are sentences for the user about what is not used.
    """

    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    zero_negative_prompt: bool
    notes: tuple[str, ...] = ()


def read_settings(folder: Path, unet: Mapping[str, Any] | None = None) -> Settings:
    """Returns the settings of a text-to-image pipeline's folder. `unet` replaces its UNet's config.

    Raises CheckpointError if a setting is missing or invalid.
    """
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is not a diffusers checkpoint: it has no model_index.json", HINT)
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
    kind, scheduler = str(index.get("_class_name")), read_json(folder / SCHEDULER)
    if kind.startswith("StableDiffusion") and not kind.startswith("StableDiffusionXL"):
        configs["unet"], scheduler = corrected(configs["unet"], scheduler)
    try:
        SchedulerSettings.from_dict(scheduler)
    except ValueError as error:
        raise CheckpointError(f"the LCM loop can't use {folder / SCHEDULER}: {error}", HINT) from error
    two = "text_encoder_2" in present
    zeros = two and bool(index.get("force_zeros_for_empty_prompt", True))
    checker = index.get("safety_checker")
    checked = isinstance(checker, list) and any(checker)
    notes = ("the base's safety checker is left out: no picture is checked",) if checked else ()
    return Settings(configs, scheduler, zeros, notes)


# The scheduler's settings that StableDiffusionPipeline corrects where a config has them.
CORRECTED = {"clip_sample": False, "steps_offset": 1}


def corrected(unet: Mapping[str, Any], scheduler: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the UNet's and the scheduler's configs as diffusers' StableDiffusionPipeline corrects them.

    Also, a sample size below 64 in a config that diffusers before 0.9 wrote becomes 64.
    StableDiffusionXLPipeline and LatentConsistencyModelPipeline correct nothing.
    """
    size, version = unet.get("sample_size"), re.match(r"0\.(\d+)", str(unet.get("_diffusers_version", "")))
    old = version is not None and int(version[1]) < 9
    sample_size = 64 if old and isinstance(size, int) and size < 64 else size
    own = {name: value for name, value in CORRECTED.items() if name in scheduler}
    return {**unet, "sample_size": sample_size}, {**scheduler, **own}


# The settings that the shapes in graphs depend on, each with the lengths that its list of positive integers
# may have. Length 0 means a plain integer. diffusers checks the other settings.
NEEDED: dict[str, dict[str, Sequence[int]]] = {
    "unet": {"in_channels": [0], "cross_attention_dim": [0], "sample_size": [0, 2]},
    "vae": {"latent_channels": [0], "block_out_channels": range(1, 9)},
    "text_encoder_2": {"projection_dim": [0]},
}

# The settings of a UNet that reads more than a prompt, a timestep and SDXL's size ids. A text-to-image base
# has none of them, except `addition_embed_type` for SDXL's size ids.
FOREIGN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "addition_embed_type")


def check_configs(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises CheckpointError if a setting is missing or invalid, or if the UNet is for another task."""
    for name in NEEDED.keys() & configs.keys():
        for key, lengths in NEEDED[name].items():
            value = configs[name].get(key)
            length, numbers = (len(value), value) if isinstance(value, list) else (0, [value])
            if length not in lengths or not all(type(n) is int and n > 0 for n in numbers):
                raise CheckpointError(
                    f"{folder / name}/config.json: {key} is {value!r}", f"correct {key}, or {HINT}"
                )
    scaling = configs["vae"].get("scaling_factor", 1)
    if type(scaling) not in (int, float) or not 0 < scaling < math.inf:
        raise CheckpointError(
            f"{folder / 'vae'}/config.json: scaling_factor is {scaling!r}",
            f"correct scaling_factor, or {HINT}",
        )
    foreign = [key for key in FOREIGN if configs["unet"].get(key) not in (None, "text_time")]
    if foreign:
        raise CheckpointError(
            f"{folder / 'unet'}/config.json: {foreign[0]} is {configs['unet'][foreign[0]]!r}, which no "
            "Stable Diffusion model has",
            "give a text-to-image base to --base",
        )
    takes, gives = configs["unet"]["in_channels"], configs["vae"]["latent_channels"]
    if takes != gives and not is_inpainting(configs["unet"], configs["vae"]):
        raise CheckpointError(
            f"{folder} does not draw from text alone: its unet takes {takes} channels, its vae gives {gives}",
            "give a text-to-image base to --base",
        )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises CheckpointError if it is missing or can't be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", "download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read: {error.strerror or error}", "check its permissions"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no whole JSON file: {error}", "download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object", f"correct it, or {HINT}")
    return data


def find_component(folder: Path, name: str, variants: Variants = FULL_FIRST) -> Component:
    """Returns the model in `folder`, with the weight files of the first variant that is there.

    Pickles are taken only if there are no safetensors files. Raises CheckpointError if there are no weights,
    or if shards are missing.
    """
    config = read_json(folder / "config.json")
    of_transformers = name.endswith("_encoder") or name.startswith("text_encoder")
    stem = "model" if of_transformers else "diffusion_pytorch_model"
    pickled = "pytorch_model" if of_transformers else stem
    for start, ending in ((stem, "safetensors"), (pickled, "bin")):
        for variant in variants:
            files = weight_files(folder, start, f".{variant}" if variant else "", ending)
            if files:
                return Component(name, config, files, variant, folder)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".ckpt", ".pt"))
    if others:
        raise CheckpointError(
            f"{folder} has weights only as {others[0]}, a pickle, which can run code and is never opened",
            "convert it: diffusers' save_pretrained(folder, safe_serialization=True)",
        )
    raise CheckpointError(
        f"{folder} has no weights (looked for {stem}.safetensors, {pickled}.bin, fp16 variants and shards)",
        "download the checkpoint again",
    )


def weight_files(folder: Path, stem: str, infix: str, ending: str) -> tuple[Path, ...]:
    """Returns one variant's weight files in a folder: one file, or an index with its shards. Empty if none.

    Raises CheckpointError if shards are missing.
    """
    single = folder / f"{stem}{infix}.{ending}"
    if single.is_file():
        return (single,)
    for shard_index in (f"{stem}.{ending}.index{infix}.json", f"{stem}{infix}.{ending}.index.json"):
        path = folder / shard_index
        if path.is_file():
            weight_map = read_json(path).get("weight_map")
            shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
            missing = [s for s in shards if not (folder / s).is_file()]
            if missing or not shards:
                raise CheckpointError(
                    f"{folder} lacks the weight files {', '.join(missing)}", "download the checkpoint again"
                )
            return (path, *(folder / s for s in shards))
    return ()


def needed_files(names: Iterable[str], variants: Variants, models: Iterable[str] = MODELS) -> list[str]:
    """Returns the files of a hub repository that are needed to open a base.

    `names` are all files of the repository. Of each model's weights, only the first variant that exists is
    returned, and pickles only if there is nothing else. The model "" means the repository's root: a UNet
    alone has its files there.
    """
    names = list(names)
    needed = [n for n in names if n == "model_index.json" or re.fullmatch(SETTINGS, n)]
    for model in models:
        place = f"{model}/" if model else ""
        inside = [n.removeprefix(place) for n in names if n.startswith(place)]
        weights = [n for n in inside if re.fullmatch(WEIGHTS, n)]
        weights = weights or [n for n in inside if re.fullmatch(PICKLED_WEIGHTS, n)]
        chosen = next((v for v in variants if any((".fp16" in n) == bool(v) for n in weights)), None)
        needed += [f"{place}{n}" for n in weights if (".fp16" in n) == bool(chosen)]
        needed += [f"{place}config.json"] if "config.json" in inside else []
    return needed


SETTINGS = r"scheduler/[^/]+\.json|tokenizer(_2)?/([^/]+\.json|merges\.txt)"
# What follows a weight file's stem: its variant, its number as a shard, its ending, or that of an index.
FILE = r"(\.fp16)?(-\d+-of-\d+)?\.{0}(\.index(\.fp16)?\.json)?"
WEIGHTS = rf"(model|diffusion_pytorch_model){FILE.format('safetensors')}"
PICKLED_WEIGHTS = rf"(pytorch_model|diffusion_pytorch_model){FILE.format('bin')}"
