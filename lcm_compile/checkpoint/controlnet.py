"""Finds the ControlNets that are added to a base, and checks that they fit it. Needs no torch.

A ControlNet is a copy of a UNet's first half, with a small network that reads a picture in front and a
convolution after each block. It is a diffusers folder, or a file (safetensors, or a pickle of weights): under
diffusers' names, or under those of the original, which may begin with `control_model.`. A file holds no
settings. They are the base's own, because a ControlNet is a copy of such a UNet.

A control-LoRA, Stability's smaller form, is a file that holds of most layers only the change to the UNet's
weights, under the original's names: the product of `….up` (o, r) and `….down` (r, i), which may have the
dimensions of a convolution's kernel. The layers that read the picture, the convolutions after the blocks, the
biases and the norms are complete. The UNet is the bundle's without its LoRAs: they were not there when the
control-LoRA was trained, and change no other ControlNet either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component
from lcm_compile.checkpoint.diffusers_folder import find_component
from lcm_compile.checkpoint.original_unet_names import count, original_name, original_names
from lcm_compile.checkpoint.single_file import CONTROL_FIRST
from lcm_compile.checkpoint.source import locate_model
from lcm_compile.checkpoint.weight_files import Shapes, read_header
from lcm_compile.errors import CheckpointError, first_few
from lcm_compile.graphs import CONTROLS

if TYPE_CHECKING:
    import torch

CLASS = "ControlNetModel"
CONTROL_LORA = "lora_controlnet"  # an empty tensor by which a control-LoRA is known
ORIGINAL = "control_model."  # what the original's keys begin with in a file that was saved with the base
ORIGINAL_FIRST, DIFFUSERS_FIRST = CONTROL_FIRST
HINT_BLOCK = (16, 32, 96, 256)  # channels of the layers that read the picture, in every published ControlNet
# The settings that a ControlNet has in common with the UNet that it was copied from.
COPIED = (
    *("in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type"),
    *("only_cross_attention", "block_out_channels", "layers_per_block", "downsample_padding"),
    *("mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim"),
    *("transformer_layers_per_block", "attention_head_dim", "num_attention_heads", "use_linear_projection"),
    *("addition_embed_type", "addition_time_embed_dim", "upcast_attention", "resnet_time_scale_shift"),
    "projection_class_embeddings_input_dim",
)
# What must be the same in a ControlNet and in the base, with diffusers' defaults for both.
MUST_FIT: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "in_channels": 4,
    "cross_attention_dim": 1280,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}


def controls_of(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of a checkpoint's ControlNets, which are those of their stages."""
    return [name for name in CONTROLS if name in checkpoint.components]


def with_controlnets(checkpoint: Checkpoint, sources: Sequence[str], half: bool) -> Checkpoint:
    """Returns the checkpoint with ControlNets, as its components `control`, `control-2` and so on.

    A source is a diffusers folder, a file or a hub id. With `half`, fp16 weights are preferred on the hub.
    Raises UsageError if no ControlNet has this name, and CheckpointError if it can't be downloaded or read,
    or if it does not fit the base.
    """
    components = dict(checkpoint.components)
    for name, source in zip(CONTROLS, sources, strict=False):
        component = find_controlnet(source, name, checkpoint, half)
        check_fit(component, source, checkpoint)
        components[name] = component
    return replace(checkpoint, components=components)


def find_controlnet(source: str, name: str, checkpoint: Checkpoint, half: bool) -> Component:
    """Returns the ControlNet of a source as the component `name`. Raises as `with_controlnets` does."""
    path, variants = locate_model(source, "ControlNet", "--controlnet", half)
    if path.is_file():
        return controlnet_in_file(path, name, checkpoint)
    component = find_component(path, name, variants)
    if (kind := component.config.get("_class_name", CLASS)) != CLASS:
        raise CheckpointError(
            f"{path} is a {kind}, and a {CLASS} is needed", "give a ControlNet for the base to --controlnet"
        )
    return component


