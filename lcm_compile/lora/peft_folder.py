"""Folders that PEFT's `save_pretrained` writes: weights without α, and a config that tells it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.errors import LoraError

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
COMPONENTS = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
# Ways to start a LoRA that take something out of the base's own weights, which a folder does not hold.
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq")


def lora_files_of(path: Path) -> list[Path]:
    """The files that a LoRA's content is in, the weights last."""
    return [path / CONFIG, path / WEIGHTS] if path.is_dir() else [path]


def read_config(folder: Path) -> dict[str, Any]:
    """LoraError where it can't be read, or is of an adapter that α/r·B·A does not describe."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise LoraError(f"{path} can't be read: {error}", "save the adapter again") from error
    start = config.get("init_lora_weights")
    if config.get("peft_type") != "LORA":
        reason = f"its peft_type is {config.get('peft_type')!r}, and only LORA is read from a folder"
    elif "lora_alpha" not in config:
        reason = "it has no lora_alpha"
    elif config.get("fan_in_fan_out"):
        reason = "it is for transposed weights (fan_in_fan_out)"
    elif isinstance(start, str) and start.lower().startswith(MOVES_THE_BASE):
        reason = f"it starts with {start}, which changes the base's own weights too"
    else:
        return config
    raise LoraError(f"{path} can't be used: {reason}", "save the adapter as a plain LoRA")


def component_of(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """What the adapter is for, by the class that PEFT wrapped, or by its keys where that was not kept."""
    wrapped = config.get("auto_mapping")
    name = wrapped.get("base_model_class") if isinstance(wrapped, dict) else None
    if name in COMPONENTS:
        return COMPONENTS[name]
    return "text_encoder" if any("encoder.layers." in key for key in keys) else "unet"


def as_one_file(
    folder: Path, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata that the same LoRA has in a file of diffusers. See read_config."""
    config = read_config(folder)
    component = component_of(config, tensors)
    settings = {f"{component}.{name}": value for name, value in config.items()}
    renamed = {f"{component}.{key.removeprefix(PREFIX)}": tensor for key, tensor in tensors.items()}
    return renamed, {"lora_adapter_metadata": json.dumps(settings)}
