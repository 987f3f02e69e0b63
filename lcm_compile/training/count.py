"""What a training will train and write, counted on shapes alone: no weights, no memory, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lcm_compile.checkpoint.configs import UNETS
from lcm_compile.checkpoint.empty_modules import empty_unet
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.training.full import with_guidance


@dataclass(frozen=True)
class Size:
    """Parameters, adapted modules (0: every weight is trained) and the bytes of the weights to be written."""

    base: str
    unet_parameters: int
    trainable_parameters: int
    modules: int
    file_bytes: int


def count_lora(base: str, rank: int, endings: Sequence[str]) -> Size:
    """A LoRA of some rank on the modules whose names end so, written in half precision."""
    unet = empty_unet(unet_config(base))
    adapted = [
        module
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and f".{name}".endswith(tuple(f".{e}" for e in endings))
    ]
    count = sum(adapter_size(module, rank) for module in adapted)
    return Size(base, parameters(unet), count, len(adapted), 2 * count)


def count_full(base: str) -> Size:
    """A whole UNet with its guidance embedding, written in single precision."""
    config = unet_config(base)
    count = parameters(empty_unet(with_guidance(config)))
    return Size(base, parameters(empty_unet(config)), count, 0, 4 * count)


def unet_config(base: str) -> Mapping[str, Any]:
    return UNETS[base] if base in UNETS else open_checkpoint(base).unet


def adapter_size(module: nn.Linear | nn.Conv2d, rank: int) -> int:
    """Parameters of down (r, in, kernel) and up (out, r): Hu et al. 2021."""
    out, *rest = module.weight.shape
    return rank * (out + torch.Size(rest).numel())


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
