"""Terminal output: progress on stderr, tables and JSON on stdout. Bars are shown only on a terminal."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

import click

from lcm_compile.system.dataclass_json import json_text
from lcm_compile.system.stopwatch import Cost
from lcm_compile.targets import GIB

QUIET = "lcm_compile.quiet"  # in the meta data of click's context


def print_json(data: Any, one_line: bool = False) -> None:
    """Prints JSON to stdout at once, indented unless it is to be one line."""
    sys.stdout.write(json_text(data, indent=None if one_line else 2) + "\n")
    sys.stdout.flush()


def be_quiet(quiet: bool) -> None:
    """Silences progress and hints of the running command from now on, or shows them again."""
    click.get_current_context().meta[QUIET] = quiet


def is_quiet() -> bool:
    """Returns whether there is a running command that is to be quiet."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def note(text: str, always: bool = False) -> None:
    """Writes a line of progress or a hint to stderr; `always` is for what --quiet must not silence.

    If stderr can't be written, the line is lost, and the command goes on.
    """
    if always or not is_quiet():
        with contextlib.suppress(OSError):
            sys.stderr.write(text + "\n")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table to stdout. On a terminal the last column wraps; elsewhere lines may be 200 wide."""
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
    """Returns a number of bytes as text in GB, MB or kB, which are powers of 1000."""
    for unit, step in (("GB", 1e9), ("MB", 1e6)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


class BuildProgress:
    """Shows tasks: on a terminal a live line while each runs, and a line with its cost at its end.

    Several threads may report at the same time. As a context manager it removes the live lines after an
    error.
    """

    def __init__(self) -> None:
        self._quiet = is_quiet()  # which other threads can't tell
        self._live = sys.stderr.isatty() and not self._quiet
        self._start = time.perf_counter()
        self._running: dict[str, float] = {}  # the tasks, and when each began
        self._status: Any = None
        self._turn = threading.Lock()

    def __call__(self, task: str, cost: Cost | None) -> None:
        """Shows that a task has ended, with its cost, or if `cost` is None that it has started."""
        with self._turn:
            self._stop()
            if cost is None:
                self._running[task] = time.perf_counter()
            else:
                self._running.pop(task, None)
                memory = f"{cost.memory_bytes / GIB:8.1f} GiB" if cost.memory_bytes else ""
                if not self._quiet:
                    note(f"  {task:<32}{cost.seconds:6.1f} s{memory}")
            if self._live and self._running:
                self._show()

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._status = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        for name, begun in self._running.items():
            shown = self._status.add_task(name, total=None)
            self._status.tasks[shown].start_time -= time.perf_counter() - begun
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
        """The seconds since this object was made."""
        return time.perf_counter() - self._start


class Bar:
    """A progress bar with a description. It is shown on a terminal only, from `with` to its end."""

    def __init__(self, description: str) -> None:
        self._bar: Any = None
        if sys.stderr.isatty() and not is_quiet():
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
        """Shows `done` of `total`, and a new description if one is given."""
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
