"""Finds the LoRAs of a build: turns a name on the command line into files and their digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lcm_compile.checkpoint.checkpoint import FUSED_FEW_STEP, Component
from lcm_compile.checkpoint.families import LCM_LORA_FILE
from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.checkpoint.hub import REPOSITORY, fetch
from lcm_compile.checkpoint.single_file import UNET
from lcm_compile.checkpoint.weight_files import read_header
from lcm_compile.errors import LoraError
from lcm_compile.lora.few_step import FewStep, few_step_of
from lcm_compile.lora.peft_folder import CONFIG, WEIGHTS, lora_files_of
from lcm_compile.spec import LORA_SUFFIXES, BuildSpec, LoraSpec
from lcm_compile.system.cache import Digests
from lcm_compile.system.files import user_path

# The LoRA's file in a folder or a repository that diffusers wrote: the first that is there is read.
LORA_FILES = (LCM_LORA_FILE, "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class PlannedLora:
    """A LoRA that will be fused: its file or folder, its weights, and the sha256 of its content."""

    role: str  # "few-step" or "style"
    spec: LoraSpec
    path: Path
    sha256: str


@dataclass(frozen=True)
class FewStepPlan:
    """The checkpoint as a few-step method draws with it, the method's row, and the LoRA that is fused for it.

    The checkpoint has the method's settings of the scheduler, and its UNet if the weights are a complete one.
    """

    checkpoint: Checkpoint
    row: FewStep | None = None
    lora: tuple[LoraSpec, Path] | None = None


def find_loras(spec: BuildSpec, few_step: FewStepPlan, digests: Digests) -> tuple[PlannedLora, ...]:
    """Returns the LoRAs of a build: the few-step LoRA, if there is one, then the styles in order.

    Raises LoraError if a LoRA can't be found or downloaded.
    """
    found = [("few-step", *few_step.lora)] if few_step.lora else []
    found += [("style", lora, find_lora(lora)) for lora in spec.loras]
    return tuple(PlannedLora(role, lora, path, lora_digest(path, digests)) for role, lora, path in found)


def plan_few_step(spec: BuildSpec, checkpoint: Checkpoint) -> FewStepPlan:
    """Returns how a spec's pictures are drawn in few steps.

    Raises UsageError if there is no such method, LoraError if its weights can't be found or downloaded, and
    CheckpointError if they can't be read.
    """
    row = few_step_of(spec, checkpoint)
    lora = few_step_weights(spec, checkpoint, row)
    if row is None and lora is None:
        return FewStepPlan(checkpoint)
    changes = row.scheduler if row else {}
    changed = replace(checkpoint, scheduler_config={**checkpoint.scheduler_config, **changes})
    if lora is None:
        return FewStepPlan(changed, row)
    path = find_few_step_file(lora, spec, row)
    if (prefix := unet_prefix(path)) is None:
        return FewStepPlan(changed, row, (lora, path))
    unet = Component("unet", checkpoint.unet, (path,), prefix=prefix)
    return FewStepPlan(replace(changed, components={**changed.components, "unet": unet}), row)


def few_step_weights(spec: BuildSpec, checkpoint: Checkpoint, row: FewStep | None) -> LoraSpec | None:
    """Returns a spec's few-step weights: those that it names, or its method's for the family, or None.

    The method's own are not added to a base that has few-step weights already or random ones, or with
    `no_lcm`. Raises LoraError if the method has none for the family.
    """
    if spec.few_step_weights or spec.no_lcm:
        return spec.few_step_weights
    if row is None or row.method == "turbo" or FUSED_FEW_STEP in checkpoint.scheduler_config:
        return None
    if checkpoint.random_seed is not None:
        return None
    family = checkpoint.family
    if source := family and row.source(family.name):
        return LoraSpec(source)
    other = f"name one with {naming(row)}, or give --no-lcm if the base has it already, or needs none"
    kind = "LCM-LoRA" if row.method == "lcm" else f"{row.name} LoRA"
    if family is None:
        raise LoraError(f"no {kind} is known for {spec.base}: its UNet belongs to no known family", other)
    raise LoraError(f"no {kind} is published for {family.description.split(',')[0]}", other)


def naming(row: FewStep | None) -> str:
    """Returns the option that names weights of a method's row."""
    return "--lcm-lora FILE" if row and row.method == "lcm" else "--few-step-lora FILE"


