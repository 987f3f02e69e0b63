"""Finds the ControlNets that are added to a base, and checks that they fit it. Needs no torch.

A ControlNet is a copy of a UNet's first half, with a small network that reads a picture in front and a
convolution after each block. It is a diffusers folder, or a file (safetensors, or a pickle of weights): under
diffusers' names, or under those of the original, which may begin with `control_model.`. A file holds no
settings. They are the base's own, because a ControlNet is a copy of such a UNet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component
from lcm_compile.checkpoint.diffusers_folder import FULL_FIRST, HALF_FIRST, find_component, needed_files
from lcm_compile.checkpoint.find import hub_id
from lcm_compile.checkpoint.hub import fetch
from lcm_compile.checkpoint.original_unet_names import count, original_name, original_names
from lcm_compile.checkpoint.single_file import CONTROL_FIRST
from lcm_compile.checkpoint.weight_files import Shapes, read_header
from lcm_compile.errors import CheckpointError, UsageError, first_few
from lcm_compile.graphs import CONTROLS
from lcm_compile.system.files import user_path

if TYPE_CHECKING:
    import torch

CLASS = "ControlNetModel"
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
    path = user_path(source)
    variants = FULL_FIRST
    if not path.exists() and (hub := hub_id(source)):
        variants = HALF_FIRST if half else FULL_FIRST
        try:
            path = fetch(hub[0], lambda names: needed_files(names, variants, ("",)), hub[1])
        except ConnectionError as error:
            raise CheckpointError(
                f"the ControlNet {source} is neither a path nor in the hub cache, and can't be downloaded: "
                f"{error}",
                "check the network (or HF_HOME, HF_TOKEN), or give a folder or a file to --controlnet",
            ) from error
    if path.is_file():
        return controlnet_in_file(path, name, checkpoint)
    if not path.is_dir():
        raise UsageError(
            f"--controlnet {source} does not exist", "give a hub id, a diffusers folder or a file"
        )
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
    if any(key.startswith("lora_controlnet") for key in shapes):
        raise CheckpointError(f"{path} is a control-LoRA, which is not read", hint)
    if "difference" in shapes:
        raise CheckpointError(
            f"{path} holds a ControlNet's difference to a base, and not the ControlNet itself", hint
        )
    prefix = ORIGINAL if ORIGINAL + ORIGINAL_FIRST in shapes else ""
    if not prefix and DIFFUSERS_FIRST not in shapes and ORIGINAL_FIRST not in shapes:
        raise CheckpointError(
            f"{path} is no ControlNet: it has neither {DIFFUSERS_FIRST} nor {ORIGINAL_FIRST} "
            f"(it has {first_few([*shapes])})",
            hint,
        )
    bare = {key.removeprefix(prefix): shape for key, shape in shapes.items()}
    unet = checkpoint.unet
    config = {key: unet[key] for key in COPIED if unet.get(key) is not None}
    config |= {"_class_name": CLASS, "conditioning_embedding_out_channels": hint_channels(bare)}
    return Component(name, {**config, **shown_by(bare)}, (path,), prefix=prefix)


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
    """Returns what a file's shapes show of the settings in MUST_FIT."""
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
                channels[-1] = shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0]
        added = shapes.get("label_emb.0.0.weight")
    return {
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


def controlnet_weights(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str
) -> dict[str, torch.Tensor]:
    """Returns a ControlNet's tensors under diffusers' names; of no known name, under their own.

    `prefix` is what the original's keys begin with.
    """
    if DIFFUSERS_FIRST in tensors:
        return dict(tensors)
    names = {original: name for name, original in original_keys(module)}
    bare = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return {names.get(key, key): tensor for key, tensor in bare.items()}


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
