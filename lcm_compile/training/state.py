"""The state file that `--resume` continues from: `.NAME.state`, next to an output called NAME."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.errors import LcmCompileError, UsageError, first_line
from lcm_compile.system.files import remove, remove_partial, replacing_output
from lcm_compile.training.spec import Machine, TrainSpec

DIGESTED = 65536  # bytes that are read from the end of each file
# Settings that may differ when a training resumes: they change where and how it computes, not what it learns.
# Instead `settings_of` compares digests of the base, the pictures and the LoRA, and the number of pictures
# per step.
FREE = ("base", "data", "lora", "batch", "gradient_accumulation", "gradient_checkpointing", "save_every")


@dataclass(frozen=True)
class State:
    """The state file of a training, and the settings that a resumed training must have.

    `saved` is the content of the file, or None if the training starts anew.
    """

    path: Path
    settings: dict[str, Any]
    saved: dict[str, Any] | None

    def write(self, content: dict[str, Any]) -> None:
        """Replaces the state file. Raises LcmCompileError if it can't be written; the old one then stays."""
        with replacing_output(self.path) as partial:
            torch.save({"settings": self.settings, **content}, partial)

    def remove(self) -> None:
        """Removes the state file, at the end of a training."""
        remove_partial(self.path)  # a killed process may have left an incomplete file
        remove(self.path)


def state_path(out: Path) -> Path:
    """Returns the path of the state file of an output."""
    return out.with_name(f".{out.name}.state")


def check_state(out: Path, resume: bool) -> None:
    """Raises UsageError if there is no state to resume, or if a new training would overwrite a state."""
    path = state_path(out)
    if resume and not path.is_file():
        raise UsageError(
            f"there is nothing to resume: {path} does not exist", "run the same command without --resume"
        )
    if path.is_file() and not resume:
        raise UsageError(
            f"{path} holds an unfinished training",
            f"add --resume to continue it, or rm {path} to start again",
        )


def open_state(out: Path, resume: bool, settings: dict[str, Any]) -> State:
    """Returns the state to resume, or a new one.

    Raises UsageError in the cases of `check_state` and if the saved settings differ from `settings`, and
    LcmCompileError if the state can't be read.
    """
    check_state(out, resume)
    path = state_path(out)
    if not resume:
        return State(path, settings, None)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        before = dict(saved["settings"])
    except Exception as error:  # torch's unpickler raises errors of many types
        raise LcmCompileError(
            f"{path} can't be read: {first_line(error)}", f"rm {path} and start again"
        ) from error
    for name, value in settings.items():
        if before.get(name) != value:
            raise UsageError(
                f"{path} belongs to another training: its {name} was {before.get(name)}, and is now {value}",
                f"resume it with the options it was started with, or rm {path} to start again",
            )
    return State(path, settings, saved)


def digest_of(checkpoint: Checkpoint) -> str:
    """Returns a digest of the ends of a base's files, where weights lie.

    Reading the files completely would take minutes.
    """
    digest = hashlib.sha256()
    for path in checkpoint.content_files().values():
        with path.open("rb") as file:
            file.seek(-min(path.stat().st_size, DIGESTED), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def settings_of(spec: TrainSpec, checkpoint: Checkpoint, machine: Machine, **data: str) -> dict[str, Any]:
    """Returns all settings that influence the losses, which --resume must find unchanged.

    `data` are the digests of the pictures and of the LoRA, by the name of their setting.
    """
    return {
        **{name: value for name, value in vars(spec).items() if name not in FREE},
        "mixed_precision": str(machine.dtype),
        "pictures a step": spec.batch * spec.gradient_accumulation * machine.processes,
        "base": digest_of(checkpoint),
        **data,
    }
