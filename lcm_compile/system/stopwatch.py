"""Measures what each task of a build costs: its seconds, and the peak memory of the process tree."""

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
    """What a task cost. `memory_bytes` is the peak of anonymous memory, summed over the process tree.

    It is 0 if the system does not report it. Pages of files that are only read do not count, because the
    system takes them back when it needs them.
    """

    seconds: float
    memory_bytes: int


# A callback for progress. It gets a task's name and None when the task starts, and its name and cost at the
# end.
Report = Callable[[str, Cost | None], None]


def silent(task: str, cost: Cost | None) -> None:
    """Reports nothing."""


class Stopwatch:
    """Reports each task of a build as it starts and ends, and keeps its cost in `costs`, by name."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.costs: dict[str, Cost] = {}

    @contextlib.contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Measures and reports the block as the task `name`."""
        self._report(name, None)
        start, sampler = time.perf_counter(), Sampler()
        with sampler:
            yield
        cost = Cost(round(time.perf_counter() - start, 3), sampler.peak)
        self.costs[name] = cost
        self._report(name, cost)


class Sampler:
    """Measures the peak of the anonymous memory of this process and its descendants in a thread.

    It samples every SAMPLED_EVERY seconds; `peak` is in bytes.
    """

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
    """Returns the anonymous memory of a process and its descendants in bytes; 0 without /proc."""
    total = own_memory(process)
    with contextlib.suppress(OSError):  # the process may end while it is read
        for task in (Path("/proc") / str(process) / "task").iterdir():
            for child in (task / "children").read_text().split():
                total += tree_memory(int(child))
    return total


def own_memory(process: int) -> int:
    """Returns the anonymous memory of a process in bytes; 0 without /proc, or if there is no such process.

    Pages that processes share after a fork count for each. To tell them apart takes the system so long
    (smaps_rollup) that it slowed builds by half.
    """
    with contextlib.suppress(OSError):
        for line in (Path("/proc") / str(process) / "status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
