"""Paths as people type them, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from lcm_compile.errors import LcmCompileError, UsageError


def user_path(text: str) -> Path:
    """The path that a user typed: `~` is the home folder, and an unknown `~name` stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write a file or a folder to, which takes the place of `path` when the block ends.

    At every moment `path` is the old file or the whole new one. After an error it stays as it was, and what
    was written is removed. Several processes and threads may replace one path at the same time; the last one
    to end wins. What a killed process left of an earlier try is removed first.
    """
    remove_partial(path)
    partial = path.with_name(f"{partial_prefix(path)}{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        remove(partial)


PARTIAL = ".part"


def partial_prefix(path: Path) -> str:
    return f".{path.name.lstrip('.')}."


def remove_partial(path: Path) -> None:
    """Removes what processes that have ended left of `path` while they were `replacing` it."""
    prefix = partial_prefix(path)
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if entry.name.startswith(prefix) and entry.name.endswith(PARTIAL):
                writer = entry.name.removeprefix(prefix).partition("-")[0]
                if writer.isdecimal() and not is_running(int(writer)):
                    remove(Path(entry.path))


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing, and checks that there is such a process
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def replacing_output(path: Path) -> Iterator[Path]:
    """As `replacing`, for a file or folder that the user named: LcmCompileError where it can't be written."""
    try:
        with replacing(path) as partial:
            yield partial
    # torch's writer reports a full disk with a RuntimeError.
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LcmCompileError(
            f"{path} can't be written: {why}", "make room, or give another --out"
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, and makes its folder; at every moment the file is the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
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
