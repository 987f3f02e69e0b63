"""A base model: a diffusers folder, found and checked. No torch: `loading` reads the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_compile.errors import CheckpointError, UsageError, unknown_name
from lcm_compile.families import FAMILIES, Family, detect_family
from lcm_compile.hub import fetch
from lcm_compile.scheduler import SchedulerSettings
from lcm_compile.spec import user_path

HUB_FILES = ["model_index.json", "*/*.json", "*/merges.txt", "*/*.safetensors"]


@dataclass(frozen=True)
class Component:
    """One model of a checkpoint: its config and the weight files that are read, with their variant."""

    name: str
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    variant: str | None


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder of SDXL's architecture (two text encoders) or SD1.5's (one).

    With a `random_seed` only its tokenizers are in the folder, if it is there at all: see random_base.
    """

    base: str
    folder: Path
    family: Family | None
    components: Mapping[str, Component]
    scheduler: SchedulerSettings
    zero_negative_prompt: bool
    random_seed: int | None = None

    @property
    def text_encoders(self) -> list[str]:
        return [name for name in ("text_encoder", "text_encoder_2") if name in self.components]

    @property
    def tokenizers(self) -> list[str]:
        return [name.replace("text_encoder", "tokenizer") for name in self.text_encoders]

    def text_length(self, text_encoder: str) -> int:
        """Tokens of a padded prompt."""
        return int(self.components[text_encoder].config.get("max_position_embeddings", 77))

    @property
    def architecture(self) -> str:
        return "sdxl" if "text_encoder_2" in self.components else "sd15"

    @property
    def unet(self) -> Mapping[str, Any]:
        return self.components["unet"].config

    @property
    def vae(self) -> Mapping[str, Any]:
        return self.components["vae"].config

    @property
    def vae_factor(self) -> int:
        """Picture pixels to a latent's, a side."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def default_size(self) -> tuple[int, int]:
        size = self.unet["sample_size"]
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return height * self.vae_factor, width * self.vae_factor

    @property
    def has_guidance_embedding(self) -> bool:
        """Whether the UNet is a full LCM, which takes the guidance scale as an input."""
        return self.unet.get("time_cond_proj_dim") is not None

    @property
    def weight_bytes(self) -> int:
        """Of its files; 0 for random weights."""
        return sum(path.stat().st_size for c in self.components.values() for path in c.files)

    def tokenizer_files(self) -> list[Path]:
        folders = [self.folder / name for name in self.tokenizers if (self.folder / name).is_dir()]
        return [p for folder in folders for p in sorted(folder.iterdir()) if p.suffix in (".json", ".txt")]

    def content_files(self) -> list[Path]:
        """Every file that decides what the built engines compute and how prompts are read."""
        if self.random_seed is not None:
            return self.tokenizer_files()
        files = [self.folder / "model_index.json", self.folder / "scheduler" / "scheduler_config.json"]
        for component in self.components.values():
            files += [self.folder / component.name / "config.json", *component.files]
        return [*files, *self.tokenizer_files()]

    def content(self, sha256: Callable[[Path], str]) -> dict[str, str]:
        """All that decides what is computed, by name, as digests: for keys."""
        content = {p.relative_to(self.folder).as_posix(): sha256(p) for p in self.content_files()}
        if self.random_seed is not None:
            configs = json.dumps({c.name: c.config for c in self.components.values()}, sort_keys=True)
            content["configs"] = hashlib.sha256(configs.encode()).hexdigest()
            content["weights"] = f"random, seed {self.random_seed}"
        return content


def find_base(base: str) -> Path:
    """The folder of a base: a path, the demo, or a family's hub snapshot (downloaded when it is missing).

    UsageError for a name that is neither a path nor a family; CheckpointError when the hub can't be had.
    """
    if base in FAMILIES:
        family = FAMILIES[base]
        return Path(family.base) if base == "demo" else download_base(family)
    path = user_path(base)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{base} is a file; a base is a diffusers folder", "give the folder that holds model_index.json"
        )
    raise unknown_name("base", base, FAMILIES, "give a family name or a diffusers folder to --base")


def download_base(family: Family) -> Path:
    try:
        return fetch(family.base, HUB_FILES)
    except ConnectionError as error:
        raise CheckpointError(
            f"the checkpoint {family.base} is not in the hub cache and can't be downloaded: {error}",
            "check the network (or HF_HOME, HF_TOKEN), or give a diffusers folder to --base, "
            f"as ./{family.name} if it is here",
        ) from error


def open_checkpoint(base: str) -> Checkpoint:
    """Reads and checks a base's configs; loads no weights. CheckpointError names what is missing."""
    folder = find_base(base)
    hint = "give --base a folder written by diffusers' save_pretrained"
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is no diffusers checkpoint: it has no model_index.json", hint)
    index = read_json(folder / "model_index.json")
    present = [
        name
        for name in ("text_encoder", "text_encoder_2", "unet", "vae")
        if isinstance(index.get(name), list) and any(index[name])
    ]
    for name in ("text_encoder", "unet", "vae"):
        if name not in present:
            kind = index.get("_class_name", "an unknown pipeline")
            raise CheckpointError(f"{folder} ({kind}) has no {name}; a Stable Diffusion base needs one", hint)
    components = {name: find_component(folder, name) for name in present}
    for name in present:
        tokenizer = name.replace("text_encoder", "tokenizer")
        if name.startswith("text_encoder") and not (folder / tokenizer).is_dir():
            raise CheckpointError(f"{folder} has no {tokenizer} folder", hint)
    check_configs(folder, {name: component.config for name, component in components.items()})
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        scheduler = SchedulerSettings.from_dict(config)
    except ValueError as error:
        raise CheckpointError(
            f"the LCM loop can't use {folder}/scheduler/scheduler_config.json: {error}", hint
        ) from error
    family = detect_family(components["unet"].config)
    zero = bool(index.get("force_zeros_for_empty_prompt", "text_encoder_2" in present))
    return Checkpoint(base, folder, family, components, scheduler, zero and "text_encoder_2" in present)


