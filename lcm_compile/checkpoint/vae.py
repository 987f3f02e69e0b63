"""Replaces the base's VAE: with one that the user names, a tiny autoencoder, or the family's VAE for fp16."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component, factor_of, is_tiny
from lcm_compile.checkpoint.configs import TAESD
from lcm_compile.checkpoint.diffusers_folder import FULL_FIRST, HALF_FIRST, find_component, needed_files
from lcm_compile.checkpoint.find import hub_id
from lcm_compile.checkpoint.hub import fetch, from_cache
from lcm_compile.checkpoint.single_file import VAE, refuse_pickle, under
from lcm_compile.checkpoint.weight_files import read_header
from lcm_compile.errors import CheckpointError, UsageError
from lcm_compile.system.files import user_path

SCALING = 0.18215  # diffusers' default
# `--vae taesd` takes one of these by the factor that scales the base's latents: each kind of VAE has its own.
TINY = "taesd"
TINY_VAES = {0.18215: "madebyollin/taesd", 0.13025: "madebyollin/taesdxl"}


def with_vae(checkpoint: Checkpoint, vae: str, half: bool) -> Checkpoint:
    """Returns the checkpoint with another VAE.

    `vae` is `taesd`, a hub id, the diffusers folder of a VAE or of a checkpoint, or a file. With `half`, fp16
    weights are preferred on the hub. Raises UsageError if no VAE has this name, and CheckpointError if it
    can't be downloaded or read, or if its latents are not the base's.
    """
    if vae == TINY:
        vae = published_tiny(checkpoint)
        if checkpoint.random_seed is not None:
            return replaced(checkpoint, Component("vae", TAESD), vae)
    path = user_path(vae)
    variants = FULL_FIRST
    if hub := hub_id(vae):
        if hub[0] in TINY_VAES.values() and hub[0] != published_tiny(checkpoint):
            message = f"the VAE {vae} is for other latents than those of {checkpoint.base}"
            raise CheckpointError(message, f"--vae {TINY} takes the right one")
        variants = HALF_FIRST if half else FULL_FIRST
        try:
            path = fetch(hub[0], lambda names: needed_files(names, variants, ("vae", "")), hub[1])
        except ConnectionError as error:
            raise CheckpointError(
                f"the VAE {vae} is neither a path nor in the hub cache, and can't be downloaded: {error}",
                "check the network (or HF_HOME, HF_TOKEN), or give a folder or a file to --vae",
            ) from error
    if path.is_file():
        return replaced(checkpoint, vae_in_file(path, checkpoint.vae), vae)
    if not path.is_dir():
        raise UsageError(f"--vae {vae} does not exist", "give a hub id, a diffusers folder or a file")
    folder = path / "vae" if (path / "vae").is_dir() else path
    return replaced(checkpoint, find_component(folder, "vae", variants), vae)


def published_tiny(checkpoint: Checkpoint) -> str:
    """Returns the hub id of the tiny autoencoder for a base's latents. Raises UsageError if none is known."""
    channels, factor, scaling = latents(checkpoint.vae)
    plain = (channels, factor) == (4, 8) and not checkpoint.vae.get("latents_mean")
    if not plain or scaling not in TINY_VAES:
        raise UsageError(
            f"no tiny autoencoder is known for the latents of {checkpoint.base}",
            "give an AutoencoderTiny made for them to --vae: a hub id or a folder",
        )
    return TINY_VAES[scaling]


def vae_in_file(path: Path, config: Mapping[str, Any]) -> Component:
    """Returns a VAE from its own file or from a complete checkpoint's.

    `config` is the base's own, because a file has no settings. Raises CheckpointError if the file has no VAE,
    or if it is a tiny autoencoder's.
    """
    refuse_pickle(path)
    keys, _ = read_header(path)
    prefix = VAE if under(VAE, keys) else ""
    if not under(f"{prefix}decoder.", keys):
        raise CheckpointError(f"{path} has no VAE: no key begins with decoder.", "give a VAE to --vae")
    if under(f"{prefix}decoder.layers.", keys):
        raise CheckpointError(
            f"{path} is a tiny autoencoder's file, which does not hold its settings",
            "give its folder, with config.json, to --vae",
        )
    return Component("vae", config, (path,), prefix=prefix)


