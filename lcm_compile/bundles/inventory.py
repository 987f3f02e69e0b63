"""The bundles that are here: how large they are, when they were used, and removing them.

A bundle that a process builds or draws with is never removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lcm_compile.bundles.bundle import LEFTOVERS, foreign_files, lock_of, reserving
from lcm_compile.bundles.manifest import MANIFEST, BundleManifest, read_manifest
from lcm_compile.bundles.store import bundles_folder, last_uses
from lcm_compile.engines.kernel_files import KERNEL_FOLDER_SUFFIX, drop_kernels, is_bundle, kernel_files
from lcm_compile.errors import BundleError, UsageError
from lcm_compile.system.cache import lock
from lcm_compile.system.files import user_path

STORE, ELSEWHERE, UNFINISHED, BROKEN = "store", "elsewhere", "unfinished", "broken"
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) *(?P<unit>[KMGT]i?)?B?", re.IGNORECASE)


@dataclass(frozen=True)
class StoredBundle:
    """A bundle, or what is left of one. `files` are the bytes of each file, by its device and inode; of the
    kernels beside it too.

    `kind` is `store`; `elsewhere` for a bundle that was built with --out; `unfinished` for one that is being
    built or whose build was killed; `broken` where the manifest can't be read. `used` and `built` count
    seconds since 1970.
    """

    folder: Path
    kind: str
    manifest: BundleManifest | None
    used: float
    built: float
    files: Mapping[tuple[int, int], int]

    @property
    def size(self) -> int:
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "bundle": str(self.folder),
            "kind": self.kind,
            "base": manifest and manifest.spec.base,
            "target": manifest and manifest.target.name,
            "backend": manifest and manifest.backend,
            "bytes": self.size,
            "used": iso_time(self.used),
            "built": iso_time(self.built),
        }


def iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def list_bundles() -> list[StoredBundle]:
    """Every bundle of the store, and those elsewhere that were used; the one used last first."""
    store = bundles_folder().resolve()
    used = last_uses()
    inside = sorted(path for path in store.glob("*") if path.is_dir() and bundle_beside(path) is None)
    elsewhere = [path for path in used if path.parent != store]
    found = []
    for folder in (*inside, *elsewhere):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found.append(
                read_stored(folder, STORE if folder.parent == store else ELSEWHERE, used.get(folder))
            )
    return sorted(found, key=lambda one: -one.used)


def read_stored(folder: Path, kind: str, used: float | None) -> StoredBundle:
    manifest = None
    built = folder.stat().st_mtime
    if is_leftover(folder):
        kind = UNFINISHED
    else:
        try:
            manifest, _ = read_manifest(folder)
            built = datetime.fromisoformat(manifest.created).timestamp()
        except BundleError:
            kind = BROKEN
        except (ValueError, OverflowError):
            pass  # the manifest has no such time: the folder's
    return StoredBundle(folder, kind, manifest, max(used or 0, built), built, sizes(folder))


def bundle_beside(folder: Path) -> Path | None:
    """The bundle whose kernels a folder is for, which may have gone; None for any other folder."""
    bundle = folder.with_name(folder.name.removesuffix(KERNEL_FOLDER_SUFFIX) or folder.name)
    return bundle if bundle != folder and not is_bundle(folder) else None


def is_leftover(folder: Path) -> bool:
    return folder.name.startswith(".") and folder.name.endswith(LEFTOVERS)


def sizes(folder: Path) -> dict[tuple[int, int], int]:
    found = {}
    for path in (*folder.rglob("*"), *kernel_files(folder)):
        with contextlib.suppress(FileNotFoundError):  # a build is at work
            status = path.lstat()
            if not path.is_dir():
                found[status.st_dev, status.st_ino] = status.st_size
    return found


def disk_size(bundles: Iterable[StoredBundle]) -> int:
    """Bytes of all of them, files that several share counted once."""
    files: dict[tuple[int, int], int] = {}
    for one in bundles:
        files.update(one.files)
    return sum(files.values())


def parse_size(text: str) -> int:
    """Bytes of `50GB`, `1.5 GiB`, `500M` or `0`. UsageError for anything else."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no size", "50GB, 500MB or 1.5GiB, for example")
    unit = (match["unit"] or "").lower()
    step = 1024 if unit.endswith("i") else 1000
    return int(float(match["number"]) * step ** ("kmgt".index(unit[0]) + 1 if unit else 0))


