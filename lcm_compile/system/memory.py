"""The memory that parts of a build share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class SharedMemory:
    """A number of bytes that several threads share: each waits until its part fits beside the others'.

    A part that is larger than all of it is taken alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken = 0
        self._waiting_first = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def part(self, size: int, first: bool = False) -> Iterator[None]:
        """Waits for `size` bytes and holds them for the block. Parts taken `first` go before waiting ones."""
        with self._changed:
            self._waiting_first += first
            self._changed.wait_for(
                lambda: (
                    (first or not self._waiting_first)
                    and (not self._taken or self._taken + size <= self.limit)
                )
            )
            self._waiting_first -= first
            self._taken += size
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()
