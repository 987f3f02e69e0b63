"""Handles the paths that users type, reads their texts, and writes files completely or not at all."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from lcm_compile.errors import LcmCompileError, UsageError


def user_path(text: str) -> Path:
    """Returns the path that a user typed, with `~` as the home folder. An unknown `~name` stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


# The marks with which a text file may begin, and its encoding then. The mark of UTF-32 begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file, as text_lines does. Raises OSError if it can't be read."""
    with path.open("rb") as file:
        return list(text_lines(file, str(path)))


def text_lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    """Yields the lines of a text file without their ends, each as soon as it is read.

    A file is in UTF-8, or in UTF-16 or UTF-32 if it begins with the mark of one. Lines end as they do on any
    system. Raises LcmCompileError with the file's `name` if it is in another encoding: none is guessed.
    """
    decoder: io.IncrementalNewlineDecoder | None = None
    encoding, rest, done = "utf-8", "", 0
    try:
        for data in file:
            if decoder is None:
                encoding = next((own for mark, own in MARKS.items() if data.startswith(mark)), encoding)
                decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), True)
            *lines, rest = (rest + decoder.decode(data)).split("\n")
            for line in lines:
                yield without_nul(line)
                done += 1
        if decoder is not None and (rest := rest + decoder.decode(b"", final=True)):
            yield without_nul(rest.removesuffix("\n"))
    except ValueError as error:
        odd = error.object[error.start] if isinstance(error, UnicodeDecodeError) else 0
        written = encoding.removesuffix("-sig").upper()
        raise LcmCompileError(
            f"{name} is not {written} text: line {done + 1} has the byte 0x{odd:02x}",
            "save it as UTF-8: iconv -f LATIN1 -t UTF-8 converts from Latin-1, and -f UTF-16 from that",
        ) from error


def without_nul(line: str) -> str:
    """Returns a line. Raises ValueError if it has a NUL, as lines of UTF-16 without a mark have."""
    if "\0" in line:
        raise ValueError
    return line


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write a file or a folder to, which replaces `path` when the block ends.

    At every moment `path` is the old file or the complete new one. After an error it stays as it was, and the
    temporary file is removed. Several processes and threads may replace one path at the same time; the last
    one to end wins. Temporary files that killed processes left are removed first.
    """
    remove_partial(path)
    partial = path.with_name(f"{partial_prefix(path)}{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        remove(partial)


PARTIAL = ".part"  # the ending of temporary files
NAME_BYTES = 200  # of a path's name in that of its temporary files, which may have 255


def partial_prefix(path: Path) -> str:
    """Returns how the names of all temporary files for `path` begin. The writer's process id follows."""
    name = os.fsencode(path.name.lstrip("."))[:NAME_BYTES]
    return f".{name.decode(sys.getfilesystemencoding(), 'ignore')}."


def remove_partial(path: Path) -> None:
    """Removes the temporary files for `path` of processes that ended while they were `replacing` it."""
    prefix = partial_prefix(path)
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if entry.name.startswith(prefix) and entry.name.endswith(PARTIAL):
                writer = entry.name.removeprefix(prefix).partition("-")[0]
                if writer.isdecimal() and not is_running(int(writer)):
                    remove(Path(entry.path))


def is_running(process: int) -> bool:
    """Returns whether a process with this id runs, of any user."""
    try:
        os.kill(process, 0)  # signal 0 is not delivered, but the system checks that the process exists
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def replacing_output(path: Path) -> Iterator[Path]:
    """Does what `replacing` does, for a file or folder that the user named.

    Raises LcmCompileError if it can't be written.
    """
    try:
        with replacing(path) as partial:
            yield partial
    # torch reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise LcmCompileError(
            f"{path} can't be written: {why}", "make room, or give another --out"
        ) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, and creates its folder if it is missing.

    At every moment the file is the old one or the complete new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def remove(path: Path) -> None:
    """Removes a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_out(out: Path, folder: bool = False) -> None:
    """Raises UsageError if `out` is not a place for a .safetensors file, or for a new folder if `folder`."""
    if folder and out.exists():
        raise UsageError(f"--out {out} exists already", "give the name of a new folder")
    if not folder and out.suffix != ".safetensors":
        raise UsageError(f"--out {out} is not a .safetensors file", "for example --out lora.safetensors")
    check_file(out, "--out")


def check_file(path: Path, option: str) -> None:
    """Raises UsageError if a file can't be written to `path`. An existing file will be replaced."""
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder", "give a file name")
    if not path.parent.is_dir():
        raise UsageError(f"{option}: the folder {path.parent} does not exist", f"mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{option}: the folder {path.parent} can't be written to", f"give another {option}")


def check_space(out: Path, size: int) -> None:
    """Raises LcmCompileError if the disk has no room for `size` bytes and a margin.

    It is called before the work, so that a full disk is not found only after it.
    """
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.1 * size + 1_000_000:
        raise LcmCompileError(
            f"{out.parent} has {free / 1e6:.1f} MB free, but {out.name} and the files next to it take "
            f"{size / 1e6:.1f} MB",
            "make room, or give another --out",
        )
