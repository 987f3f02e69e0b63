"""Files that are written whole or not at all, and what is asked of a place before working for it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lcm_compile.errors import LcmCompileError, UsageError


def part_of(path: Path) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file or folder under, which then takes the place of `path`, whole or not at all."""
    part = part_of(path)
    remove(part)
    try:
        yield part
        part.replace(path)
    # torch's writer tells of a full disk by a RuntimeError.
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LcmCompileError(
            f"{path} can't be written: {why}", "make room, or give another --out"
        ) from error
    finally:
        remove(part)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_out(out: Path, folder: bool = False) -> None:
    """UsageError where a .safetensors file, or a new folder, can't be written to `out`."""
    if folder and out.exists():
        raise UsageError(f"--out {out} exists", "give the name of a new folder")
    if not folder and out.suffix != ".safetensors":
        raise UsageError(f"--out {out} is no .safetensors file", "for example --out lora.safetensors")
    check_file(out, "--out")


def check_file(path: Path, option: str) -> None:
    """UsageError where a file can't be written to `path`; one that is there is replaced."""
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder", "give a file name")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} of {option} does not exist", f"mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"the folder {path.parent} of {option} can't be written", f"give another {option}")


def check_space(out: Path, size: int) -> None:
    """A full disk is better found before the work than after it. `size`: bytes of all that is written."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.1 * size + 1_000_000:
        raise LcmCompileError(
            f"{out.parent} has {free / 1e6:.1f} MB free; {out.name} and what is written beside it take "
            f"{size / 1e6:.1f} MB",
            "make room, or give another --out",
        )