# The settings that graphs are shaped by, and how many whole numbers each may list, 0 for a plain number;
# diffusers checks the others.
NEEDED: dict[str, dict[str, Sequence[int]]] = {
    "unet": {"in_channels": [0], "cross_attention_dim": [0], "sample_size": [0, 2]},
    "vae": {"latent_channels": [0], "block_out_channels": range(1, 9)},
    "text_encoder_2": {"projection_dim": [0]},
}


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


def find_component(folder: Path, name: str) -> Component:
    """The config and the weight files of `folder/name`: full precision first, then the fp16 variant."""
    config = read_json(folder / name / "config.json")
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    for variant in (None, "fp16"):
        infix = f".{variant}" if variant else ""
        single = folder / name / f"{stem}{infix}.safetensors"
        if single.is_file():
            return Component(name, config, (single,), variant)
        for shard_index in (f"{stem}.safetensors.index{infix}.json", f"{stem}{infix}.safetensors.index.json"):
            path = folder / name / shard_index
            if path.is_file():
                weight_map = read_json(path).get("weight_map")
                shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
                missing = [s for s in shards if not (folder / name / s).is_file()]
                if missing or not shards:
                    raise CheckpointError(
                        f"{folder / name} lacks the weight files {', '.join(missing)}",
                        "download the checkpoint again",
                    )
                return Component(name, config, (path, *(folder / name / s for s in shards)), variant)
    pickles = sorted(p.name for p in (folder / name).iterdir() if p.suffix in (".bin", ".ckpt", ".pt"))
    if pickles:
        raise CheckpointError(
            f"{folder / name} has weights only as a pickle ({pickles[0]}), which is never opened",
            "convert it: diffusers' save_pretrained(folder, safe_serialization=True)",
        )
    raise CheckpointError(
        f"{folder / name} has no weights (looked for {stem}.safetensors, its fp16 variant and shards)",
        "download the checkpoint again",
    )


def check_size(checkpoint: Checkpoint, height: int, width: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side % checkpoint.vae_factor:
            raise UsageError(f"{name} {side} is not a multiple of {checkpoint.vae_factor}, this VAE's factor")
