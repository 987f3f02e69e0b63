"""Finds the LoRAs of a build: turns a name on the command line into files and their digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcm_compile.checkpoint.families import LCM_LORA_FILE, Family
from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.checkpoint.hub import REPOSITORY, fetch
from lcm_compile.errors import LoraError
from lcm_compile.lora.peft_folder import CONFIG, WEIGHTS, lora_files_of
from lcm_compile.spec import LORA_SUFFIXES, BuildSpec, LoraSpec
from lcm_compile.system.cache import Digests
from lcm_compile.system.files import user_path

# The LoRA's file in a folder or a repository that diffusers wrote: the first that is there is read.
LORA_FILES = (LCM_LORA_FILE, "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class PlannedLora:
    """A LoRA that will be fused: its file or folder, its weights, and the sha256 of its content."""

    role: str  # "lcm" or "style"
    spec: LoraSpec
    path: Path
    sha256: str


def find_loras(spec: BuildSpec, checkpoint: Checkpoint, digests: Digests) -> tuple[PlannedLora, ...]:
    """Returns the LoRAs of a build: the LCM-LoRA (the given one or the family's), then the styles in order.

    No family's LCM-LoRA is added for a full LCM, for random weights, or with `no_lcm`. Raises LoraError if a
    LoRA can't be found or downloaded.
    """
    found: list[tuple[str, LoraSpec, Path]] = []
    if spec.lcm_lora:
        found.append(("lcm", spec.lcm_lora, find_lora(spec.lcm_lora)))
    elif not (spec.no_lcm or checkpoint.has_guidance_embedding or checkpoint.random_seed is not None):
        path = find_lcm_lora(checkpoint.family, spec.base)
        assert checkpoint.family is not None
        found.append(("lcm", LoraSpec(checkpoint.family.lcm_lora or str(path)), path))
    found += [("style", lora, find_lora(lora)) for lora in spec.loras]
    return tuple(PlannedLora(role, lora, path, lora_digest(path, digests)) for role, lora, path in found)


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
        raise LoraError(f"LoRA {spec.source} does not exist", "check the path given to --lora or --lcm-lora")
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


def find_lcm_lora(family: Family | None, base: str) -> Path:
    """Returns the file of a family's LCM-LoRA, downloaded if the hub cache lacks it.

    `base` is the base's name in the error. Raises LoraError if there is none, or if it can't be downloaded.
    """
    other = "name one with --lcm-lora FILE, or give --no-lcm if the base is an LCM already"
    if family is None:
        raise LoraError(f"no LCM-LoRA is known for {base}: its UNet belongs to no known family", other)
    if family.lcm_lora is None:
        raise LoraError(f"no LCM-LoRA is published for {family.description.split(',')[0]}", other)
    path = Path(family.lcm_lora)
    if not path.is_absolute():
        try:
            path = fetch(family.lcm_lora, [LCM_LORA_FILE]) / LCM_LORA_FILE
        except ConnectionError as error:
            raise LoraError(
                f"the LCM-LoRA {family.lcm_lora} is not in the hub cache and can't be downloaded: {error}",
                other,
            ) from error
    if not path.is_file():
        raise LoraError(f"the LCM-LoRA {path} is missing", other)
    return path
