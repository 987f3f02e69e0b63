"""A bundle on disk: one self-contained folder of engines, tokenizers and proof, told by its manifest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lcm_compile.bundles.hard_links import share
from lcm_compile.bundles.manifest import MANIFEST, BundleManifest, read_manifest
from lcm_compile.bundles.store import bundles_folder
from lcm_compile.engines.kernel_files import drop_kernels, kernels_folder
from lcm_compile.errors import REBUILD, BackendError, BundleError, LcmCompileError, UsageError
from lcm_compile.system.cache import home, lock

# How what a killed build leaves beside a bundle is called: a half-built one, and one put aside.
LEFTOVERS = (".part", ".old")
# A disk with less than this is called full when something could not be written to it.
LITTLE_ROOM = 1 << 20


@dataclass(frozen=True)
class EngineBundle:
    """A bundle on disk whose manifest was read and whose files were checked."""

    folder: Path
    manifest: BundleManifest
    digest: str

    def path(self, name: str) -> Path:
        """A file of the bundle; BundleError unless the manifest holds its digest."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder} has no {name}", REBUILD)
        return self.folder / name


def open_bundle(folder: Path) -> EngineBundle:
    """Reads the manifest and checks every file's digest (remembered by stat, so a second time is quick)."""
    manifest, digest = read_manifest(folder)
    with hold(folder):
        manifest.check_files(folder)
    return EngineBundle(folder, manifest, digest)


def hold(folder: Path) -> IO[bytes]:
    """The bundle's manifest, open: until it is closed, `bundles` removes nothing of the bundle.

    The lock is on the manifest itself, so it needs no place to write and holds for any LCM_COMPILE_HOME.
    BundleError where the bundle has gone.
    """
    path = folder / MANIFEST
    try:
        file = path.open("rb")
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
    except FileNotFoundError:
        pass
    raise BundleError(f"{folder} has just been removed or replaced", "the same again, or build it again")


def list_files(folder: Path, but: Path | str = MANIFEST) -> dict[str, str]:
    """sha256 of every file of `folder` but for the file or folder `but`, by its path with forward slashes."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_relative_to(folder / but):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = digest
    return files


def check_destination(folder: Path, manifest: str = MANIFEST) -> None:
    """UsageError unless a bundle can be put there: nothing, an empty folder, or an older bundle.

    So for an export, which has another manifest.
    """
    other = "give a new folder to --out"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file", other)
    if folder.is_mount():
        raise UsageError(
            f"--out {folder} is where a disk is mounted, and can't be replaced", f"{folder}/bundle"
        )
    if folder.is_dir() and (foreign := foreign_files(folder, manifest)):
        raise UsageError(
            f"--out {folder} is a folder with other things in it, such as {foreign[0]}, "
            "and would be replaced with all it holds",
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
    """What lies in `folder` and is no part of a bundle; of an unreadable bundle, its manifest."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_thing(path)}
    if manifest not in found:
        return sorted(found)
    try:
        own = set(json.loads((folder / manifest).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [manifest]
    return sorted(found - own - {manifest})


def is_thing(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


@contextlib.contextmanager
def publishing(
    folder: Path, waiting: Callable[[], None] = lambda: None, manifest: str = MANIFEST
) -> Iterator[Path]:
    """A folder to build in, which becomes `folder` when the block ends without an error.

    One process at a time. At every moment `folder` is the old bundle, none, or the whole new one. In the
    store, its files that other bundles hold too become one with theirs.
    """
    folder = folder.resolve()  # through links: a link would be replaced instead of what it points to
    folder.parent.mkdir(parents=True, exist_ok=True)
    with reserving(folder, waiting) as (part, old):
        part.mkdir()
        with reporting_full_disk(folder.parent):
            yield part
        if (part / manifest).is_file():
            if folder.parent == bundles_folder().resolve():
                share(part, folder.parent)
            sync(part)
            if folder.exists():
                folder.rename(old)
            part.rename(folder)
            drop_kernels(folder)  # the old bundle's
            if (compiled := kernels_folder(part)).is_dir():  # while its engines were checked here
                with contextlib.suppress(OSError):
                    compiled.rename(kernels_folder(folder))


@contextlib.contextmanager
def reserving(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[tuple[Path, Path]]:
    """Two names beside `folder`, for a new bundle and an old one, while no other process changes it.

    What lies there under these names is removed before and after, such as what a killed build left.
    """
    part, old = (folder.parent / f".{folder.name}{ending}" for ending in LEFTOVERS)

    def clean_up() -> None:
        if old.exists() and not folder.exists():  # ended between the two renames of publishing
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
    """Locked by whoever builds or removes the bundle."""
    name = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
    return home() / "locks" / name


@contextlib.contextmanager
def reporting_full_disk(folder: Path) -> Iterator[None]:
    """Tells of a full disk as such, whatever the library that met it made of that."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # Of this package's own errors only a backend's may come from a library that could not write.
        foreign = isinstance(error, BackendError) or not isinstance(error, LcmCompileError)
        if full or (foreign and shutil.disk_usage(folder).free < LITTLE_ROOM):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def sync(folder: Path) -> None:
    """Puts every file on the disk before the folder gets its name, so that a power cut leaves no half."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
