"""Lists the bundles on this machine with their sizes and last uses, and removes them.

A bundle that a process is building or drawing with is never removed.
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
from typing import Any, NoReturn

from lcm_compile.bundles.bundle import LEFTOVERS, foreign_files, lock_of, reserving
from lcm_compile.bundles.manifest import MANIFEST, BundleManifest, read_manifest
from lcm_compile.bundles.sizes import further_sizes, sizes_of
from lcm_compile.bundles.store import bundles_folder, last_uses
from lcm_compile.engines.kernel_files import KERNEL_FOLDER_SUFFIX, drop_kernels, is_bundle, kernel_files
from lcm_compile.errors import BundleError, UsageError
from lcm_compile.system.cache import lock
from lcm_compile.system.files import user_path

# The kinds of a StoredBundle.
STORE, ELSEWHERE, UNFINISHED, BROKEN = "store", "elsewhere", "unfinished", "broken"
SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) *(?P<unit>[KMGT]i?)?B?", re.IGNORECASE)


@dataclass(frozen=True)
class StoredBundle:
    """A bundle, or what is left of one.

    `kind` is `store`, `elsewhere` for a bundle that was built with --out, `unfinished` for one that is being
    built or whose build was killed, or `broken` if the manifest can't be read. `used` and `built` are in
    seconds since 1970. `files` are the bytes of each file, by its device and inode. They include the kernels
    that a GPU compiled for the bundle, which lie in a folder next to it.
    """

    folder: Path
    kind: str
    manifest: BundleManifest | None
    used: float
    built: float
    files: Mapping[tuple[int, int], int]

    @property
    def size(self) -> int:
        """Bytes on the disk, with files counted that other bundles share."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns what `bundles --json` lists. Times are ISO 8601 in local time."""
        manifest = self.manifest
        return {
            "bundle": str(self.folder),
            "kind": self.kind,
            "base": manifest and manifest.spec.base,
            "target": manifest and manifest.target.name,
            "backend": manifest and manifest.backend,
            "sizes": manifest and sizes_of(self.folder, manifest),
            "bytes": self.size,
            "used": iso_time(self.used),
            "built": iso_time(self.built),
        }


def iso_time(seconds: float) -> str:
    """Returns seconds since 1970 as ISO 8601 in local time."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def list_bundles() -> list[StoredBundle]:
    """Returns every bundle of the store, and those elsewhere that were used. The last used comes first."""
    store = bundles_folder().resolve()
    used = last_uses()
    inside = sorted(path for path in store.glob("*") if path.is_dir() and bundle_of_kernels(path) is None)
    elsewhere = [path for path in used if path.parent != store]
    found = []
    for folder in (*inside, *elsewhere):
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            found.append(
                read_stored(folder, STORE if folder.parent == store else ELSEWHERE, used.get(folder))
            )
    return sorted(found, key=lambda one: -one.used)


def read_stored(folder: Path, kind: str, used: float | None) -> StoredBundle:
    """Returns the bundle in a folder. `kind` is overruled if it is unfinished or broken.

    Raises FileNotFoundError if the folder does not exist.
    """
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
            pass  # the manifest's time is not valid: the folder's time is used
    return StoredBundle(folder, kind, manifest, max(used or 0, built), built, sizes(folder))


def bundle_of_kernels(folder: Path) -> Path | None:
    """Returns the bundle whose compiled kernels a folder holds, or None if it is no such folder.

    The bundle itself may be removed already.
    """
    bundle = folder.with_name(folder.name.removesuffix(KERNEL_FOLDER_SUFFIX) or folder.name)
    return bundle if bundle != folder and not is_bundle(folder) else None


def is_leftover(folder: Path) -> bool:
    """Returns whether a folder's name is that of an unfinished bundle, or of an old one moved away."""
    return folder.name.startswith(".") and folder.name.endswith(LEFTOVERS)


def sizes(folder: Path) -> dict[tuple[int, int], int]:
    """Returns the bytes of each file of a bundle and of its kernels, by the file's device and inode."""
    found = {}
    for path in (*folder.rglob("*"), *kernel_files(folder)):
        with contextlib.suppress(FileNotFoundError):  # a running build may remove files
            status = path.lstat()
            if not path.is_dir():
                found[status.st_dev, status.st_ino] = status.st_size
    return found


