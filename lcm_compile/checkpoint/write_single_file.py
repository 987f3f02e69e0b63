"""Converts a model's weights to the names and shapes of the original layout, which single_file describes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lcm_compile.checkpoint.original_unet_names import original_name, original_names
from lcm_compile.checkpoint.single_file import CLIP, CLIP_XL, OPEN_CLIP, OPEN_CLIP_XL, UNET, VAE

if TYPE_CHECKING:
    import torch

Named = Iterator[tuple[str, "torch.Tensor"]]

# Patterns in diffusers' names, and the original's text in their place. They are replaced in this order.
VAE_NAMES = {
    r"\.down_blocks\.(\d+)\.resnets\.": r".down.\1.block.",
    r"\.down_blocks\.(\d+)\.downsamplers\.0\.": r".down.\1.downsample.",
    r"\.up_blocks\.(\d+)\.resnets\.": r".up.\1.block.",
    r"\.up_blocks\.(\d+)\.upsamplers\.0\.": r".up.\1.upsample.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.": ".mid.attn_1.",
    r"\.attn_1\.group_norm\.": ".attn_1.norm.",
    r"\.attn_1\.to_([qkv])\.": r".attn_1.\1.",
    r"\.attn_1\.to_out\.0\.": ".attn_1.proj_out.",
    r"\.conv_norm_out\.": ".norm_out.",
}
OPEN_CLIP_NAMES = {
    r"embeddings\.token_embedding\.": "token_embedding.",
    r"embeddings\.position_embedding\.weight": "positional_embedding",
    r"encoder\.layers\.": "transformer.resblocks.",
    r"\.layer_norm([12])\.": r".ln_\1.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
    r"\.self_attn\.": ".attn.",
    r"final_layer_norm\.": "ln_final.",
}


def original_weights(name: str, config: Mapping[str, Any], xl: bool, module: torch.nn.Module) -> Named:
    """Yields the weights of the component `name` one by one, each with its original key.

    `xl` says that the base has two text encoders. The module may be on torch's meta device; the results then
    have shapes only.
    """
    if name == "unet":
        return unet_weights(module)
    if name == "vae":
        return vae_weights(module, len(config["block_out_channels"]))
    if name == "text_encoder_2":
        return open_clip_weights(module, OPEN_CLIP_XL)
    if xl:
        return clip_weights(module, CLIP_XL)
    return open_clip_weights(module, OPEN_CLIP) if is_open_clip(config) else clip_weights(module, CLIP)


def is_open_clip(config: Mapping[str, Any]) -> bool:
    """Returns whether the text encoder of a base with one is OpenCLIP's, as in SD2.x.

    That of SD1.x is OpenAI's CLIP, which uses the quick GELU; OpenCLIP's does not.
    """
    return bool(config.get("hidden_act", "quick_gelu") != "quick_gelu")


def unet_weights(unet: torch.nn.Module) -> Named:
    """Yields a UNet's weights with their original keys."""
    originals = original_names(unet)
    for key, weight in unet.state_dict().items():
        module, _, leaf = key.rpartition(".")
        yield f"{UNET}{original_name(module, originals)}.{leaf}", weight


def vae_weights(vae: torch.nn.Module, levels: int) -> Named:
    """Yields a VAE's weights with their original keys. `levels` is the number of its resolutions."""
    for key, weight in vae.state_dict().items():
        name = renamed(key, VAE_NAMES)
        # The original numbers the decoder's levels from the largest map down, diffusers from the smallest up.
        name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
        # In the original, the attention's projections are 1×1 convolutions.
        convolution = ".attn_1." in name and weight.ndim == 2
        yield f"{VAE}{name}", weight[:, :, None, None] if convolution else weight


def clip_weights(text_encoder: torch.nn.Module, prefix: str) -> Named:
    """Yields the weights of OpenAI's CLIP text encoder with their original keys."""
    for key, weight in text_encoder.state_dict().items():
        yield f"{prefix}text_model.{key.removeprefix('text_model.')}", weight


def open_clip_weights(text_encoder: torch.nn.Module, prefix: str) -> Named:
    """Yields the weights of OpenCLIP's text encoder with their original keys.

    In the original, one matrix computes queries, keys and values, and the projection of the pooled state is
    transposed.
    """
    import torch

    state = {key.removeprefix("text_model."): weight for key, weight in text_encoder.state_dict().items()}
    for key, weight in state.items():
        name, part = open_clip_name(key)
        if part == 0:
            three = [state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            yield f"{prefix}{name}", torch.cat(three)
        elif part is None:
            yield f"{prefix}{name}", weight.T if name == "text_projection" else weight


def open_clip_name(key: str) -> tuple[str, int | None]:
    """Returns OpenCLIP's name for a text encoder's weight, whose key has no `text_model.` in front.

    One matrix computes queries, keys and values, in this order: of these weights, the second value is the
    number of the part. Of all others it is None.
    """
    if key == "text_projection.weight":
        return "text_projection", None
    name = renamed(key, OPEN_CLIP_NAMES)
    if match := re.search(r"\.attn\.([qkv])_proj\.", name):
        return name.replace(match[0], ".attn.in_proj_"), "qkv".index(match[1])
    return name, None


def renamed(name: str, table: Mapping[str, str]) -> str:
    """Returns a name after all replacements of a table, in their order."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name
