"""Pictures that clients fetch by a URL, for a while."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

MOST_BYTES = 256 << 20  # of all of them; the oldest go first


@dataclass(frozen=True)
class KeptFile:
    """A file in memory, until a time of `time.monotonic`."""

    data: bytes
    form: str
    until: float


class KeptFiles:
    """Files by names that can't be guessed: who knows one may read it, without a key."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._files: OrderedDict[str, KeptFile] = OrderedDict()
        self._bytes = 0

    def keep(self, data: bytes, form: str) -> str:
        """Keeps a file, and returns its name."""
        name = f"{secrets.token_urlsafe(24)}.{form}"
        self._files[name] = KeptFile(data, form, time.monotonic() + self._seconds)
        self._bytes += len(data)
        while self._files and (self._bytes > MOST_BYTES or self._oldest.until < time.monotonic()):
            self._bytes -= len(self._files.popitem(last=False)[1].data)
        return name

    @property
    def _oldest(self) -> KeptFile:
        return next(iter(self._files.values()))

    def find(self, name: str) -> KeptFile | None:
        """Returns a file, or None if there is none any more."""
        file = self._files.get(name)
        return file if file and file.until > time.monotonic() else None
