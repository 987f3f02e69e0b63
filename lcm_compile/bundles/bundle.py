"""A bundle on the disk: a self-contained folder of engines, tokenizers and proof, with a manifest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lcm_compile.bundles.hard_links import listed_files, share
from lcm_compile.bundles.manifest import MANIFEST, BundleManifest, read_manifest
from lcm_compile.bundles.sizes import first_of, further_sizes
from lcm_compile.bundles.store import bundles_folder
from lcm_compile.engines.kernel_files import drop_kernels, kernel_files, kernels_folder
from lcm_compile.errors import REBUILD, BackendError, BundleError, LcmCompileError, UsageError
from lcm_compile.system.cache import Waiting, home, lock

# The endings of the folders that a killed build leaves next to a bundle: the new bundle, unfinished, and the
# old one, moved away.
LEFTOVERS = (".part", ".old")
# Bytes: if a write fails and the disk has less free space than this, the error is reported as a full disk.
LITTLE_ROOM = 1 << 20


@dataclass(frozen=True)
class EngineBundle:
    """A bundle on the disk whose manifest was read and whose files were checked.

    `digest` is the sha256 of the manifest.
    """

    folder: Path
    manifest: BundleManifest
    digest: str

    def path(self, name: str) -> Path:
        """Returns the path of a file of the bundle. Raises BundleError if the manifest does not list it."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder} has no {name}", REBUILD)
        return self.folder / name


def open_bundle(folder: Path) -> EngineBundle:
    """Returns the bundle in a folder, after checking every file's digest.

    Digests are stored with each file's size and times, so that a second check is quick. Raises BundleError if
    there is no bundle, or if it is broken or damaged.
    """
    manifest, digest = read_manifest(folder)
    with hold(folder):
        manifest.check_files(folder)
    return EngineBundle(folder, manifest, digest)


def hold(folder: Path) -> IO[bytes]:
    """Returns the bundle's manifest as an open file, with a shared lock.

    Until the file is closed, `lcm-compile bundles` does not remove the bundle. The lock is on the manifest
    itself, so it needs no folder to write to, and works with any LCM_COMPILE_HOME. Raises BundleError if the
    bundle was removed or replaced.
    """
    path = folder / MANIFEST
    try:
        file = path.open("rb")
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
    except FileNotFoundError:
        pass
    raise BundleError(f"{folder} has just been removed or replaced", "run the same again, or build it again")


def list_files(folder: Path, but: Path | str = MANIFEST) -> dict[str, str]:
    """Returns the sha256 of every file in `folder`, by its relative path with forward slashes.

    The file or folder `but` is left out.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_relative_to(folder / but):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = digest
    return files


def check_destination(folder: Path, manifest: str = MANIFEST) -> None:
    """Checks that a bundle can be written to `folder`: it is missing, empty, or holds an older bundle.

    For an export, give the name of its `manifest`. Raises UsageError if the folder holds other files or can't
    be written.
    """
    other = "give a new folder to --out"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file", other)
    if folder.is_mount():
        raise UsageError(
            f"--out {folder} is where a disk is mounted, and can't be replaced", f"give --out {folder}/bundle"
        )
    if folder.is_dir() and (foreign := foreign_files(folder, manifest)):
        raise UsageError(
            f"--out {folder} is a folder with other files in it, such as {foreign[0]}, "
            "which the new bundle would replace",
            other,
        )
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise UsageError(f"--out {folder} is not UTF-8, and no engine could be read there", other) from None
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"--out {folder} can't be written: no folder can be made in {parent}",
            "give a folder that you may write to --out",
        )


def foreign_files(folder: Path, manifest: str) -> list[str]:
    """Returns the files in `folder` that neither its manifest nor one of its sizes lists, as sorted paths.

    If the manifest can't be read, only the manifest is returned.
    """
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_file_or_link(path)}
    if manifest not in found:
        return sorted(found)
    try:
        own = set(json.loads((folder / manifest).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [manifest]
    for size in further_sizes(folder):
        inner = f"{size.relative_to(folder).as_posix()}/"
        own |= {inner + name for name in (manifest, *listed_files(size))}
        own |= {path.relative_to(folder).as_posix() for path in kernel_files(size)}
    return sorted(found - own - {manifest})


def is_file_or_link(path: Path) -> bool:
    """Returns whether a path is anything but a plain folder. A link to a folder counts as a file."""
    return path.is_symlink() or not path.is_dir()


@contextlib.contextmanager
def publishing(
    folder: Path, waiting: Waiting = contextlib.nullcontext, manifest: str = MANIFEST
) -> Iterator[Path]:
    """Yields a folder to build in, which is renamed to `folder` when the block ends without an error.

    Only one process at a time can do this; `waiting()` is entered while another one does. At every moment
    `folder` is the old bundle, missing, or the complete new bundle. In the store, and among the sizes of a
    bundle, files that others hold too are replaced with hard links to theirs. The further sizes of an old
    bundle go with it. Raises OSError with ENOSPC if the disk is full.
    """
    folder = folder.resolve()  # without this, a link would be replaced, and not the folder it points to
    folder.parent.mkdir(parents=True, exist_ok=True)
    with reserving(folder, waiting) as (part, old):
        part.mkdir()
        with reporting_full_disk(folder.parent):
            yield part
        if (part / manifest).is_file():
            if folder.parent == bundles_folder().resolve():
                share(part, sorted(folder.parent.glob("[!.]*/")))
            elif (main := first_of(folder)) != folder:
                share(part, [main, *further_sizes(main)])
            sync(part)
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
            drop_kernels(folder)  # they were compiled for the old bundle
            if (compiled := kernels_folder(part)).is_dir():  # compiled when the new engines were checked
                with contextlib.suppress(OSError):
                    compiled.rename(kernels_folder(folder))


@contextlib.contextmanager
def reserving(folder: Path, waiting: Waiting = contextlib.nullcontext) -> Iterator[tuple[Path, Path]]:
    """Locks a bundle's folder, and yields two paths next to it: for the new bundle and for the old one.

    Whatever a killed build left at these paths is removed before the block and after it. If the build was
    killed between the two renames of `publishing`, the old bundle is put back.
    """
    part, old = (folder.parent / f".{folder.name}{ending}" for ending in LEFTOVERS)

    def clean_up() -> None:
        if old.exists() and not folder.exists():  # killed between the two renames of publishing
            old.rename(folder)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
            drop_kernels(leftover)

    with lock(lock_of(folder), waiting):
        clean_up()
        try:
            yield part, old
        finally:
            clean_up()


def lock_of(folder: Path) -> Path:
    """Returns the path of the lock that a process holds while it builds or removes the bundle."""
    name = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
    return home() / "locks" / name


@contextlib.contextmanager
def reporting_full_disk(folder: Path) -> Iterator[None]:
    """Raises OSError with ENOSPC if the block failed because the disk of `folder` is full.

    Libraries report a full disk with errors of their own. Other errors are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # Among this package's own errors, only a BackendError can come from a library that could not write.
        foreign = isinstance(error, BackendError) or not isinstance(error, LcmCompileError)
        if full or (foreign and shutil.disk_usage(folder).free < LITTLE_ROOM):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def sync(folder: Path) -> None:
    """Flushes every file to the disk before the folder is renamed. A power cut leaves no partial bundle."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
