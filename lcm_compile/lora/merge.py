"""Merges LoRAs into the weights of a base, and refuses LoRAs that do not fit; `match.py` matches them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lcm_compile.errors import LoraError, first_few
from lcm_compile.lora.guess_base import fits, made_for
from lcm_compile.lora.kinds import Update
from lcm_compile.lora.match import Match, Place, bias_of, match, weight_of
from lcm_compile.lora.metadata import metadata_lines
from lcm_compile.lora.read import Lora, LoraLayer, skip_advice
from lcm_compile.spec import LORA_PART, LoraProvenance, LoraSpec


def match_layers(lora: Lora, modules: Mapping[str, torch.nn.Module]) -> list[tuple[LoraLayer, Place]]:
    """Returns each layer with the place it updates. Raises LoraError if any layer does not fit."""
    found = match(lora, modules)
    if found.fits:
        return found.pairs
    reasons = []
    if found.unmatched:
        reasons.append(f"{len(found.unmatched)} keys match no module: {first_few(found.unmatched)}")
    if found.misshapen:
        reasons.append(f"{len(found.misshapen)} modules have another shape: {first_few(found.misshapen)}")
    keys = [key for layer in lora.layers for key in layer.keys]
    advice = "" if found.misshapen else skip_advice(found.unmatched, keys)
    raise refusal(lora, f"does not fit this base: {'; '.join(reasons)}", found, advice)


def refusal(lora: Lora, why: str, found: Match, advice: str = "") -> LoraError:
    """Returns the error that says why a LoRA is not fused, and what kind of LoRA it is.

    `advice` is added to the hint.
    """
    total = sum(len(layer.keys) for layer in lora.layers)
    rank = f" of rank {', '.join(map(str, lora.ranks))}" if lora.ranks else ""
    alpha = f", alpha {', '.join(f'{alpha:g}' for alpha in lora.alphas)}," if lora.alphas else ""
    metadata = "; ".join(metadata_lines(lora.metadata))
    return LoraError(
        f"{lora.path} {why}.\n  {found.keys} of its {total} keys match. It is a {' and '.join(lora.kinds)}"
        f"{rank}{alpha} in {lora.layout} layout, and seems to be made for {made_for(lora, fits(lora))}"
        + (f"\n  {metadata}" if metadata else ""),
        shlex.join(["lcm-compile", "inspect", str(lora.path)]) + advice,
    )


def check_loras(
    modules: Mapping[str, torch.nn.Module], loras: Sequence[tuple[Lora, LoraSpec]]
) -> list[LoraProvenance]:
    """Returns how each LoRA will be merged into these modules, given by component; they need no weights.

    Raises LoraError if a LoRA does not fit, if all its updates are zero, or if it has a strength for a part
    that the base lacks.
    """
    provenance = []
    for lora, spec in loras:
        pairs = match_layers(lora, modules)
        if not any(is_change(layer.update, place.module) for layer, place in pairs):
            raise refusal(lora, "changes nothing: every update in it is zero", Match(pairs, [], []))
        check_strengths(modules, spec)
        provenance.append(
            LoraProvenance(
                spec.source,
                spec.weight,
                spec.strengths,
                lora.layout,
                len(pairs),
                tuple(lora.ranks),
                lora.skipped,
                spec.name,
            )
        )
    return provenance


def merge_loras(modules: Mapping[str, torch.nn.Module], loras: Sequence[tuple[Lora, LoraSpec]]) -> None:
    """Adds Σ λ·ΔW to the weights and biases of these components, in fp32 and in place.

    A LoRA's layers for other components are ignored. Each ΔW is computed from the base's own weight W, so the
    order of several LoRAs does not matter. This holds for DoRAs too: their change W' − W comes from the base
    alone, and the other LoRAs do not change its norms. Raises LoraError if a layer does not fit.
    """
    work: dict[torch.nn.Module, list[tuple[float, Update]]] = {}
    with torch.no_grad():
        for lora, spec in loras:
            here = [layer for layer in lora.layers if layer.component in modules]
            for layer, place in match_layers(replace(lora, layers=here), modules):
                if strength := spec.strength_of(place.part):
                    work.setdefault(place.module, []).append((strength, layer.update))
        for module, updates in work.items():
            weight = weight_of(module)
            base = weight.clone()
            for strength, update in updates:
                weight += update.delta(base, strength)
                if update.bias is not None:
                    bias = bias_of(module)
                    assert bias is not None  # match_layers raises if a bias update has no bias
                    bias += strength * update.bias.float()


def check_strengths(modules: Mapping[str, torch.nn.Module], spec: LoraSpec) -> None:
    """Raises LoraError if the spec has a strength for a part that the base lacks."""
    if not spec.strengths:
        return
    blocks = {".".join(name.split(".")[:2]) for name, _ in modules["unet"].named_modules()}
    parts = {"text", "down_blocks", "up_blocks", *modules, *(b for b in blocks if LORA_PART.fullmatch(b))}
    if missing := sorted(spec.strengths.keys() - parts):
        raise LoraError(
            f"LoRA {spec} has a strength for {', '.join(missing)}, which this base lacks",
            f"give strengths for these only: {', '.join(sorted(parts - {'vae'}))}",
        )


def is_change(update: Update, module: torch.nn.Module) -> bool:
    """Returns whether an update changes its module's weight or bias at all.

    For a module on the meta device it takes a weight of ones, and for a DoRA one of zeros.
    """
    weight, bias = weight_of(module), update.bias
    if weight.is_meta:
        weight = torch.full(weight.shape, 0.0 if update.magnitude is not None else 1.0)
    return bool(update.delta(weight).any()) or (bias is not None and bool(bias.any()))
