"""Reads folders that PEFT's `save_pretrained` writes: a file of weights, and a config that holds their α."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.errors import LoraError

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there is read
PREFIX = "base_model.model."  # of every key
# The component that each class of model is, by the class's name in the config.
COMPONENTS = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
# Initialisations that change the base's own weights before training. A folder does not hold those weights.
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq")


def lora_files_of(path: Path) -> list[Path]:
    """Returns the files that hold a LoRA, given by its file or its PEFT folder. The weights come last."""
    if not path.is_dir():
        return [path]
    weights = [path / name for name in WEIGHTS]
    return [path / CONFIG, next((file for file in weights if file.is_file()), weights[0])]


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the adapter config in a PEFT folder.

    Raises LoraError if the config can't be read, or if its adapter's change is not α/r·B·A.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise LoraError(f"{path} can't be read: {error}", "save the adapter again") from error
    start = config.get("init_lora_weights")
    if config.get("peft_type") != "LORA":
        reason = f"its peft_type is {config.get('peft_type')!r}, and only 'LORA' can be read from a folder"
    elif "lora_alpha" not in config:
        reason = "it has no lora_alpha"
    elif config.get("fan_in_fan_out"):
        reason = "it is for transposed weights (fan_in_fan_out)"
    elif isinstance(start, str) and start.lower().startswith(MOVES_THE_BASE):
        reason = f"its init_lora_weights is {start}, which changes the base's own weights too"
    else:
        return config
    raise LoraError(f"{path} can't be used: {reason}", "save the adapter as a plain LoRA")


def component_of(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Returns the component that an adapter is for.

    The config may name the class that PEFT wrapped. If it does not, the keys decide between the UNet and the
    first text encoder.
    """
    wrapped = config.get("auto_mapping")
    name = wrapped.get("base_model_class") if isinstance(wrapped, dict) else None
    if name in COMPONENTS:
        return COMPONENTS[name]
    return "text_encoder" if any("encoder.layers." in key for key in keys) else "unet"


def as_one_file(
    folder: Path, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors and the metadata that diffusers would write into one file for the same LoRA.

    Raises LoraError as read_config does.
    """
    config = read_config(folder)
    component = component_of(config, tensors)
    settings = {f"{component}.{name}": value for name, value in config.items()}
    renamed = {f"{component}.{key.removeprefix(PREFIX)}": tensor for key, tensor in tensors.items()}
    return renamed, {"lora_adapter_metadata": json.dumps(settings)}
