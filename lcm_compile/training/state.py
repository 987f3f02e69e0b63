"""The file beside an output that `--resume` goes on from: `.NAME.state` for an output called NAME."""

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

DIGESTED = 65536  # bytes of a file
# Settings that change where and how a training computes, not what it learns.
FREE = ("base", "data", "batch", "gradient_accumulation", "gradient_checkpointing", "save_every")


@dataclass(frozen=True)
class State:
    """The file beside the output that a training goes on from, and the settings it must be of."""

    path: Path
    settings: dict[str, Any]
    saved: dict[str, Any] | None

    def write(self, parts: dict[str, Any]) -> None:
        with replacing_output(self.path) as part:
            torch.save({"settings": self.settings, **parts}, part)

    def remove(self) -> None:
        remove_partial(self.path)  # a kill may have left a part of one
        remove(self.path)


def state_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.state")


def check_state(out: Path, resume: bool) -> None:
    """UsageError where there is nothing to resume, or something that would be lost."""
    path = state_path(out)
    if resume and not path.is_file():
        raise UsageError(f"there is nothing to resume: {path} does not exist", "the same without --resume")
    if path.is_file() and not resume:
        raise UsageError(
            f"{path} holds an unfinished training", f"--resume to go on with it, or rm {path} to start again"
        )


def open_state(out: Path, resume: bool, settings: dict[str, Any]) -> State:
    """The state to resume, or a new one. UsageError where it is another training's."""
    check_state(out, resume)
    path = state_path(out)
    if not resume:
        return State(path, settings, None)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        before = dict(saved["settings"])
    except Exception as error:  # torch's unpickler has no error of its own
        raise LcmCompileError(
            f"{path} can't be read: {first_line(error)}", f"rm {path} and start again"
        ) from error
    for name, value in settings.items():
        if before.get(name) != value:
            raise UsageError(
                f"{path} is of another training: its {name} was {before.get(name)}, and is now {value}",
                f"resume it as it was started, or rm {path} to start again",
            )
    return State(path, settings, saved)


def digest_of(checkpoint: Checkpoint) -> str:
    """Of the ends of a base's files, where weights lie: reading the whole of them would take minutes."""
    digest = hashlib.sha256()
    for path in checkpoint.content_files().values():
        with path.open("rb") as file:
            file.seek(-min(path.stat().st_size, DIGESTED), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def settings_of(spec: TrainSpec, checkpoint: Checkpoint, machine: Machine, **data: str) -> dict[str, Any]:
    """All that shapes the curve of losses: what --resume must find unchanged."""
    return {
        **{name: value for name, value in vars(spec).items() if name not in FREE},
        "mixed_precision": str(machine.dtype),
        "pictures a step": spec.batch * spec.gradient_accumulation * machine.processes,
        "base": digest_of(checkpoint),
        **data,
    }
