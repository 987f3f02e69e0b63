"""What `distill --finetune` begins with: a full LCM, or a LoRA's own adapters in the UNet of its base."""

from __future__ import annotations

from typing import Any

import torch

from lcm_compile.checkpoint.empty_modules import empty_unet
from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.errors import LoraError, UsageError
from lcm_compile.lora.find import find_lora
from lcm_compile.lora.merge import match_layers
from lcm_compile.lora.metadata import method_of
from lcm_compile.lora.read import Lora, read_lora
from lcm_compile.spec import LoraSpec


def check_tuning(checkpoint: Checkpoint, lora: str | None, method: str) -> None:
    """Raises UsageError unless there is one LCM to tune: the base, or the LoRA `lora` on it."""
    if not checkpoint.has_guidance_embedding:
        if lora is None:
            raise UsageError(
                f"{checkpoint.base} is no full LCM, so there is nothing to tune",
                "give the LCM-LoRA to tune on it to --lora; or distil it first, without --finetune",
            )
    elif lora is not None or method != "lcm":
        raise UsageError(
            f"{checkpoint.base} is a full LCM, which is tuned as a whole",
            f"drop {'--lora' if lora is not None else f'--method {method}'}",
        )


def open_lora(source: str, checkpoint: Checkpoint, method: str) -> Lora:
    """Returns the few-step LoRA to tune; `source` is a path or a hub id.

    Raises LoraError if it can't be found or read, if it does not fit the base, or if it holds more than plain
    LoRAs of the UNet's layers; and UsageError if its file says that it was distilled by another method.
    """
    lora = read_lora(find_lora(LoraSpec(source)))
    others = {layer.update.name for layer in lora.layers if layer.update.factors.keys() != {"down", "up"}}
    others |= {"bias" for layer in lora.layers if layer.update.bias is not None}
    others |= {"DoRA" for layer in lora.layers if layer.update.magnitude is not None}
    others |= {layer.component for layer in lora.layers} - {"unet"}
    others |= {"embeddings"} if lora.embeddings else set()
    if others:
        raise LoraError(
            f"{lora.path} can't be tuned: it holds {', '.join(sorted(others))}, and not only plain LoRAs of "
            "the UNet's layers",
            f"lcm-compile inspect {lora.path}",
        )
    match_layers(lora, {"unet": empty_unet(checkpoint.unet)})
    made = method_of(lora.metadata)
    if made is not None and made != method:
        raise UsageError(f"{lora.path} was distilled by --method {made}", f"tune it with --method {made}")
    return lora


def add_adapters_of(unet: Any, lora: Lora) -> None:
    """Adds the adapters of a LoRA to a frozen UNet, so that only they are trained.

    Each has the LoRA's rank for its module and α = rank, so α/r is multiplied into its second matrix.
    """
    from peft import LoraConfig

    updates = {place.name: layer.update for layer, place in match_layers(lora, {"unet": unet})}
    ranks = {name: update.factors["down"].shape[0] for name, update in updates.items()}
    unet.add_adapter(LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks))
    with torch.no_grad():
        for name, update in updates.items():
            module = unet.get_submodule(name)
            for matrix, factor, scale in (("lora_A", "down", 1.0), ("lora_B", "up", update.scale())):
                weight = getattr(module, matrix)["default"].weight
                weight.copy_(update.factors[factor].reshape(weight.shape).float() * scale)
