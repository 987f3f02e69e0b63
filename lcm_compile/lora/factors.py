"""The low-rank form of LoRAs that are not fused: ΔW = up·down for each layer, up to a stated error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcm_compile.errors import LoraError
from lcm_compile.lora.kinds import Update
from lcm_compile.lora.match import Match, Place, weight_of
from lcm_compile.lora.merge import match_layers, refusal
from lcm_compile.lora.read import Lora, read_lora

EXACT = 1e-6  # of ΔW's norm: the error of a form that counts as exact, which is that of fp32
FUSE = "fuse it: without :runtime, or with build --lora"


@dataclass(frozen=True)
class LayerFactors:
    """One layer's part of a LoRA at strength 1: ΔW = up·down, with up (out, r) and down (r, in·k·k)'s shape.

    `down` has the shape of the layer's weight but for its first axis. `bias` is what is added to the layer's
    bias, or None. `error` is the norm of what the form leaves out, as a share of ΔW's.
    """

    place: Place
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    error: float


def factors_of(
    lora: Lora, modules: Mapping[str, torch.nn.Module], most_rank: int | None = None
) -> list[LayerFactors]:
    """Returns the low-rank form of a LoRA for these modules, given by component; they need no weights.

    Without `most_rank` the form is exact. Otherwise updates that are no product of factors are approximated
    by one of that rank. Raises LoraError if the LoRA does not fit, if its change is not λ times a matrix that
    the file alone gives, if it changes a norm, or if its own rank is above `most_rank`.
    """
    pairs = match_layers(lora, modules)
    refuse_others(lora, [(layer.update, place) for layer, place in pairs])
    if most_rank is not None:
        refuse_ranks(lora, most_rank)
    return [layer_factors(layer.update, place, most_rank) for layer, place in pairs]


def refuse_others(lora: Lora, pairs: Sequence[tuple[Update, Place]]) -> None:
    """Raises LoraError if an update can't be a branch beside its layer."""
    kinds = dict.fromkeys(
        update.name for update, _ in pairs if not update.is_additive or update.magnitude is not None
    )
    if kinds:
        why = f"can't be changed at run time: a {' and '.join(kinds)} changes weights by what they are"
        raise fuse_instead(lora, why)
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    others = [place.name for _, place in pairs if not isinstance(place.module, layers)]
    if others:
        raise fuse_instead(lora, f"can't be changed at run time: it changes {others[0]}, which is no matrix")


def refuse_ranks(lora: Lora, most: int) -> None:
    """Raises LoraError if a LoRA or LoCon has a higher rank than `most`."""
    over = [layer.update.rank or 0 for layer in lora.layers if is_product(layer.update)]
    if over and max(over) > most:
        raise fuse_instead(lora, f"has rank {max(over)}, and this bundle's slots have rank {most}", max(over))


def fuse_instead(lora: Lora, why: str, rank: int | None = None) -> LoraError:
    """Returns the error for a LoRA that can't be used at run time, or only in slots of a `rank`."""
    advice = f"build with --lora-rank {rank}; or {FUSE}" if rank else FUSE
    return LoraError(refusal(lora, why, Match([], [], [])).message, advice)


def is_product(update: Update) -> bool:
    """Returns whether an update is stored as the product of two matrices."""
    return {"down", "up"} <= update.factors.keys()


def layer_factors(update: Update, place: Place, most_rank: int | None) -> LayerFactors:
    """Returns the low-rank form of one layer's update. See factors_of."""
    shape = weight_of(place.module).shape
    bias = None if update.bias is None else update.bias.float()
    if not update.factors:
        return LayerFactors(place, torch.zeros(0, *shape[1:]), torch.zeros(shape[0], 0), bias, 0.0)
    factors = {name: tensor.float() for name, tensor in update.factors.items()}
    if is_product(update):
        down, up = factors["down"], factors["up"].flatten(1) * update.scale()
        if "mid" in factors:
            down = torch.einsum("ij...,jq->iq...", factors["mid"], down.flatten(1))
        return LayerFactors(place, down.reshape(-1, *shape[1:]), up, bias, 0.0)
    made = update.delta(torch.empty(shape)).flatten(1)
    up, down, error = low_rank_form(made, most_rank)
    return LayerFactors(place, down.reshape(-1, *shape[1:]), up, bias, error)


