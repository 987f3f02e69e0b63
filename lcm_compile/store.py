"""Where bundles live, what was used last, locks, and digests that are computed once.

Everything is under one folder: LCM_COMPILE_HOME, or the user's cache folder. Only what a GPU compiles for a
bundle lies beside that, wherever it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lcm_compile.schema import from_json
from lcm_compile.spec import user_path

RECENT_LIMIT = 200
# The folder beside a bundle, and the files in it.
BESIDE, KERNELS = ".cache", ".kernels"
DIGESTS_LIMIT = 20_000
# A file changed this recently could change again without its times moving: its digest is not kept.
SETTLED_NS = 1_000_000_000


def home() -> Path:
    if folder := os.environ.get("LCM_COMPILE_HOME"):
        return user_path(folder)
    from platformdirs import user_cache_path

    return user_cache_path("lcm-compile")


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file is the old one or the new one, at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def lock(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds an exclusive lock on `path`, across processes; a killed holder lets go of it.

    `waiting` is called once when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Digests:
    """sha256 of files, remembered by device, inode, size and both times in nanoseconds.

    A same-size edit whose mtime was put back still has a new ctime, and is read again.
    """

    def __init__(self) -> None:
        self._path = home() / "digests.json"
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            self._known = from_json(Mapping[str, str], json.loads(self._path.read_text(encoding="utf-8")))

    def sha256(self, path: Path) -> str:
        before = path.stat()
        identity = ":".join(
            str(x)
            for x in (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
        )
        if identity in self._known:
            return self._known[identity]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = path.stat()
        unchanged = (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
        settled = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > SETTLED_NS
        if unchanged and settled:
            self._new[identity] = self._known[identity] = digest
        return digest

    def save(self) -> None:
        """Keeps what was learnt; losing it costs time, never correctness."""
        if self._new:
            newest = dict(list(self._known.items())[-DIGESTS_LIMIT:])
            with contextlib.suppress(OSError):
                write_atomically(self._path, json.dumps(newest))
            self._new = {}


def bundles_folder() -> Path:
    return home() / "bundles"


def is_bundle(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def kernels_folder(bundle: Path) -> Path:
    """Beside a bundle, whose manifest lists all that lies in it: what GPUs compile when they first run it."""
    return bundle.with_name(f"{bundle.name}{BESIDE}")


def kernel_files(bundle: Path) -> list[Path]:
    """Whole ones, and what a killed process left of one. Other files there are not ours."""
    return sorted(path for path in kernels_folder(bundle).glob(f"*{KERNELS}*") if path.is_file())


def drop_kernels(bundle: Path) -> None:
    with contextlib.suppress(OSError):
        for path in kernel_files(bundle):
            path.unlink(missing_ok=True)
        kernels_folder(bundle).rmdir()  # unless something else lies in it


def remember(bundle: Path) -> None:
    """Notes that a bundle is used now."""
    with contextlib.suppress(OSError), lock(home() / ".recent.lock"):
        used = {**last_uses(), bundle.resolve(): time.time()}
        newest = sorted(used, key=lambda path: -used[path])[:RECENT_LIMIT]
        times = {str(path): used[path] for path in newest}
        write_atomically(home() / "recent.json", json.dumps(times, indent=1))


def last_uses() -> dict[Path, float]:
    """When bundles were built, hit or run last, in seconds since 1970; those that are gone are left out."""
    try:
        data = json.loads((home() / "recent.json").read_text(encoding="utf-8"))
        times = from_json(Mapping[str, float], data)
    except (OSError, ValueError, RecursionError):
        return {}
    now = time.time()
    return {Path(name): min(max(used, 0), now) for name, used in times.items() if is_bundle(Path(name))}


def recent() -> list[Path]:
    """The bundles of `last_uses`, the one used last first."""
    used = last_uses()
    return sorted(used, key=lambda path: -used[path])
