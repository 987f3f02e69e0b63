"""Finds and opens a base: a diffusers folder, a single file or a UNet alone, on this machine or on the hub.

This needs no torch: `load` reads the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lcm_compile.checkpoint.checkpoint import MODELS, Checkpoint, Component
from lcm_compile.checkpoint.diffusers_folder import (
    FULL_FIRST,
    HALF_FIRST,
    Settings,
    Variants,
    find_component,
    needed_files,
    read_json,
    read_settings,
)
from lcm_compile.checkpoint.families import FAMILIES, detect_family
from lcm_compile.checkpoint.hub import REPOSITORY, fetch
from lcm_compile.checkpoint.single_file import open_file
from lcm_compile.errors import CheckpointError, UsageError, unknown_name
from lcm_compile.system.files import user_path

__all__ = ["Checkpoint", "Component", "check_size", "open_checkpoint"]

HUB_ID = re.compile(rf"(?P<repository>{REPOSITORY})(?:@(?P<revision>[\w./-]+))?")
FILE_ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")


def open_checkpoint(
    base: str, config: str | None = None, half: bool = False, own_vae: bool = True
) -> Checkpoint:
    """Returns a base with its settings, read and checked. Loads no weights.

    `config` is a diffusers folder with the settings and tokenizers for a base that is a single file. With
    `half`, fp16 weights are preferred on the hub. Without `own_vae`, the caller replaces the base's VAE,
    whose weights may then be missing. Raises UsageError if no base has this name, and CheckpointError if it
    can't be downloaded, or if its settings or files are missing or invalid.
    """
    path = locate(base, half)
    if path.is_file():
        return open_file(base, path, user_path(config) if config else None, own_vae)
    if config:
        raise UsageError(f"--config is for a base that is one file, and {base} is a folder", "drop --config")
    variants = variants_of(base, half)
    if is_unet_alone(path):
        return open_unet(base, path, variants)
    settings = read_settings(path)
    components = {
        name: find_component(path / name, name, variants)
        for name in settings.configs
        if own_vae or name != "vae"
    }
    components |= {n: Component(n, c) for n, c in settings.configs.items() if n not in components}
    return of_settings(base, path, settings, components)


def of_settings(
    base: str, folder: Path, settings: Settings, components: Mapping[str, Component]
) -> Checkpoint:
    """Returns the base of a folder's settings, whose configs hold for its components."""
    return Checkpoint(
        base,
        folder,
        detect_family(settings.configs["unet"]),
        {name: replace(components[name], config=config) for name, config in settings.configs.items()},
        settings.scheduler,
        settings.zero_negative_prompt,
        notes=settings.notes,
    )


def open_unet(base: str, folder: Path, variants: Variants) -> Checkpoint:
    """Returns the base made of a UNet and its family's other models.

    Raises CheckpointError if the UNet's family is unknown, or if the other models can't be had.
    """
    unet = find_component(folder, "unet", variants)
    family = detect_family(unet.config)
    if family is None:
        raise CheckpointError(
            f"{folder} is a UNet alone, and belongs to no family whose other models are known here",
            "give a complete checkpoint's folder to --base, with this UNet in it",
        )
    half = variants == HALF_FIRST
    others = [name for name in MODELS if name != "unet"]
    path = locate(family.others or family.base, half, others)
    settings = read_settings(path, unet.config)
    variants = variants_of(family.others or family.base, half)
    components = {
        name: unet if name == "unet" else find_component(path / name, name, variants)
        for name in settings.configs
    }
    return of_settings(base, path, settings, components)


def is_unet_alone(folder: Path) -> bool:
    """Returns whether a folder holds a UNet without other models."""
    config = folder / "config.json"
    return (
        not (folder / "model_index.json").exists()
        and config.is_file()
        and read_json(config).get("_class_name") == "UNet2DConditionModel"
    )


def variants_of(base: str, half: bool) -> Variants:
    """Returns the variants of weights to look for, in their order.

    With `half`, fp16 weights are preferred for a base on the hub, because they are half the download. A base
    on this machine is read as it is.
    """
    return HALF_FIRST if half and hub_id(base) else FULL_FIRST


def hub_id(base: str) -> tuple[str, str | None] | None:
    """Returns the hub repository and revision that a base names, or None if it is on this machine."""
    if base in FAMILIES:
        base = FAMILIES[base].base
    match = HUB_ID.fullmatch(base)
    if match is None or user_path(base).exists() or base.endswith(FILE_ENDINGS):
        return None
    return match["repository"], match["revision"]


def same_base(one: str, other: str) -> bool:
    """Returns whether two values of --base mean the same one: the same hub id, or the same file or folder."""
    if one == other:
        return True
    if hub_id(one) or hub_id(other):
        return hub_id(one) == hub_id(other)
    paths = [Path(FAMILIES[base].base) if base in FAMILIES else user_path(base) for base in (one, other)]
    try:
        return paths[0].samefile(paths[1])
    except OSError:
        return False


def locate(base: str, half: bool = False, models: Iterable[str] = (*MODELS, "")) -> Path:
    """Returns the file or folder of a base: a path, the demo's, or a hub snapshot, downloaded if needed.

    `models` are the models that are downloaded. Raises UsageError if no base has this name, and
    CheckpointError if it can't be downloaded.
    """
    if hub := hub_id(base):
        variants = variants_of(base, half)
        return download(base, *hub, variants, models)
    path = Path(FAMILIES[base].base) if base in FAMILIES else user_path(base)
    if not path.exists():
        raise unknown_name(
            "base", base, FAMILIES, "give a family name, a diffusers folder, a file or a hub id"
        )
    return path


def download(
    base: str, repository: str, revision: str | None, variants: Variants, models: Iterable[str]
) -> Path:
    """Returns the folder of a hub snapshot. Raises CheckpointError if neither hub nor cache has it."""
    try:
        return fetch(repository, lambda names: needed_files(names, variants, models), revision)
    except ConnectionError as error:
        here = f", as ./{base} if it is here" if base in FAMILIES else ""
        what = repository if base in FAMILIES else f"{base}, which is no path here,"
        raise CheckpointError(
            f"the checkpoint {what} is not in the hub cache and can't be downloaded: {error}",
            f"check the network (or HF_HOME, HF_TOKEN), or give a diffusers folder to --base{here}",
        ) from error


def check_size(checkpoint: Checkpoint, height: int, width: int) -> None:
    """Raises UsageError if a side, in pixels, is not a multiple of the VAE's factor."""
    for name, side in (("height", height), ("width", width)):
        if side % checkpoint.vae_factor:
            raise UsageError(f"{name} {side} is not a multiple of {checkpoint.vae_factor}, this VAE's factor")
