"""LoRAs matched to a base's modules key by key, and fused exactly."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lcm_compile.errors import LoraError
from lcm_compile.lora.guess_base import fits, made_for
from lcm_compile.lora.kinds import Update
from lcm_compile.lora.match import Match, Place, bias_of, match, weight_of
from lcm_compile.lora.metadata import metadata_lines
from lcm_compile.lora.read import Lora, LoraLayer, some
from lcm_compile.spec import LORA_PART, LoraProvenance, LoraSpec


def match_layers(lora: Lora, modules: Mapping[str, torch.nn.Module]) -> list[tuple[LoraLayer, Place]]:
    """Each layer with the place it updates. LoraError where any has none, or another shape."""
    found = match(lora, modules)
    if found.whole:
        return found.pairs
    reasons = []
    if found.unmatched:
        reasons.append(f"{len(found.unmatched)} keys match no module: {some(found.unmatched)}")
    if found.misshapen:
        reasons.append(f"{len(found.misshapen)} modules have another shape: {some(found.misshapen)}")
    raise refusal(lora, f"does not fit this base: {'; '.join(reasons)}", found)


def refusal(lora: Lora, why: str, found: Match) -> LoraError:
    """Why a LoRA is not fused, and what it is."""
    total = sum(len(layer.keys) for layer in lora.layers)
    rank = f" of rank {', '.join(map(str, lora.ranks))}" if lora.ranks else ""
    alpha = f", alpha {', '.join(f'{alpha:g}' for alpha in lora.alphas)}," if lora.alphas else ""
    metadata = "; ".join(metadata_lines(lora.metadata))
    return LoraError(
        f"{lora.path} {why}.\n  {found.keys} of its {total} keys match. It is a {' and '.join(lora.kinds)}"
        f"{rank}{alpha} in {lora.layout} layout, and seems made for {made_for(lora, fits(lora))}"
        + (f"\n  {metadata}" if metadata else ""),
        shlex.join(["lcm-compile", "inspect", str(lora.path)]),
    )


def check_loras(
    modules: Mapping[str, torch.nn.Module], loras: Sequence[tuple[Lora, LoraSpec]]
) -> list[LoraProvenance]:
    """How each LoRA goes into these modules, which need no weights. LoraError where one can't, or is zero."""
    provenance = []
    for lora, spec in loras:
        pairs = match_layers(lora, modules)
        if not any(is_change(layer.update, place.module) for layer, place in pairs):
            raise refusal(lora, "changes nothing: every update in it is zero", Match(pairs, [], []))
        check_parts(modules, spec)
        provenance.append(
            LoraProvenance(
                spec.source, spec.weight, spec.strengths, lora.layout, len(pairs), tuple(lora.ranks)
            )
        )
    return provenance


def merge_loras(modules: Mapping[str, torch.nn.Module], loras: Sequence[tuple[Lora, LoraSpec]]) -> None:
    """Adds Σ λ·ΔW to the weights and biases of these components, in fp32 and in place.

    A LoRA's layers for other components are left out. Each ΔW is computed against the base's own weight W,
    so several LoRAs add up in any order. A DoRA's is W' − W with the W' that it makes of the base alone: the
    others do not change its norms.
    """
    work: dict[torch.nn.Module, list[tuple[float, Update]]] = {}
    with torch.no_grad():
        for lora, spec in loras:
            here = [layer for layer in lora.layers if layer.component in modules]
            for layer, place in match_layers(replace(lora, layers=here), modules):
                work.setdefault(place.module, []).append((spec.strength_of(place.part), layer.update))
        for module, updates in work.items():
            weight = weight_of(module)
            base = weight.clone()
            for strength, update in updates:
                weight += strength * update.delta(base)
                if update.bias is not None:
                    bias = bias_of(module)
                    assert bias is not None  # match_layers saw to it
                    bias += strength * update.bias.float()


def check_parts(modules: Mapping[str, torch.nn.Module], spec: LoraSpec) -> None:
    """LoraError for a strength on a part that the base lacks."""
    if not spec.strengths:
        return
    blocks = {".".join(name.split(".")[:2]) for name, _ in modules["unet"].named_modules()}
    there = {"text", "down_blocks", "up_blocks", *modules, *(b for b in blocks if LORA_PART.fullmatch(b))}
    if missing := sorted(spec.strengths.keys() - there):
        raise LoraError(
            f"LoRA {spec} has a strength for {', '.join(missing)}, which this base lacks",
            f"it has {', '.join(sorted(there - {'vae'}))}",
        )


def is_change(update: Update, module: torch.nn.Module) -> bool:
    weight, bias = weight_of(module), update.bias
    if weight.is_meta:
        weight = torch.zeros(weight.shape)
    return bool(update.delta(weight).any()) or (bias is not None and bool(bias.any()))
