"""Finds the module of a base that each update of a LoRA belongs to, by its key and its shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lcm_compile.checkpoint.original_unet_names import original_name, original_names
from lcm_compile.errors import LoraError, first_few
from lcm_compile.lora.kinds import Update
from lcm_compile.lora.read import Lora, LoraLayer

# The block at the beginning of a UNet module's name: in a base, or in the file of a LoRA for an unknown base.
BLOCK = re.compile(r"((?:down|up|input|output)_blocks)[._](\d+)|mid_block|middle_block")


@dataclass(frozen=True)
class Place:
    """A module of a base, under the base's own name for it."""

    component: str
    name: str
    module: torch.nn.Module

    @property
    def part(self) -> str:
        """The part of the model that LoraSpec.strengths can name: a block, a text encoder or `unet`."""
        return block_of(self.component, self.name) or self.component


@dataclass(frozen=True)
class Match:
    """The result of matching a LoRA to a base.

    `pairs` are the layers that fit, each with its place. `unmatched` are the keys of layers without a module
    in the base. `misshapen` names the modules of layers that have another shape, each with the reason in
    brackets.
    """

    pairs: list[tuple[LoraLayer, Place]]
    unmatched: list[str]
    misshapen: list[str]

    @property
    def keys(self) -> int:
        """The number of keys that fit the base."""
        return sum(len(layer.keys) for layer, _ in self.pairs)

    @property
    def fits(self) -> bool:
        """Whether every key of the LoRA fits the base."""
        return not self.unmatched and not self.misshapen


def match(lora: Lora, modules: Mapping[str, torch.nn.Module]) -> Match:
    """Returns which layers fit which of a base's modules, given by component.

    The modules need no weights: they may be on torch's meta device. Raises LoraError if two layers update one
    module.
    """
    index = index_modules(modules)
    owners: dict[tuple[str, str], LoraLayer] = {}
    found = Match([], [], [])
    for layer in lora.layers:
        name = plain_module_name(layer.module, flat="." not in layer.module)
        place = index.get((layer.component, name))
        if place is None:
            found.unmatched.extend(layer.keys)
            continue
        owner = owners.setdefault((place.component, place.name), layer)
        if owner is not layer:
            keys = first_few([owner.keys[0], layer.keys[0]])
            raise LoraError(f"{lora.path} updates {layer.module} twice: {keys}", "save the LoRA again")
        if reason := mismatch_reason(layer.update, place.module):
            found.misshapen.append(f"{layer.module} ({reason})")
        else:
            found.pairs.append((layer, place))
    return found


def plain_module_name(name: str, flat: bool) -> str:
    """Returns a module's name without the `text_model` that some transformers versions nest text encoders in.

    With `flat`, the result is written with `_` in place of `.`, as in kohya's keys.
    """
    name = name.removeprefix("text_model_" if flat else "text_model.")
    return name.replace(".", "_") if flat else name


def index_modules(modules: Mapping[str, torch.nn.Module]) -> dict[tuple[str, str], Place]:
    """Returns each place by (component, name), for every name that a LoRA may call it by, dotted and flat."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.Embedding)
    index: dict[tuple[str, str], Place] = {}
    for component, root in modules.items():
        originals = original_names(root) if component == "unet" else {}
        for name, module in root.named_modules():
            if isinstance(module, kinds):
                place = Place(component, name, module)
                names = {plain_module_name(name, flat=False), original_name(name, originals)}
                for dotted in names:
                    index[component, dotted] = index[component, dotted.replace(".", "_")] = place
    return index


def mismatch_reason(update: Update, module: torch.nn.Module) -> str | None:
    """Returns why the shapes of an update do not fit a module, or None if they do."""
    bias = bias_of(module)
    try:
        update.delta(weight_of(module).to("meta"))
    except ValueError as error:
        return str(error)
    if update.bias is None or (bias is not None and update.bias.shape == bias.shape):
        return None
    return f"bias update {list(update.bias.shape)}, bias {None if bias is None else list(bias.shape)}"


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """Returns the weight of a module that a LoRA can change."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def bias_of(module: torch.nn.Module) -> torch.Tensor | None:
    """Returns the bias of a module that a LoRA can change, or None if it has none."""
    bias = getattr(module, "bias", None)  # an embedding has none
    assert bias is None or isinstance(bias, torch.Tensor)
    return bias


def block_of(component: str, module: str) -> str | None:
    """Returns the block that a UNet's module is in, such as `down_blocks.1`; None if it is in no block."""
    found = BLOCK.match(module) if component == "unet" else None
    if found is None:
        return None
    return f"{found[1]}.{found[2]}" if found[1] else found[0]