def find_few_step_file(lora: LoraSpec, spec: BuildSpec, row: FewStep | None) -> Path:
    """Returns the file of few-step weights. Raises LoraError as find_lora does."""
    try:
        return find_lora(lora)
    except LoraError as error:
        if spec.few_step_weights:
            raise
        other = f"name another with {naming(row)}, or give --no-lcm to fuse none"
        raise LoraError(str(error), other) from error


def unet_prefix(path: Path) -> str | None:
    """Returns what a complete UNet's keys begin with in a file, or None if the file holds no such UNet.

    Raises CheckpointError if the file can't be read.
    """
    if path.is_dir():
        return None
    keys, _ = read_header(path)
    return next((prefix for prefix in ("", UNET) if f"{prefix}{UNET_KEYS[prefix]}" in keys), None)


# A weight that every UNet has, by the prefix of its names: diffusers' names, and the original's.
UNET_KEYS = {"": "conv_in.weight", UNET: "input_blocks.0.0.weight"}


def lora_digest(path: Path, digests: Digests) -> str:
    """Returns the sha256 of a LoRA's file. For a folder with several files, one digest covers them all."""
    found = [digests.sha256(file) for file in lora_files_of(path)]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def find_lora(spec: LoraSpec) -> Path:
    """Returns the LoRA's file, or its folder if it is PEFT's.

    The source is a path or, if no such path exists, `OWNER/NAME` or `OWNER/NAME:FILE` on the hub. Raises
    LoraError if it is neither, or if neither the hub nor its cache has it.
    """
    path = user_path(spec.source)
    if path.is_dir():
        return find_in_folder(path, spec.source)
    if path.is_file():
        return path
    repository, _, file = spec.source.partition(":")
    # A name with the ending of a file is a missing path, not a hub id.
    if (
        not re.fullmatch(REPOSITORY, repository)
        or repository.endswith(LORA_SUFFIXES)
        or user_path(repository).exists()
    ):
        raise LoraError(
            f"LoRA {spec.source} does not exist",
            "check the path given to --lora, --lcm-lora or --few-step-lora",
        )
    return find_on_hub(repository, file)


def find_in_folder(folder: Path, source: str) -> Path:
    """Returns the LoRA's file in a folder, or the folder itself if it is PEFT's.

    `source` is the LoRA's name in the error. Raises LoraError if the folder holds neither.
    """
    for name in LORA_FILES:
        if (folder / name).is_file():
            return folder / name
    if not all(file.is_file() for file in lora_files_of(folder)):
        raise LoraError(
            f"{source} is a folder with neither {LCM_LORA_FILE} nor PEFT's {CONFIG} and {WEIGHTS[0]}",
            "give the LoRA's .safetensors file",
        )
    return folder


def find_on_hub(repository: str, file: str) -> Path:
    """Returns a LoRA of a hub repository, downloaded if the hub cache lacks it.

    An empty `file` means the usual names. Raises LoraError if the repository or the file can't be had.
    """
    try:
        folder = fetch(repository, [file] if file else usual_files)
    except ConnectionError as error:
        raise LoraError(
            f"LoRA {repository} is neither a path nor in the hub cache, and can't be downloaded: {error}",
            "check the path or the hub id, and the network (or HF_HOME, HF_TOKEN)",
        ) from error
    if not file:
        return find_in_folder(folder, repository)
    if not (folder / file).is_file():
        raise LoraError(
            f"{repository} has no {file} on the hub",
            f"https://huggingface.co/{repository}/tree/main lists its files",
        )
    return folder / file


def usual_files(names: Sequence[str]) -> list[str]:
    """Returns which of a hub repository's files may be its LoRA: pickles only if there is nothing else."""
    found = [[name for name in usual if name in names][:1] for usual in (LORA_FILES, [CONFIG], WEIGHTS)]
    return [name for one in found for name in one]
