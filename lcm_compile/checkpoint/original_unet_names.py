"""The original Stable Diffusion's names for a diffusers UNet's modules, told from the UNet's own structure.

The original numbers its blocks in one row: `input_blocks.0.0` is conv_in, then each residual block with the
attention after it is one block, and each downsampler another; an upsampler belongs to the block before it.
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
    """diffusers' name → the original's, for the embeddings and each block; see `original_name`."""
    names = dict(EMBEDDINGS)
    number = 1
    for path, block in numbered(unet, "down_blocks"):
        for resnet, attention in row(path, block):
            names |= {resnet: f"input_blocks.{number}.0", attention: f"input_blocks.{number}.1"}
            number += 1
        if count(block, "downsamplers"):
            names[f"{path}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for resnet, attention in row("mid_block", getattr(unet, "mid_block", None)):
        names |= {resnet: f"middle_block.{number}", attention: f"middle_block.{number + 1}"}
        number += 2
    number = 0
    for path, block in numbered(unet, "up_blocks"):
        for resnet, attention in row(path, block):
            names |= {resnet: f"output_blocks.{number}.0", attention: f"output_blocks.{number}.1"}
            number += 1
        if count(block, "upsamplers"):
            place = 2 if count(block, "attentions") else 1
            names[f"{path}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    return names


def numbered(unet: torch.nn.Module, name: str) -> list[tuple[str, torch.nn.Module]]:
    return [(f"{name}.{n}", block) for n, block in unet.get_submodule(name).named_children()]


def row(path: str, block: torch.nn.Module | None) -> list[tuple[str, str]]:
    """The names of each residual block, and of the attention after it where there is one."""
    return [(f"{path}.resnets.{n}", f"{path}.attentions.{n}") for n in range(count(block, "resnets"))]


def count(block: torch.nn.Module | None, name: str) -> int:
    # Blocks without downsamplers have None in their place, and so have UNets without a middle block.
    return len(list(getattr(block, name, None) or ()))


def original_name(name: str, originals: Mapping[str, str]) -> str:
    """A module's original name, given `original_names`; diffusers' own where it has no other."""
    if name in originals:
        return originals[name]
    head, middle, tail = name.partition(".resnets.")
    if not middle:
        head, middle, tail = name.partition(".attentions.")
    number, _, inner = tail.partition(".")
    block = originals.get(f"{head}{middle}{number}")
    return f"{block}.{RESNET.get(inner, inner)}" if block else name
