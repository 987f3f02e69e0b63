"""Writes a base with its LoRAs merged as a new checkpoint. One model at a time is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lcm_compile.checkpoint.checkpoint import FUSED_FEW_STEP, Checkpoint
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.load import load_component, quiet_libraries
from lcm_compile.checkpoint.open import open_base
from lcm_compile.checkpoint.tensor_stream import TYPES, write_header
from lcm_compile.checkpoint.write_folder import save_model, write_settings
from lcm_compile.checkpoint.write_single_file import original_weights
from lcm_compile.errors import UsageError
from lcm_compile.lora.bundled_words import with_bundled_words
from lcm_compile.lora.few_step import FewStep
from lcm_compile.lora.find import find_loras, plan_few_step
from lcm_compile.lora.merge import check_loras, merge_loras
from lcm_compile.lora.read import Lora, read_loras
from lcm_compile.spec import BuildSpec, LoraProvenance, LoraSpec
from lcm_compile.system.cache import Digests
from lcm_compile.system.files import check_out, check_space, replacing_output
from lcm_compile.system.stopwatch import Report, Stopwatch, silent

FILE_ENDING = ".safetensors"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers' name → the SAI model spec's


def fuse(
    spec: BuildSpec, out: Path, precision: str, report: Report = silent
) -> tuple[Checkpoint, list[LoraProvenance]]:
    """Writes a spec's base with its LoRAs and its VAE, and returns that base, and what was fused into it.

    The output appears complete or not at all.

    If `out` ends in .safetensors, it becomes one file in the original layout. Otherwise it becomes a new
    diffusers folder, whose scheduler is the few-step method's or a full LCM's. `precision` is `fp16` or
    `fp32`. Raises UsageError, CheckpointError or LoraError if that can't be done.
    """
    if spec.runtime_loras:
        raise UsageError(
            f"fuse writes weights, in which that of LoRA {spec.runtime_loras[0].name} can't be changed later",
            "drop its :runtime",
        )
    as_file = out.suffix == FILE_ENDING
    check_out(out, folder=not as_file)
    checkpoint = open_base(spec, half=precision == "fp16")
    few_step = plan_few_step(spec, checkpoint)
    planned = find_loras(spec, few_step, Digests())
    checkpoint = with_bundled_words(few_step.checkpoint, planned, spec.lora_skip)
    loras = read_loras(planned, spec.lora_skip)
    with quiet_libraries():
        empty = {name: empty_module(component) for name, component in checkpoint.components.items()}
    provenance = check_loras(empty, loras)
    count = sum(weight.numel() for module in empty.values() for weight in module.parameters())
    check_space(out, count * TYPES[precision][1])
    watch = Stopwatch(report)
    with replacing_output(out) as part:
        if as_file:
            write_file(part, checkpoint, empty, loras, precision, few_step.row, watch)
        else:
            write_folder(part, checkpoint, loras, precision, few_step.row, watch)
    return checkpoint, provenance


def merged(checkpoint: Checkpoint, name: str, loras: list[tuple[Lora, LoraSpec]]) -> Any:
    """Loads a component in fp32, merges the LoRAs into it, and returns it.

    Raises CheckpointError if its weights are damaged.
    """
    return load_component(checkpoint, name, lambda module: merge_loras({name: module}, loras))


def write_folder(
    part: Path,
    checkpoint: Checkpoint,
    loras: list[tuple[Lora, LoraSpec]],
    precision: str,
    few_step: FewStep | None,
    watch: Stopwatch,
) -> None:
    """Writes a diffusers folder. Its scheduler is the few-step method's, a full LCM's, or else the base's."""
    if few_step is not None:
        write_settings(checkpoint, part, few_step.sampler, few_step.name)
    else:
        write_settings(checkpoint, part, "lcm" if checkpoint.has_guidance_embedding else None)
    for name in checkpoint.components:
        with watch.task(f"write {name}"), quiet_libraries():
            save_model(name, merged(checkpoint, name, loras).to(dtype_of(precision)), part / name)


def write_file(
    part: Path,
    checkpoint: Checkpoint,
    empty: Mapping[str, torch.nn.Module],
    loras: list[tuple[Lora, LoraSpec]],
    precision: str,
    few_step: FewStep | None,
    watch: Stopwatch,
) -> None:
    """Writes one file: first the header, from the shapes in `empty`, then the tensors of one model at a time.

    Raises UsageError if the original layout has no names for some of the weights.
    """
    if checkpoint.embeddings:
        raise UsageError(
            "the words of textual inversions have no place in one file, whose readers have a tokenizer of "
            "their own",
            "give a folder to --out, or leave them out; --lora-skip 'bundle_emb.*' leaves out those of LoRAs",
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
    scheduler = checkpoint.scheduler
    prediction = PREDICTIONS.get(scheduler.prediction_type)
    metadata = {"modelspec.prediction_type": prediction} if prediction else {}
    metadata |= {FUSED_FEW_STEP.removeprefix("_"): few_step.name} if few_step else {}
    # Empty tensors by whose keys ComfyUI, Forge and webui tell what a UNet predicts, and from which noise on.
    marks = {"v_pred": scheduler.prediction_type == "v_prediction", "ztsnr": scheduler.rescale_betas_zero_snr}
    shapes = {key: torch.Size([0]) for key, told in marks.items() if told} | shapes
    with part.open("wb") as file:
        write_header(file, shapes, precision, metadata)
        for name, config in configs.items():
            with watch.task(f"write {name}"):
                module = merged(checkpoint, name, loras)
                for _, weight in original_weights(name, config, xl, module):
                    file.write(weight.to(dtype_of(precision)).contiguous().numpy().data)
                del module, weight  # before the next one is loaded


def dtype_of(precision: str) -> torch.dtype:
    """Returns torch's type of a precision: `fp16` or `fp32`."""
    return {"fp16": torch.float16, "fp32": torch.float32}[precision]