def replaced(checkpoint: Checkpoint, vae: Component, name: str) -> Checkpoint:
    """Returns the checkpoint with `vae` in place of its own. `name` is the VAE's name in the error.

    A tiny autoencoder decodes latents as the UNet computes them, without scaling, so the base's scaling
    factor does not matter. Raises CheckpointError if the VAE's latents are not the base's.
    """
    own, other = latents(checkpoint.vae), latents(vae.config)
    tiny = is_tiny(checkpoint.vae) or is_tiny(vae.config)
    if own[:2] != other[:2] or (own != other and not tiny):
        text = "latents of {} channels, each of {} pixels a side, scaled by {}"
        raise CheckpointError(
            f"the VAE {name} is for another base: it has {text.format(*other)}, the base {text.format(*own)}",
            "give a VAE made for this base to --vae",
        )
    return replace(checkpoint, components={**checkpoint.components, "vae": vae})


def latents(vae: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the channels of a VAE's latents, how many pixels each is on a side, and the scaling factor."""
    return vae.get("latent_channels"), factor_of(vae), vae.get("scaling_factor", SCALING)


def overflows(checkpoint: Checkpoint) -> bool:
    """Returns whether the VAE is taken to overflow fp16. Nothing is measured.

    It is if its family has a VAE for fp16, and `force_upcast` in its config is true or missing: diffusers
    then computes it in fp32.
    """
    own = checkpoint.components["vae"].files and not is_tiny(checkpoint.vae)
    has_other = checkpoint.family is not None and checkpoint.family.fp16_vae is not None
    return bool(own and has_other and checkpoint.vae.get("force_upcast", True))


def with_fp16_vae(checkpoint: Checkpoint) -> Checkpoint | None:
    """Returns the checkpoint with the family's VAE for fp16, or None if that is not in the hub cache."""
    name = fp16_vae(checkpoint)
    try:
        vae = find_component(from_cache(name), "vae")
    except Exception:  # the client raises what its HTTP library does
        return None
    note = (
        f"the {family_name(checkpoint)} VAE overflows fp16: {name} is built in its place; --vae names another"
    )
    return replace(replaced(checkpoint, vae, name), notes=(*checkpoint.notes, note))


@functools.cache
def download_vae(name: str) -> str | None:
    """Puts a VAE into the hub cache. Returns why that failed, or None. An unreachable hub is tried once."""
    try:
        fetch(name, ["config.json", "diffusion_pytorch_model.safetensors"])
    except ConnectionError as error:
        return str(error)
    return None


def with_own_vae(checkpoint: Checkpoint, reason: str) -> Checkpoint:
    """Returns the checkpoint unchanged but for a note: its VAE overflows, and why there is no other."""
    name = fp16_vae(checkpoint)
    what = f"the {family_name(checkpoint)} VAE overflows fp16, and {name} can't be downloaded ({reason})"
    note = f"{what}: the base's own is built, and its layers that overflow stay fp32"
    return replace(checkpoint, notes=(*checkpoint.notes, note))


def fp16_vae(checkpoint: Checkpoint) -> str:
    """Returns the hub id of the family's VAE for fp16. Only for a checkpoint that `overflows`."""
    assert checkpoint.family and checkpoint.family.fp16_vae
    return checkpoint.family.fp16_vae


def family_name(checkpoint: Checkpoint) -> str:
    """Returns the family's name in messages. Only for a checkpoint that `overflows`."""
    assert checkpoint.family
    return checkpoint.family.short
