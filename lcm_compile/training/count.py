"""Counts the parameters that a training will train and the bytes that it will write.

Counting uses shapes alone, so it needs no weights, no memory for them and no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lcm_compile.checkpoint.empty_modules import empty_unet
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.training.finetune import check_tuning, open_lora
from lcm_compile.training.full import with_guidance


@dataclass(frozen=True)
class Size:
    """The size of a training.

    `modules` counts the adapted modules; it is 0 if every weight is trained. `file_bytes` counts the weights
    that will be written.
    """

    base: str
    unet_parameters: int
    trainable_parameters: int
    modules: int
    file_bytes: int


def count_lora(base: str, rank: int, endings: Sequence[str]) -> Size:
    """Counts a LoRA on the linear and convolution modules whose names end in `endings`, written in fp16."""
    unet = empty_unet(unet_config(base))
    adapted = [
        module
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and f".{name}".endswith(tuple(f".{e}" for e in endings))
    ]
    count = sum(adapter_size(module, rank) for module in adapted)
    return Size(base, parameters(unet), count, len(adapted), 2 * count)


def count_tuning(base: str, lora: str | None, method: str) -> Size:
    """Counts what `--finetune` trains: a LoRA on its base, or a full LCM.

    Raises LoraError and UsageError as `check_tuning` and `open_lora` do.
    """
    checkpoint = open_checkpoint(base)
    check_tuning(checkpoint, lora, method)
    if lora is None:
        return count_full(base)
    layers = open_lora(lora, checkpoint, method).layers
    count = sum(factor.numel() for layer in layers for factor in layer.update.factors.values())
    return Size(base, parameters(empty_unet(checkpoint.unet)), count, len(layers), 2 * count)


def count_full(base: str) -> Size:
    """Counts a complete UNet with its guidance embedding, written in fp32."""
    config = unet_config(base)
    count = parameters(empty_unet(with_guidance(config)))
    return Size(base, parameters(empty_unet(config)), count, 0, 4 * count)


def unet_config(base: str) -> Mapping[str, Any]:
    """Returns the UNet's config of a family such as `sdxl`, or of a checkpoint."""
    family = FAMILIES.get(base)
    return family.models["unet"] if family and family.models else open_checkpoint(base).unet


def adapter_size(module: nn.Linear | nn.Conv2d, rank: int) -> int:
    """Returns the parameters of down (r, in, kernel) and up (out, r) together: Hu et al. 2021."""
    out, *rest = module.weight.shape
    return rank * (out + torch.Size(rest).numel())


def parameters(module: nn.Module) -> int:
    """Returns the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
