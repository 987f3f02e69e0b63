"""What a part of a build costs: seconds, and the most memory that it and its processes held."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SAMPLED_EVERY = 0.2  # seconds


@dataclass(frozen=True)
class Cost:
    """`memory_bytes` is anonymous memory over the process tree (0 where the system does not tell it).

    Pages of files that are only read do not count: the system takes them back when it needs them.
    """

    seconds: float
    memory_bytes: int


# Told a part's name when it starts, with None, and again when it ends, with its cost.
Report = Callable[[str, Cost | None], None]


def silent(part: str, cost: Cost | None) -> None:
    """The report that tells nobody."""


class Stopwatch:
    """Reports each part of a build, and keeps its cost."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.costs: dict[str, Cost] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._report(name, None)
        start, sampler = time.perf_counter(), Sampler()
        with sampler:
            yield
        cost = Cost(round(time.perf_counter() - start, 3), sampler.peak)
        self.costs[name] = cost
        self._report(name, cost)


class Sampler:
    """A thread that keeps the largest anonymous memory of this process and those below it."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, tree_memory(os.getpid()))
            if self._ended.wait(SAMPLED_EVERY):
                return

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def tree_memory(process: int) -> int:
    """Anonymous bytes of a process and all below it, from /proc; 0 where there is none."""
    total = 0
    folder = Path("/proc") / str(process)
    with contextlib.suppress(OSError):  # it may end meanwhile
        for line in (folder / "status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
        for task in (folder / "task").iterdir():
            for child in (task / "children").read_text().split():
                total += tree_memory(int(child))
    return total
