"""Finds the T2I-Adapters that are added to a base, and checks that they fit it. Needs no torch.

A T2I-Adapter (Mou et al. 2023, arXiv 2302.08453) is a small network that reads a picture once, and gives a
feature for each block of the UNet's first half, which is added there in every step. It is a diffusers folder,
or a file (safetensors, or a pickle of weights) under diffusers' names or the original's. What a file's
settings are is shown by its shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component
from lcm_compile.checkpoint.diffusers_folder import find_component
from lcm_compile.checkpoint.source import locate_model
from lcm_compile.checkpoint.weight_files import Shapes, read_header
from lcm_compile.errors import CheckpointError, UsageError, first_few
from lcm_compile.graphs import T2I_ADAPTERS

CLASS = "T2IAdapter"
FULL, FULL_XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
# diffusers' defaults.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3,
    "channels": (320, 640, 1280, 1280),
    "num_res_blocks": 2,
    "downscale_factor": 8,
    "adapter_type": FULL,
}
# What is said of files whose keys hold one of these, and which are no adapter that is read.
OTHERS = {
    "task_embedding": "the fuser of CoAdapters",
    "style_embedding": "a style adapter, which changes the prompt's states",
    "down_opt.op.weight": "an adapter of the first version, whose downsampling has weights",
    "skep.weight": "an adapter of the first version, whose shortcuts have weights",
}
HINT = "give a T2I-Adapter's diffusers folder or file to --t2i-adapter"
Size = tuple[int, int, int]  # channels, height and width
Value = TypeVar("Value")


def adapters_of(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of a checkpoint's T2I-Adapters, which are those of their stages."""
    return [name for name in T2I_ADAPTERS if name in checkpoint.components]


def with_t2i_adapters(checkpoint: Checkpoint, sources: Sequence[str], half: bool) -> Checkpoint:
    """Returns the checkpoint with T2I-Adapters, as its components `t2i-adapter`, `t2i-adapter-2` and so on.

    A source is a diffusers folder, a file, a hub id or a file of one. With `half`, fp16 weights are preferred
    on the hub. Raises UsageError if no adapter has this name, and CheckpointError if it can't be downloaded
    or read, or if it does not fit the base.
    """
    components = dict(checkpoint.components)
    for name, source in zip(T2I_ADAPTERS, sources, strict=False):
        path, variants = locate_model(source, "T2I-Adapter", "--t2i-adapter", half)
        if path.is_file():
            component = adapter_in_file(path, name)
        else:
            component = find_component(path, name, variants)
            if (kind := component.config.get("_class_name", CLASS)) != CLASS:
                raise CheckpointError(f"{path} is a {kind}, and a {CLASS} is needed", HINT)
        check_fit(component, source, checkpoint)
        components[name] = component
    return replace(checkpoint, components=components)


def adapter_in_file(path: Path, name: str) -> Component:
    """Returns the T2I-Adapter in a file as the component `name`.

    Raises CheckpointError if the file holds no adapter, or one of a kind that is not read.
    """
    shapes, _ = read_header(path)
    for part, kind in OTHERS.items():
        if any(part in key for key in shapes):
            raise CheckpointError(f"{path} is {kind}, and is not read", HINT)
    if not is_adapter(shapes):
        raise CheckpointError(f"{path} is no T2I-Adapter (it has {first_few([*shapes])})", HINT)
    return Component(name, {"_class_name": CLASS, **shown_by(shapes)}, (path,))


def is_adapter(shapes: Shapes) -> bool:
    """Returns whether a file's keys are a T2I-Adapter's."""
    return any(key.startswith("adapter.body.0.") for key in todays_names(shapes))


def todays_names(named: Mapping[str, Value]) -> dict[str, Value]:
    """Returns what is named after an adapter's weights, under diffusers' names.

    The original numbers the residual blocks of a full adapter in one sequence, two for each feature, and puts
    the convolution that widens a feature into the first of the two.
    """
    light = "body.0.out_conv.weight" in named

    def today(key: str) -> str:
        number = re.fullmatch(r"body\.(\d+)\.(.*)", key)
        if not number or light:
            key = re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", key)
        else:
            (block, place), rest = divmod(int(number[1]), 2), number[2]
            rest = rest if rest.startswith("in_conv.") else f"resnets.{place}.{rest}"
            key = f"body.{block}.{rest}"
        return f"adapter.{key}"

    return {key if key.startswith("adapter.") else today(key): value for key, value in named.items()}