def find_stored(name: str) -> Path:
    """The folder of a bundle, by its name in the store or by its path. BundleError where there is none."""
    path = user_path(name)
    for folder in (bundles_folder() / name, path) if path.name == name else (path,):
        if (folder / MANIFEST).is_file() and not is_leftover(folder):
            return folder.resolve()
    raise BundleError(f"there is no bundle {name}", "lcm-compile bundles lists those that are here")


def remove_bundle(folder: Path, pretend: bool = False) -> None:
    """Removes a bundle at once. BundleError while it is used, and where other things lie in it.

    `pretend`: only whether it could be removed.
    """
    if foreign := foreign_files(folder, MANIFEST):
        raise BundleError(
            f"{folder} is kept: it holds {foreign[0]}, and that is no file of a bundle that can be read",
            f"look into it, and remove it yourself: rm -r {shlex.quote(str(folder))}",
        )
    with not_being_built(folder, pretend) as (part, _), not_in_use(folder):
        if not pretend:
            drop_kernels(folder)
            folder.rename(part)


def remove_leftover(leftover: Path, pretend: bool = False) -> None:
    """Removes what a killed build left; a bundle that it had put aside is back. BundleError: no, it runs."""
    ending = next(ending for ending in LEFTOVERS if leftover.name.endswith(ending))
    with not_being_built(leftover.with_name(leftover.name[1:].removesuffix(ending)), pretend):
        pass  # entering removes it


@contextlib.contextmanager
def not_being_built(folder: Path, pretend: bool) -> Iterator[tuple[Path, Path]]:
    """`reserving`, or BundleError while another process builds or removes the bundle."""

    def busy() -> None:
        raise BundleError(f"{folder} is kept: it is being built or removed", "the same again later")

    if pretend:
        with lock(lock_of(folder), busy):
            yield folder, folder
    else:
        with reserving(folder, busy) as names:
            yield names


@contextlib.contextmanager
def not_in_use(folder: Path) -> Iterator[None]:
    """BundleError while a process `hold`s the bundle; none can before the block ends."""
    try:
        file = (folder / MANIFEST).open("r+b")
    except FileNotFoundError:
        raise BundleError(
            f"{folder} has no {MANIFEST}: it is no bundle, or has just been removed", "lcm-compile bundles"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BundleError(f"{folder} is kept: a process draws with it", "the same again later") from None
        yield


@dataclass(frozen=True)
class Pruned:
    """What was removed, what is left of the store, and why some of that could not be removed."""

    removed: tuple[StoredBundle, ...]
    left: tuple[StoredBundle, ...]
    reasons: tuple[str, ...]


def drop_lost_kernels() -> None:
    """Removes those of the store whose bundle was removed by hand."""
    for folder in bundles_folder().glob("*"):
        bundle = bundle_beside(folder)
        if bundle is not None and not bundle.exists():
            drop_kernels(bundle)


def prune(limit: int, pretend: bool = False) -> Pruned:
    """Removes leftovers, then the store's bundles that were not used for longest, until the rest is small.

    `limit`: bytes. Nothing outside the store is removed.
    """
    if not pretend:
        drop_lost_kernels()
    left = [one for one in list_bundles() if one.kind != ELSEWHERE]
    removed, reasons = [], []
    for one in sorted(left, key=lambda one: (one.kind != UNFINISHED, one.used)):
        if one.kind != UNFINISHED and disk_size(left) <= limit:
            break
        try:
            (remove_leftover if one.kind == UNFINISHED else remove_bundle)(one.folder, pretend)
        except BundleError as error:
            reasons.append(error.message)
            continue
        left.remove(one)
        removed.append(one)
    return Pruned(tuple(removed), tuple(left), tuple(reasons))