def disk_size(bundles: Iterable[StoredBundle]) -> int:
    """Returns the bytes that these bundles take on the disk. A file that several share counts once."""
    files: dict[tuple[int, int], int] = {}
    for one in bundles:
        files.update(one.files)
    return sum(files.values())


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as `50GB`, `1.5 GiB`, `500M` or `0`.

    Raises UsageError if the text is no size.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no size", "give 50GB, 500MB or 1.5GiB, for example")
    unit = (match["unit"] or "").lower()
    step = 1024 if unit.endswith("i") else 1000
    return int(float(match["number"]) * step ** ("kmgt".index(unit[0]) + 1 if unit else 0))


def find_stored(name: str) -> Path:
    """Returns the folder of a bundle, given its name in the store or its path.

    Raises BundleError if there is no such bundle.
    """
    path = user_path(name)
    for folder in (bundles_folder() / name, path) if path.name == name else (path,):
        if (folder / MANIFEST).is_file() and not is_leftover(folder):
            return folder.resolve()
    raise BundleError(f"there is no bundle {name}", "lcm-compile bundles lists those that are here")


def remove_bundle(folder: Path, pretend: bool = False) -> None:
    """Removes a bundle. With `pretend`, only checks whether it could be removed.

    Raises BundleError if the bundle is being built, removed or used, or if it holds files that are not its
    own.
    """
    if foreign := foreign_files(folder, MANIFEST):
        raise BundleError(
            f"{folder} is kept: it holds {foreign[0]}, and that is no file of a bundle that can be read",
            f"check what it holds, and remove it yourself: rm -r {shlex.quote(str(folder))}",
        )
    with not_being_built(folder, pretend) as (part, _), contextlib.ExitStack() as held:
        for one in (folder, *further_sizes(folder)):
            held.enter_context(not_in_use(one))
        if not pretend:
            drop_kernels(folder)
            folder.rename(part)


def remove_leftover(leftover: Path, pretend: bool = False) -> None:
    """Removes what a killed build left. An old bundle that the build had moved away is put back.

    With `pretend`, only checks whether it could be removed. Raises BundleError if the build still runs.
    """
    ending = next(ending for ending in LEFTOVERS if leftover.name.endswith(ending))
    with not_being_built(leftover.with_name(leftover.name[1:].removesuffix(ending)), pretend):
        pass  # `reserving` removes it when it is entered


@contextlib.contextmanager
def not_being_built(folder: Path, pretend: bool) -> Iterator[tuple[Path, Path]]:
    """Locks a bundle's folder and yields two paths, as `reserving` does. With `pretend`, changes nothing.

    Raises BundleError, without waiting, if another process is building or removing the bundle.
    """

    def busy() -> NoReturn:
        raise BundleError(f"{folder} is kept: it is being built or removed", "run the same again later")

    if pretend:
        with lock(lock_of(folder), busy):
            yield folder, folder
    else:
        with reserving(folder, busy) as names:
            yield names


@contextlib.contextmanager
def not_in_use(folder: Path) -> Iterator[None]:
    """Keeps other processes from opening the bundle with `hold` until the block ends.

    Raises BundleError if a process holds it already, or if there is no bundle.
    """
    try:
        file = (folder / MANIFEST).open("r+b")
    except FileNotFoundError:
        raise BundleError(
            f"{folder} has no {MANIFEST}: it is not a bundle, or has just been removed", "lcm-compile bundles"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BundleError(
                f"{folder} is kept: a process draws with it", "run the same again later"
            ) from None
        yield


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed, what is left in the store, and why some bundles could not be removed."""

    removed: tuple[StoredBundle, ...]
    left: tuple[StoredBundle, ...]
    reasons: tuple[str, ...]


def drop_lost_kernels() -> None:
    """Removes compiled kernels in the store whose bundle was removed by hand."""
    for folder in bundles_folder().glob("*"):
        bundle = bundle_of_kernels(folder)
        if bundle is not None and not bundle.exists():
            drop_kernels(bundle)


def prune(limit: int, pretend: bool = False) -> Pruned:
    """Removes what killed builds left, then the least recently used bundles of the store.

    This stops when the rest takes at most `limit` bytes. Nothing outside the store is removed. With
    `pretend`, nothing is removed at all, and the result lists what would be. The result also says which
    bundles can't be removed.
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