def shown_by(shapes: Shapes) -> dict[str, Any]:
    """Returns the settings that a file's shapes show.

    An adapter's first layer takes f·f pixels of each channel of the picture. The published ones read 1 or 3
    channels, with an f of 8, and of 16 for SDXL.
    """
    shapes = todays_names(shapes)
    blocks = sorted({int(key.split(".")[2]) for key in shapes if key.startswith("adapter.body.")})
    resnets = {key.split(".")[4] for key in shapes if key.startswith("adapter.body.0.resnets.")}
    light = "adapter.body.0.out_conv.weight" in shapes
    last = "out_conv" if light else "resnets.0.block1"
    widths = [shapes.get(f"adapter.body.{n}.{last}.weight", (0,))[0] for n in blocks]
    first = shapes.get(f"adapter.{'body.0.in_conv' if light else 'conv_in'}.weight", (0, 0))[1]
    factor = 16 if first in (16 * 16, 3 * 16 * 16) else 8
    return {
        "in_channels": first // factor**2,
        "channels": widths[:-1] if light else widths,
        "num_res_blocks": len(resnets),
        "downscale_factor": factor,
        "adapter_type": LIGHT if light else FULL_XL if factor == 16 else FULL,
    }


def setting(component: Component, name: str) -> Any:
    """Returns a setting of an adapter, or diffusers' default."""
    return component.config.get(name, DEFAULTS[name])


def feature_sizes(component: Component, height: int, width: int) -> list[Size]:
    """Returns the sizes of an adapter's features for a picture of this height and width in pixels."""
    kind, channels = setting(component, "adapter_type"), [*setting(component, "channels")]
    factor = setting(component, "downscale_factor")
    height, width = height // factor, width // factor
    sizes = []
    for i, own in enumerate(channels + channels[-1:] if kind == LIGHT else channels):
        if i == 2 if kind == FULL_XL else i > 0:
            height, width = -(-height // 2), -(-width // 2)
        sizes.append((own, height, width))
    return sizes


def places_in(unet: Mapping[str, Any], height: int, width: int) -> list[Size]:
    """Returns the sizes of what features are added to in a UNet, for latents of this height and width.

    They are the outputs of its down blocks, of those without cross-attention after their downsampler, and
    that of its middle block if it has one.
    """
    channels, types = unet["block_out_channels"], unet["down_block_types"]
    sizes = []
    for i, (own, kind) in enumerate(zip(channels, types, strict=True)):
        before = own, height, width
        if i < len(channels) - 1:
            height, width = -(-height // 2), -(-width // 2)
        sizes.append(before if "CrossAttn" in kind else (own, height, width))
    return [*sizes, (channels[-1], height, width)] if unet.get("mid_block_type", True) else sizes


def check_fit(component: Component, source: str, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if an adapter was not made for a UNet such as the base's."""
    if (reads := setting(component, "in_channels")) not in (1, 3):
        raise CheckpointError(
            f"the T2I-Adapter {source} reads {reads} channels, and pictures have 1 or 3",
            "give a T2I-Adapter that reads a picture to --t2i-adapter",
        )
    side = 64 * checkpoint.vae_factor  # divisible by whatever an adapter divides by
    gives = feature_sizes(component, side, side)
    takes = places_in(checkpoint.unet, 64, 64)
    if gives != takes[: len(gives)]:
        own, base = (
            ", ".join(f"{width}×{64 // height}" for width, height, _ in sizes) for sizes in (gives, takes)
        )
        raise CheckpointError(
            f"the T2I-Adapter {source} is for another base than {checkpoint.base}: its features' channels, "
            f"and how many times smaller than latents they are, are {own}; the base takes {base}",
            "give a T2I-Adapter made for this base to --t2i-adapter",
        )


def check_adapter_sizes(checkpoint: Checkpoint, height: int, width: int) -> None:
    """Raises UsageError if an adapter can't divide a side of the pictures, which are in pixels."""
    for name in adapters_of(checkpoint):
        component = checkpoint.components[name]
        factor = setting(component, "downscale_factor")
        for called, side in (("height", height), ("width", width)):
            if side % factor:
                raise UsageError(
                    f"{called} {side} is not a multiple of {factor}, by which the T2I-Adapter "
                    f"{component.location} makes pictures smaller",
                    f"--{called} {side // factor * factor or factor}",
                )