def controlnet_in_file(path: Path, name: str, checkpoint: Checkpoint) -> Component:
    """Returns the ControlNet in a file as the component `name`, with settings of the base's UNet.

    Raises CheckpointError if the file holds no ControlNet, or one of a kind that is not read.
    """
    shapes, _ = read_header(path)
    hint = "give a ControlNet's diffusers folder or its whole file to --controlnet"
    changes = CONTROL_LORA in shapes
    if changes and not checkpoint.components["unet"].files:
        raise CheckpointError(
            f"{path} is a control-LoRA, which is added to the base's weights, and random ones are asked for",
            "drop --weights, or give a complete ControlNet to --controlnet",
        )
    if "difference" in shapes:
        raise CheckpointError(
            f"{path} holds a ControlNet's difference to a base, and not the ControlNet itself", hint
        )
    prefix = ORIGINAL if ORIGINAL + ORIGINAL_FIRST in shapes else ""
    if not is_controlnet(shapes):
        raise CheckpointError(
            f"{path} is no ControlNet: it has neither {DIFFUSERS_FIRST} nor {ORIGINAL_FIRST} "
            f"(it has {first_few([*shapes])})",
            hint,
        )
    unet = checkpoint.unet
    config = {key: unet[key] for key in COPIED if unet.get(key) is not None}
    return Component(name, {**config, **shown_by(shapes)}, (path,), prefix=prefix, changes_unet=changes)


def is_controlnet(shapes: Shapes) -> bool:
    """Returns whether a file's keys are a ControlNet's."""
    return any(key in shapes for key in (DIFFUSERS_FIRST, ORIGINAL_FIRST, ORIGINAL + ORIGINAL_FIRST))


def whole_shapes(shapes: Shapes) -> Shapes:
    """Returns the shapes of a file's weights; those of a control-LoRA's factors are their product's."""
    products = {
        f"{layer}.weight": (*shapes[key][:1], *shapes[f"{layer}.down"][1:])
        for key in shapes
        if (layer := key.removesuffix(".up")) != key and f"{layer}.down" in shapes
    }
    return {**shapes, **products}


def hint_channels(shapes: Shapes) -> list[int]:
    """Returns the widths of the layers that read the picture, as the config has them."""
    if DIFFUSERS_FIRST in shapes:
        place = "controlnet_cond_embedding.blocks."
        blocks = numbers(rf"{re.escape(place)}(\d+)\..*", shapes)
        keys = [DIFFUSERS_FIRST, *(f"{place}{n}.weight" for n in blocks)]
    else:  # the last convolution gives the width of the first block, and is not among them
        keys = [f"input_hint_block.{n}.weight" for n in numbers(r"input_hint_block\.(\d+)\..*", shapes)[:-1]]
    return [shapes[key][0] for key in keys[::2]]


