"""What a person sees: progress on stderr, tables on stdout. Bars are drawn only on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

from lcm_compile.system.dataclass_json import json_text
from lcm_compile.system.stopwatch import Cost
from lcm_compile.targets import GIB


def print_json(data: Any, one_line: bool = False) -> None:
    sys.stdout.write(json_text(data, indent=None if one_line else 2) + "\n")
    sys.stdout.flush()


def note(text: str, quiet: bool = False) -> None:
    if not quiet:
        sys.stderr.write(text + "\n")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the last one wraps on a terminal, and is whole in a pipe."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = [list(row) for row in rows]
    for i, name in enumerate(header):
        last = i == len(header) - 1
        table.add_column(name, no_wrap=not last, overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def size_text(size: int) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


class BuildProgress:
    """Reports a build's parts: a live line on a terminal while one runs, and a line with its cost after it.

    A context manager: an error stops the live line.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty() and not quiet
        self._start = time.perf_counter()
        self._status: Any = None

    def __call__(self, part: str, cost: Cost | None) -> None:
        self._stop()
        if cost is not None:
            memory = f"{cost.memory_bytes / GIB:8.1f} GiB" if cost.memory_bytes else ""
            note(f"  {part:<32}{cost.seconds:6.1f} s{memory}", self._quiet)
        elif self._live:
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._status = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._status.add_task(part, total=None)
            self._status.start()

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


class Bar:
    """A progress bar with its own text, on a terminal only."""

    def __init__(self, description: str, quiet: bool = False) -> None:
        self._bar: Any = None
        if sys.stderr.isatty() and not quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(description, total=None)

    def update(self, done: int, total: int, description: str | None = None) -> None:
        if self._bar is not None:
            options = {} if description is None else {"description": description}
            self._bar.update(self._task, completed=done, total=total, **options)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
