"""Which module of a base each update of a LoRA belongs to, by its key and its shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lcm_compile.checkpoint.original_unet_names import original_name, original_names
from lcm_compile.errors import LoraError
from lcm_compile.lora.kinds import Update
from lcm_compile.lora.read import Lora, LoraLayer, some

# Of a module's name in a base, or in a file for a base that is not known.
BLOCK = re.compile(r"((?:down|up|input|output)_blocks)[._](\d+)|mid_block|middle_block")


@dataclass(frozen=True)
class Place:
    """A module of a base, under the base's own name for it."""

    component: str
    name: str
    module: torch.nn.Module

    @property
    def part(self) -> str:
        """Its block, its text encoder, or `unet` for what is in no block: see LoraSpec.strengths."""
        return block_of(self.component, self.name) or self.component


@dataclass(frozen=True)
class Match:
    """The updates that have a place, the keys that have none, and the modules of another shape, told."""

    pairs: list[tuple[LoraLayer, Place]]
    unmatched: list[str]
    misshapen: list[str]

    @property
    def keys(self) -> int:
        return sum(len(layer.keys) for layer, _ in self.pairs)

    @property
    def whole(self) -> bool:
        return not self.unmatched and not self.misshapen


def match(lora: Lora, modules: Mapping[str, torch.nn.Module]) -> Match:
    """Finds each layer's place. The modules may be shapes alone, on torch's meta device.

    LoraError where two layers update one module.
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
            keys = some([owner.keys[0], layer.keys[0]])
            raise LoraError(f"{lora.path} updates {layer.module} twice: {keys}", "save the LoRA again")
        if reason := mismatch_reason(layer.update, place.module):
            found.misshapen.append(f"{layer.module} ({reason})")
        else:
            found.pairs.append((layer, place))
    return found


def plain_module_name(name: str, flat: bool) -> str:
    """One spelling for a text encoder's modules: some transformers versions nest them in `text_model`."""
    name = name.removeprefix("text_model_" if flat else "text_model.")
    return name.replace(".", "_") if flat else name


def index_modules(modules: Mapping[str, torch.nn.Module]) -> dict[tuple[str, str], Place]:
    """(component, name) → module, under each name that a LoRA may call it by, dotted and flat."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm)
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
    """Why an update can't be a module's, by shapes alone; None where it can."""
    bias = bias_of(module)
    try:
        update.delta(weight_of(module).to("meta"))
    except ValueError as error:
        return str(error)
    if update.bias is None or (bias is not None and update.bias.shape == bias.shape):
        return None
    return f"bias update {list(update.bias.shape)}, bias {None if bias is None else list(bias.shape)}"


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def bias_of(module: torch.nn.Module) -> torch.Tensor | None:
    bias = module.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    return bias


def block_of(component: str, module: str) -> str | None:
    """The block of a UNet's module, as `down_blocks.1`; None elsewhere."""
    found = BLOCK.match(module) if component == "unet" else None
    if found is None:
        return None
    return f"{found[1]}.{found[2]}" if found[1] else found[0]