def shown_by(shapes: Shapes) -> dict[str, Any]:
    """Returns what a ControlNet's file shows of its settings: those in MUST_FIT and its picture's layers."""
    shapes = whole_shapes({key.removeprefix(ORIGINAL): shape for key, shape in shapes.items()})
    widths = [shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")]
    if DIFFUSERS_FIRST in shapes:
        numbered = numbers(r"down_blocks\.(\d+)\.resnets\.0\.conv1\.weight", shapes)
        channels = [shapes[f"down_blocks.{n}.resnets.0.conv1.weight"][0] for n in numbered]
        added = shapes.get("add_embedding.linear_1.weight")
    else:
        channels = [0]
        for n in numbers(r"input_blocks\.(\d+)\.0\..*", shapes)[1:]:
            if f"input_blocks.{n}.0.op.weight" in shapes:
                channels.append(0)
            else:
                channels[-1] = shapes.get(f"input_blocks.{n}.0.out_layers.3.weight", (0,))[0]
        added = shapes.get("label_emb.0.0.weight")
    return {
        "_class_name": CLASS,
        "conditioning_embedding_out_channels": hint_channels(shapes),
        "block_out_channels": channels,
        "cross_attention_dim": max(widths, default=0),
        "addition_embed_type": "text_time" if added else None,
        "projection_class_embeddings_input_dim": added[1] if added else None,
    }


def numbers(pattern: str, shapes: Shapes) -> list[int]:
    """Returns the numbers that a pattern finds in keys, in order."""
    return sorted({int(match[1]) for key in shapes if (match := re.fullmatch(pattern, key))})


def check_fit(component: Component, source: str, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if a ControlNet was not made for a UNet such as the base's."""
    config, unet = component.config, checkpoint.unet
    if config.get("global_pool_conditions"):
        raise CheckpointError(
            f"the ControlNet {source} pools what it adds (global_pool_conditions, as the shuffle ControlNet "
            "does), which diffusers draws in guess mode; guess mode is not built",
            "give another ControlNet to --controlnet",
        )
    differ = [key for key, usual in MUST_FIT.items() if plain(config, key, usual) != plain(unet, key, usual)]
    if differ:
        own, base = (", ".join(f"{key} {c.get(key)}" for key in differ) for c in (config, unet))
        raise CheckpointError(
            f"the ControlNet {source} is for {kind_of(config)}, and the base {checkpoint.base} is "
            f"{kind_of(unet)}: it has {own}; the base has {base}",
            "give a ControlNet made for this base to --controlnet",
        )
    channels = config.get("conditioning_embedding_out_channels", HINT_BLOCK)
    if (factor := 2 ** (len(channels) - 1)) != checkpoint.vae_factor:
        raise CheckpointError(
            f"the ControlNet {source} makes a picture {factor} times smaller, and latents of "
            f"{checkpoint.base} are {checkpoint.vae_factor} times smaller than pictures",
            "give a ControlNet made for this base to --controlnet",
        )
    if (reads := config.get("conditioning_channels", 3)) != 3:
        raise CheckpointError(
            f"the ControlNet {source} reads {reads} channels, and pictures have 3",
            "give a ControlNet that reads a picture to --controlnet",
        )


def plain(config: Mapping[str, Any], key: str, usual: Any) -> Any:
    """Returns a setting, with tuples as lists."""
    value = config.get(key, usual)
    return list(value) if isinstance(value, tuple | list) else value


def kind_of(config: Mapping[str, Any]) -> str:
    """Returns the name of the models whose text states have the width that a config says."""
    width = config.get("cross_attention_dim")
    if config.get("addition_embed_type") == "text_time":
        return "SDXL" if width == 2048 else f"SDXL's architecture with text states of {width}"
    known = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
    return known.get(width or 0, f"a model with text states of {width}")


Tensors = Mapping[str, "torch.Tensor"]


def controlnet_weights(module: torch.nn.Module, tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    """Returns a ControlNet's tensors under diffusers' names; of no known name, under their own.

    `prefix` is what the original's keys begin with.
    """
    if DIFFUSERS_FIRST in tensors:
        return dict(tensors)
    names = {original: name for name, original in original_keys(module)}
    bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return {names.get(key, key): tensor for key, tensor in bare.items()}


def control_lora_weights(module: torch.nn.Module, tensors: Tensors, unet: Tensors) -> dict[str, torch.Tensor]:
    """Returns a ControlNet's tensors under diffusers' names: those of a UNet, changed by a control-LoRA's.

    What is of no known name, or does not fit the UNet's weight, is under a name or in a shape of its own.
    """
    names = {original: name for name, original in original_keys(module)}
    weights = {name: unet[name] for name in module.state_dict() if name in unet}
    for key, tensor in tensors.items():
        layer, _, leaf = key.rpartition(".")
        name, down = names.get(f"{layer}.weight"), tensors.get(f"{layer}.down")
        if leaf == "up" and name in weights and down is not None and tensor.shape[1:2] == down.shape[:1]:
            change = tensor.float().flatten(1) @ down.float().flatten(1)
            fits = change.numel() == unet[name].numel()
            weights[name] = unet[name].float() + change.view_as(unet[name]) if fits else change
        elif key != CONTROL_LORA and not (leaf == "down" and f"{layer}.up" in tensors):
            weights[names.get(key, key)] = tensor
    return weights


def original_keys(module: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Yields each weight's name in a ControlNet's module, and the original's."""
    known = original_names(module)
    blocks = count(module.get_submodule("controlnet_cond_embedding"), "blocks")
    known["controlnet_cond_embedding.conv_in"] = "input_hint_block.0"
    # In the original an activation, which has a number too, follows each convolution.
    known |= {f"controlnet_cond_embedding.blocks.{n}": f"input_hint_block.{2 * n + 2}" for n in range(blocks)}
    known["controlnet_cond_embedding.conv_out"] = f"input_hint_block.{2 * blocks + 2}"
    known["controlnet_mid_block"] = "middle_block_out.0"
    for n in range(count(module, "controlnet_down_blocks")):
        known[f"controlnet_down_blocks.{n}"] = f"zero_convs.{n}.0"
    for key in module.state_dict():
        layer, _, leaf = key.rpartition(".")
        yield key, f"{original_name(layer, known)}.{leaf}"
