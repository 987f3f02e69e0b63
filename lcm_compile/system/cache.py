"""The cache folder, locks that hold across processes, and digests that are computed once per file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from lcm_compile.system.dataclass_json import from_json
from lcm_compile.system.files import user_path, write_atomically

DIGESTS_LIMIT = 20_000  # digests that are kept
# Makes what is entered while something is waited for.
Waiting = Callable[[], AbstractContextManager[object]]


# Nanoseconds. The digest of a file that changed this recently is not kept, because the file could change
# again without a change of its times.
SETTLED_NS = 1_000_000_000


def home() -> Path:
    """Returns the cache folder: LCM_COMPILE_HOME, or the system's folder for user caches."""
    if folder := os.environ.get("LCM_COMPILE_HOME"):
        return user_path(folder)
    from platformdirs import user_cache_path

    return user_cache_path("lcm-compile")


@contextlib.contextmanager
def lock(path: Path, waiting: Waiting = contextlib.nullcontext) -> Iterator[None]:
    """Holds an exclusive lock on `path` across processes, until the block ends or the process dies.

    `waiting()` is entered while another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with waiting():
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Digests:
    """Computes the sha256 of files, and remembers it in the cache folder.

    A file is identified by its device, inode and size, and by its mtime and ctime in nanoseconds. An edit
    that keeps the size and restores the mtime still changes the ctime, so the file is read again.
    """

    def __init__(self) -> None:
        self._path = home() / "digests.json"
        self._known: dict[str, str] = {}
        self._new: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            self._known = from_json(Mapping[str, str], json.loads(self._path.read_text(encoding="utf-8")))

    def sha256(self, path: Path) -> str:
        """Returns a file's sha256, computed only if it is not known. Raises OSError if it can't be read."""
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
        """Writes new digests to the cache folder. A failure is ignored: it costs time, never correctness."""
        if self._new:
            newest = dict(list(self._known.items())[-DIGESTS_LIMIT:])
            with contextlib.suppress(OSError):
                write_atomically(self._path, json.dumps(newest))
            self._new = {}