def low_rank_form(matrix: torch.Tensor, most_rank: int | None) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Returns (up, down, error) of the smallest rank whose error is EXACT, or else of `most_rank`.

    By Eckart and Young (1936) no other matrices of that rank are closer.
    """
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    energy = sizes.double().square()
    total = energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
    left_out = (energy.flip(0).cumsum(0).flip(0) / total).sqrt()  # with the first n, entry n is the error
    exact = int((left_out > EXACT).sum())
    rank = exact if most_rank is None else min(exact, most_rank)
    error = 0.0 if rank == exact else float(left_out[rank])
    return left[:, :rank] * sizes[:rank], right[:rank], error


def largest_error(layers: Sequence[LayerFactors]) -> float:
    """Returns the largest error of these layers, as a share of their change."""
    return max((layer.error for layer in layers), default=0.0)


def in_slots(
    path: Path, modules: Mapping[str, torch.nn.Module], rank: int
) -> tuple[dict[str, tuple[Any, Any, str]], float]:
    """Returns (down, up, part) of each layer of a LoRA's file as NumPy arrays, and the largest error.

    The layers are named by component and module, with a point between. Raises LoraError as factors_of does,
    and if the LoRA changes biases or brings words of its own, for which slots have no room.
    """
    lora = read_lora(path)
    layers = factors_of(lora, modules, rank)
    if any(layer.bias is not None for layer in layers):
        raise fuse_instead(lora, "can't be put into a slot: it changes biases")
    if lora.embeddings:
        words = ", ".join(lora.embeddings)
        raise fuse_instead(lora, f"can't be put into a slot: it brings the words {words} along")
    named = {
        f"{layer.place.component}.{layer.place.name}": (
            layer.down.numpy(),
            layer.up.numpy(),
            layer.place.part,
        )
        for layer in layers
    }
    return named, largest_error(layers)


def modules_of_layers(layers: Mapping[str, Sequence[int]]) -> dict[str, torch.nn.Module]:
    """Returns components, by name, with these layers alone; they have no weights.

    The layers are named as in_slots names them, each with its weight's shape. Making them needs neither a
    config nor diffusers, whose import takes seconds.
    """
    tree: dict[str, Any] = {}
    for name, shape in layers.items():
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = empty_layer(shape)
    return {component: module_of(children) for component, children in tree.items()}


def empty_layer(shape: Sequence[int]) -> torch.nn.Module:
    """Returns a linear layer or a convolution without weights, whose weight has this shape."""
    out, ins, *kernel = shape
    if not kernel:
        return torch.nn.Linear(ins, out, device="meta")
    return torch.nn.Conv2d(ins, out, (kernel[0], kernel[1]), device="meta")


def module_of(children: Mapping[str, Any]) -> torch.nn.Module:
    """Returns a module with these children: a list if they are numbered without gaps."""
    made = {name: module_of(child) if isinstance(child, dict) else child for name, child in children.items()}
    if made.keys() == (numbers := {str(i): None for i in range(len(made))}).keys():
        return torch.nn.ModuleList(made[number] for number in numbers)
    module = torch.nn.Module()
    for name, child in made.items():
        module.add_module(name, child)
    return module


def check_at_run_time(lora: Lora, modules: Mapping[str, torch.nn.Module]) -> None:
    """Raises LoraError if a LoRA can't be a branch beside the layers of these modules."""
    refuse_others(lora, [(layer.update, place) for layer, place in match_layers(lora, modules)])
