"""Guesses the base that a LoRA is made for: the family that most of its keys fit, by name and by shape."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lcm_compile.checkpoint.checkpoint import Component
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.families import FAMILIES, Family, lora_bases
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.lora.match import Match, match
from lcm_compile.lora.read import Lora


@dataclass(frozen=True)
class Fit:
    """How well a LoRA fits a family of bases.

    `complete` is whether it adapts every UNet module that has the same role as a module it adapts: if it
    adapts one `attn2.to_k`, it adapts all of them.
    """

    family: str
    match: Match
    complete: bool


def fits(lora: Lora) -> list[Fit]:
    """Returns every family that some keys of a LoRA fit, the best one first.

    The number of keys that fit is not enough: SDXL has all modules that SSD-1B has, so an SSD-1B LoRA fits
    both families. But it is complete only in SSD-1B.
    """
    components = {layer.component for layer in lora.layers}
    found = []
    for family in lora_bases():
        modules = empty_modules(family, components)
        matched = match(lora, modules)
        if matched.pairs:
            in_unet = {name for name, _ in modules["unet"].named_modules()} if "unet" in modules else set()
            found.append(Fit(family.name, matched, is_complete(matched, in_unet)))
    return sorted(found, key=lambda fit: (-fit.match.keys, not fit.complete))


def empty_modules(family: Family, names: Collection[str]) -> dict[str, Any]:
    """Returns the named components of a family as modules without weights. It downloads nothing."""
    configs = family.models or {
        name: component.config for name, component in open_checkpoint(family.name).components.items()
    }
    return {name: empty_module(Component(name, config)) for name, config in configs.items() if name in names}


def is_complete(matched: Match, in_unet: set[str]) -> bool:
    """Returns whether a LoRA adapts every module of the UNet that has the role of one it adapts. See Fit."""
    adapted = {place.name for _, place in matched.pairs if place.component == "unet"}
    roles = {role_of(name) for name in adapted}
    return bool(adapted) and all(name in adapted for name in in_unet if role_of(name) in roles)


def role_of(module: str) -> str:
    """Returns the end of a module's name without block numbers, for example `attn2.to_k` or `to_out.0`."""
    return re.sub(r"^\d+\.", "", ".".join(module.split(".")[-2:]))


def made_for(lora: Lora, found: Sequence[Fit]) -> str:
    """Returns in words which base a LoRA is made for.

    `found` is the result of `fits`. If no family fits more than half of the keys, the answer is `lora.guess`.
    """
    total = sum(len(layer.keys) for layer in lora.layers)
    if not found or 2 * found[0].match.keys <= total:
        return lora.guess
    best = found[0]
    if best.match.keys < total:
        return f"{full_name(best.family)}, which {best.match.keys} of its {total} keys fit"
    # All families that every key fits are equally likely, unless the LoRA is complete in one of them.
    likely = [best] if best.complete else [fit for fit in found if fit.match.keys == total]
    return " or ".join(full_name(fit.family) for fit in likely)


def full_name(family: str) -> str:
    """Returns a family's name with the model that it stands for: `NAME (MODEL)`."""
    return f"{family} ({FAMILIES[family].description.split(',')[0]})"
