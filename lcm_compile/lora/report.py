"""Reports about a LoRA for `inspect`: its kind, its base, its trigger words, and how much it changes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.lora.guess_base import fits, made_for
from lcm_compile.lora.kinds import Update
from lcm_compile.lora.match import Match, Place, bias_of, block_of, match, weight_of
from lcm_compile.lora.metadata import describe_metadata, frequent_tags
from lcm_compile.lora.read import Lora, LoraLayer

KEYS_SHOWN = 10
REST = "unet, rest"  # the modules in no block: the embeddings, the first and the last layers
# The order in which the UNet computes its blocks, under diffusers' names and under the original ones.
ORDER = ("down_blocks", "input_blocks", "mid_block", "middle_block", "up_blocks", "output_blocks", "unet")


def describe_lora(lora: Lora, base: Checkpoint | None) -> dict[str, Any]:
    """Returns the report on a LoRA as a dictionary for JSON.

    The LoRA is matched to the base if one is given, else to the family that fits best. Raises LoraError if
    two layers update one module, and CheckpointError if the base can't be loaded.
    """
    found = fits(lora)
    if base is None:
        matched = found[0].match if found else None
        matched_to = found[0].family if found else None
    else:
        components = {layer.component for layer in lora.layers} & base.components.keys()
        matched = match(lora, {name: load_component(base, name) for name in components})
        matched_to = base.base
    updates = [layer.update for layer in lora.layers]
    return {
        "lora": str(lora.path),
        "layout": lora.layout,
        "kinds": lora.kinds,
        "ranks": counted(update.rank for update in updates),
        "alphas": counted(update.alpha for update in updates),
        "modules": len(updates),
        "keys": sum(len(layer.keys) for layer in lora.layers),
        "parameters": sum(parameters(update) for update in updates),
        "made_for": made_for(lora, found),
        "fits": {fit.family: fit.match.keys for fit in found},
        "matched_to": matched_to,
        "matched_keys": matched.keys if matched else 0,
        "unmatched": counted_names(matched.unmatched if matched else []),
        "misshapen": counted_names(matched.misshapen if matched else []),
        "skipped": dict(lora.skipped),
        "embeddings": {word: list(keys) for word, keys in lora.embeddings.items()},
        "metadata": describe_metadata(lora.metadata),
        "likely_triggers": frequent_tags(lora.metadata),
        "change": change_rows(lora.layers, matched, weighed=base is not None),
    }


def counted(values: Any) -> dict[str, int]:
    """Returns the number of modules with each value, in ascending order of values. None is not counted."""
    counts = Counter(value for value in values if value is not None)
    return {f"{value:g}": counts[value] for value in sorted(counts)}


def parameters(update: Update) -> int:
    """Returns the number of values in an update's factors, magnitude and bias."""
    tensors = [*update.factors.values(), update.magnitude, update.bias]
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def counted_names(names: Sequence[str]) -> dict[str, Any]:
    """Returns how many names there are, and the first KEYS_SHOWN of them."""
    return {"count": len(names), "some": list(names[:KEYS_SHOWN])}


def change_rows(layers: Sequence[LoraLayer], matched: Match | None, weighed: bool) -> list[dict[str, Any]]:
    """Returns for each block the Frobenius norm ‖ΔW‖ at weight 1, and ‖ΔW‖/‖W‖ over the changed modules.

    `weighed` says that the matched modules have the base's weights. Without them ‖ΔW‖/‖W‖ is None, and ‖ΔW‖
    is None for a block with a DoRA in it, whose change depends on W.
    """
    places = {id(layer): place for layer, place in matched.pairs} if matched else {}
    blocks: dict[str, list[tuple[float | None, float]]] = defaultdict(list)
    for layer in layers:
        place = places.get(id(layer))
        if place is None and weighed:
            continue
        name = place.name if place else layer.module
        sizes = weigh(layer.update, place) if place and weighed else (layer.update.norm(), 0.0)
        block = block_of(layer.component, name) or layer.component
        blocks[REST if block == "unet" else block].append(sizes)
    rows = []
    for block in sorted(blocks, key=position):
        deltas = [delta for delta, _ in blocks[block] if delta is not None]
        all_known = len(deltas) == len(blocks[block])
        change, weight = math.hypot(*deltas), math.hypot(*(weight for _, weight in blocks[block]))
        rows.append(
            {
                "block": block,
                "modules": len(blocks[block]),
                "norm": change if all_known else None,
                "relative": change / weight if weight else None,
            }
        )
    return rows


def weigh(update: Update, place: Place) -> tuple[float, float]:
    """Returns ‖ΔW‖ and ‖W‖ of one module. Both include the bias if the update changes it."""
    weight = weight_of(place.module)
    sizes = float(update.delta(weight).norm()), float(weight.norm())
    bias = bias_of(place.module)
    if update.bias is None or bias is None:
        return sizes
    return math.hypot(sizes[0], float(update.bias.float().norm())), math.hypot(sizes[1], float(bias.norm()))


def position(block: str) -> tuple[int, int, str]:
    """Returns a block's sort key: blocks come in the order of ORDER, and text encoders come last."""
    name, _, number = block.partition(".")
    kind = next((i for i, start in enumerate(ORDER) if name.startswith(start)), len(ORDER))
    return kind, int(number or 0), block
