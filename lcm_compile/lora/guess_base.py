"""Which base a LoRA is made for: the family whose modules most of its keys find, by name and by shape."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lcm_compile.checkpoint.checkpoint import Component
from lcm_compile.checkpoint.configs import COMPONENTS, UNETS
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.lora.match import Match, match
from lcm_compile.lora.read import Lora


@dataclass(frozen=True)
class Fit:
    """A family, what of a LoRA finds its place there, and whether the LoRA leaves none of its sort out."""

    family: str
    match: Match
    complete: bool


def fits(lora: Lora) -> list[Fit]:
    """Every family that some keys of a LoRA fit, the best one first.

    All that an SSD-1B has, an SDXL has as well, so its LoRA fits both. It is told by being complete: it
    adapts every module of its sort in the one, and not in the other.
    """
    components = {layer.component for layer in lora.layers}
    found = []
    for family in ("demo", *UNETS):  # a full LCM's modules are those of the family that it was made of
        modules = empty_modules(family, components)
        matched = match(lora, modules)
        if matched.pairs:
            there = {name for name, _ in modules["unet"].named_modules()} if "unet" in modules else set()
            found.append(Fit(family, matched, is_complete(matched, there)))
    return sorted(found, key=lambda fit: (-fit.match.keys, not fit.complete))


def empty_modules(family: str, names: Collection[str]) -> dict[str, Any]:
    """Those of a family's models that are named, without weights; needs no download."""
    if family in COMPONENTS:
        configs = COMPONENTS[family]
    else:
        configs = {c.name: c.config for c in open_checkpoint(family).components.values()}
    return {name: empty_module(Component(name, config)) for name, config in configs.items() if name in names}


def is_complete(matched: Match, there: set[str]) -> bool:
    adapted = {place.name for _, place in matched.pairs if place.component == "unet"}
    sorts = {sort_of(name) for name in adapted}
    return bool(adapted) and all(name in adapted for name in there if sort_of(name) in sorts)


def sort_of(module: str) -> str:
    """The end of a module's name, as `attn2.to_k` or `to_out.0`, without the numbers of blocks."""
    return re.sub(r"^\d+\.", "", ".".join(module.split(".")[-2:]))


def made_for(lora: Lora, found: Sequence[Fit]) -> str:
    """What base a LoRA is made for, in words; by its text states' width where no family has most of it."""
    total = sum(len(layer.keys) for layer in lora.layers)
    if not found or 2 * found[0].match.keys <= total:
        return lora.guess
    best = found[0]
    if best.match.keys < total:
        return f"{full_name(best.family)}, which {best.match.keys} of its {total} keys fit"
    # Each that all keys fit is as likely, unless one of them is adapted completely.
    likely = [best] if best.complete else [fit for fit in found if fit.match.keys == total]
    return " or ".join(full_name(fit.family) for fit in likely)


def full_name(family: str) -> str:
    return f"{family} ({FAMILIES[family].description.split(',')[0]})"
