"""Finds the original Stable Diffusion's names for a diffusers UNet's modules, from the UNet's structure.

The original numbers its blocks in one sequence. `input_blocks.0.0` is conv_in. After it, each residual block
with the attention that follows it is one block, and each downsampler is a block of its own. An upsampler
belongs to the block before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EMBEDDINGS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_names(unet: torch.nn.Module) -> dict[str, str]:
    """Returns the original's names by diffusers' names, for the embeddings and the blocks.

    `original_name` returns the name of any module from them.
    """
    names = dict(EMBEDDINGS)
    number = 1
    for path, block in numbered(unet, "down_blocks"):
        for resnet, attention in layer_names(path, block):
            names |= {resnet: f"input_blocks.{number}.0", attention: f"input_blocks.{number}.1"}
            number += 1
        if count(block, "downsamplers"):
            names[f"{path}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for resnet, attention in layer_names("mid_block", getattr(unet, "mid_block", None)):
        names |= {resnet: f"middle_block.{number}", attention: f"middle_block.{number + 1}"}
        number += 2
    number = 0
    for path, block in numbered(unet, "up_blocks"):
        for resnet, attention in layer_names(path, block):
            names |= {resnet: f"output_blocks.{number}.0", attention: f"output_blocks.{number}.1"}
            number += 1
        if count(block, "upsamplers"):
            place = 2 if count(block, "attentions") else 1
            names[f"{path}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    return names


def numbered(unet: torch.nn.Module, name: str) -> list[tuple[str, torch.nn.Module]]:
    """Returns the blocks of a list of the UNet, each with its full name. A ControlNet has no `up_blocks`."""
    return [(f"{name}.{n}", block) for n, block in enumerate(getattr(unet, name, ()))]


def layer_names(path: str, block: torch.nn.Module | None) -> list[tuple[str, str]]:
    """Returns the name of each residual block, with the name that the attention after it would have."""
    return [(f"{path}.resnets.{n}", f"{path}.attentions.{n}") for n in range(count(block, "resnets"))]


def count(block: torch.nn.Module | None, name: str) -> int:
    """Returns the length of a block's list of modules, 0 if it has no such list."""
    # A block without downsamplers has None in their place, and a UNet without a middle block has None for it.
    return len(list(getattr(block, name, None) or ()))


def original_name(name: str, originals: Mapping[str, str]) -> str:
    """Returns a module's original name. `originals` is what `original_names` returned.

    A module that the original does not have keeps diffusers' name.
    """
    if name in originals:
        return originals[name]
    head, middle, tail = name.partition(".resnets.")
    if not middle:
        head, middle, tail = name.partition(".attentions.")
    number, _, inner = tail.partition(".")
    block = originals.get(f"{head}{middle}{number}")
    return f"{block}.{RESNET.get(inner, inner)}" if block else name
