"""Weights of a compiled engine in a safetensors file beside it.

Engines of several bundles and sizes that have equal weights so have equal files, which the store keeps once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The key of the file's metadata that holds the strides of arrays which are not contiguous.
STRIDES = "strides"


def write_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes arrays, each in the order in which its elements lie in memory.

    The memory of an array must have no gaps, and no element twice.
    """
    import torch
    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    strides, seen = {}, set()
    for name, weight in sorted(weights.items()):
        weight = weight.detach()
        if weight.stride() != torch.empty(weight.shape, device="meta").stride():
            strides[name] = weight.stride()
            weight = weight.permute(axes_in_memory(weight.stride()))
            assert weight.is_contiguous(), f"{name} has gaps"
        # The format has no two arrays in one memory.
        whole = weight.untyped_storage().nbytes() == weight.nbytes and weight.data_ptr() not in seen
        seen.add(weight.data_ptr())
        stored[name] = weight if whole else weight.clone()
    save_file(stored, path, {STRIDES: json.dumps(strides)})
    path.chmod(0o644)  # safetensors gives its files to their owner alone, and bundles are copied


def read_weights(path: Path, device: str) -> dict[str, torch.Tensor]:
    """Returns the arrays of a file on a device, with the strides that they had. A CPU's are mapped."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device=device) as file:
        strides = json.loads(file.metadata()[STRIDES])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    for name, stride in strides.items():
        weight, axes = weights[name], axes_in_memory(stride)
        shape = [weight.shape[axes.index(axis)] for axis in range(len(stride))]
        weights[name] = weight.as_strided(shape, stride, weight.storage_offset())
    return weights


def axes_in_memory(strides: Sequence[int]) -> list[int]:
    """Returns the axes of an array in the order in which its elements lie in memory."""
    return sorted(range(len(strides)), key=lambda axis: -strides[axis])
