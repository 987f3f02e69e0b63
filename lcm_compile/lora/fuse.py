"""A base with its LoRAs merged, written as a checkpoint of its own: one model at a time is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lcm_compile.checkpoint.checkpoint import Checkpoint
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.load import load_component, quiet_libraries
from lcm_compile.checkpoint.open import open_base
from lcm_compile.checkpoint.tensor_stream import TYPES, write_header
from lcm_compile.checkpoint.write_folder import write_settings
from lcm_compile.checkpoint.write_single_file import original_weights
from lcm_compile.errors import UsageError
from lcm_compile.lora.find import find_loras
from lcm_compile.lora.merge import check_loras, merge_loras
from lcm_compile.lora.read import Lora, read_lora
from lcm_compile.spec import BuildSpec, LoraSpec
from lcm_compile.system.cache import Digests
from lcm_compile.system.files import check_out, check_space, replacing_output
from lcm_compile.system.stopwatch import Report, Stopwatch, silent

FILE_ENDING = ".safetensors"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # as the SAI model spec calls them


def fuse(spec: BuildSpec, out: Path, precision: str, report: Report = silent) -> None:
    """Writes a spec's base with its LoRAs and VAE, whole or not at all.

    `out` is a new diffusers folder, with LCMScheduler where the result is an LCM; or, by its ending, one
    file in the original layout. UsageError, CheckpointError or LoraError where that can't be.
    """
    as_file = out.suffix == FILE_ENDING
    check_out(out, folder=not as_file)
    checkpoint = open_base(spec, half=precision == "fp16")
    planned = find_loras(spec, checkpoint, Digests())
    loras = [(read_lora(p.path), p.spec) for p in planned]
    with quiet_libraries():
        empty = {name: empty_module(component) for name, component in checkpoint.components.items()}
    check_loras(empty, loras)
    count = sum(weight.numel() for module in empty.values() for weight in module.parameters())
    check_space(out, count * TYPES[precision][1])
    watch = Stopwatch(report)
    with replacing_output(out) as part:
        if as_file:
            write_file(part, checkpoint, empty, loras, precision, watch)
        else:
            lcm = checkpoint.has_guidance_embedding or any(p.role == "lcm" for p in planned)
            write_folder(part, checkpoint, loras, precision, lcm, watch)


def merged(checkpoint: Checkpoint, name: str, loras: list[tuple[Lora, LoraSpec]]) -> Any:
    module = load_component(checkpoint, name)
    merge_loras({name: module}, loras)
    return module


def write_folder(
    part: Path,
    checkpoint: Checkpoint,
    loras: list[tuple[Lora, LoraSpec]],
    precision: str,
    lcm: bool,
    watch: Stopwatch,
) -> None:
    write_settings(checkpoint, part, lcm)
    for name in checkpoint.components:
        with watch.task(f"write {name}"), quiet_libraries():
            merged(checkpoint, name, loras).to(dtype_of(precision)).save_pretrained(part / name)


def write_file(
    part: Path,
    checkpoint: Checkpoint,
    empty: Mapping[str, torch.nn.Module],
    loras: list[tuple[Lora, LoraSpec]],
    precision: str,
    watch: Stopwatch,
) -> None:
    """One file: the header from shapes alone, then each model's tensors as they come."""
    if checkpoint.has_guidance_embedding:
        raise UsageError(
            f"{checkpoint.base} is a full LCM, which is told the guidance scale: the original layout has no "
            "name for that weight",
            "give a folder to --out",
        )
    if checkpoint.lossy:
        raise UsageError(
            "the original layout has no names for a tiny autoencoder's weights",
            "give a folder to --out, or leave --vae out",
        )
    xl = checkpoint.architecture == "sdxl"
    configs = {name: component.config for name, component in checkpoint.components.items()}
    shapes = {
        key: weight.shape
        for name, config in configs.items()
        for key, weight in original_weights(name, config, xl, empty[name])
    }
    told = PREDICTIONS.get(checkpoint.scheduler.prediction_type)
    with part.open("wb") as file:
        write_header(file, shapes, precision, {"modelspec.prediction_type": told} if told else {})
        for name, config in configs.items():
            with watch.task(f"write {name}"):
                module = merged(checkpoint, name, loras)
                for _, weight in original_weights(name, config, xl, module):
                    file.write(weight.to(dtype_of(precision)).contiguous().numpy().data)
                del module, weight  # before the next one is loaded


def dtype_of(precision: str) -> torch.dtype:
    return {"fp16": torch.float16, "fp32": torch.float32}[precision]
