"""Runs items, such as a build or a benchmark, on an unknown machine, and writes a report of their results.

Each item has its own process and its own time limit, so that a crash or a hang ends no other item. The
complete report is written after every item. An item that was stopped keeps the results that it had by then.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcm_compile.engines.tensorrt_caches import plain
from lcm_compile.errors import LcmCompileError
from lcm_compile.system.child_process import call_in_child
from lcm_compile.system.dataclass_json import json_text
from lcm_compile.system.files import write_atomically

LOG_END = 20_000  # last characters of a failed item's output that are kept
WIDTH = 80  # columns of a printed line
NAME_WIDTH = 31  # columns of an item's name

# The results of an item, as JSON.
Found = dict[str, Any]
# Adds its keyword arguments to the results of an item, and saves them at once.
Note = Callable[..., None]


class Missing(Exception):
    """Raised by an item that can't run on this machine; the message says why."""


@dataclass(frozen=True)
class Item:
    """A call of `run(note, target, work, *args)`, with its limits and its requirements.

    `work` is a folder that all items share; a benchmark writes its report to `report_path`. The item starts
    only if `least` seconds are left, and is stopped after `most` seconds. `needs` names the items whose files
    in `work` it reads. An item that is `on_gpu` is skipped on a machine without a GPU. One that is
    `without_target` runs even if the GPU of the machine is no known target.
    """

    name: str
    run: Callable[..., None]
    args: tuple[Any, ...] = ()
    least: float = 20
    most: float = 180
    on_gpu: bool = False
    needs: tuple[str, ...] = ()
    without_target: bool = False


def report_path(work: Path, name: str) -> Path:
    """Returns the path of the benchmark report of the item `name`."""
    return work / f"{name}.report.json"


def perform(item: Item, target: str, work: Path) -> None:
    """Runs an item in this process. It writes every result to `work/<name>.json` at once.

    Errors become results: the outcome is "ok", "missing" or "failed". Output of libraries goes to a log.
    """
    found: Found = {}

    def note(**results: Any) -> None:
        found.update(results)
        write_atomically(work / f"{item.name}.json", json_text(found, indent=1))

    with (work / f"{item.name}.log").open("wb") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        item.run(note, target, work, *item.args)
        note(outcome="ok")
    except Missing as error:
        note(outcome="missing", error=str(error))
    except ModuleNotFoundError as error:
        note(outcome="missing", error=f"{traceback.format_exc()}\n{error}")
    except Exception as error:
        hint = f"\ntry: {error.hint}" if isinstance(error, LcmCompileError) and error.hint else ""
        note(outcome="failed", error=traceback.format_exc() + hint)


def run_item(item: Item, target: str, work: Path, seconds: float) -> Found:
    """Runs an item in a child process, and returns its results, however it ends.

    The process is stopped after `seconds`.
    """
    results = work / f"{item.name}.json"
    results.unlink(missing_ok=True)
    began, start = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    ended: Found = {}
    with at_home(work / f"{item.name}.home"):
        try:
            call_in_child(perform, item, target, work, seconds=seconds)
        except TimeoutError:
            ended = {"outcome": "timed out", "error": f"it took more than {seconds:.0f} s"}
        except Exception as error:  # the process ended, or its call or result could not be pickled
            ended = {"outcome": "crashed", "error": str(error)}
    found: Found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    if ended and (part := next((p for p, cost in found.get("parts", {}).items() if cost is None), None)):
        ended["error"] += f", in: {part}"
    found |= {"began": began, "seconds": round(time.monotonic() - start, 1), **ended}
    if found["outcome"] not in ("ok", "missing"):
        with suppress(OSError):
            printed = (work / f"{item.name}.log").read_text(encoding="utf-8", errors="replace")
            found["printed"] = printed[-LOG_END:]
    write_atomically(results, json_text(found, indent=1))
    return found


def found_in(work: Path, item: Item) -> Found | None:
    """Returns the results of an item that an earlier run completed in the same folder, or None."""
    try:
        found: Found = json.loads((work / f"{item.name}.json").read_text(encoding="utf-8"))
        return found if found["outcome"] == "ok" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def at_home(home: Path) -> Iterator[None]:
    """Uses a temporary store for one item, in this context, and keeps the hub client offline."""
    settings = {"LCM_COMPILE_HOME": str(home), "LCM_COMPILE_DEBUG": "1", "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(home, ignore_errors=True)


def why_skipped(item: Item, machine: Found, done: Mapping[str, Found], left: float) -> str | None:
    """Returns why an item can't be started, or None. `left` is the time that is left, in seconds."""
    target = machine.get("target")
    if item.on_gpu and target in (None, "cpu"):
        return "it needs a CUDA GPU, and this run has none"
    if target is None and not item.without_target:
        return f"this machine has no known target: {last_line(machine)}"
    for need in item.needs:
        if done.get(need, {}).get("outcome") != "ok":
            return f"{need} did not succeed"
    if left < item.least:
        return f"{max(left, 0):.0f} s are left, and it takes {item.least:.0f} at least"
    return None


def run_items(
    machine: Item,
    items: Sequence[Item],
    device: str,
    budget: float,
    results: Path,
    work: Path,
    again: Collection[str] = (),
    name: str = "gpu_suite",
) -> tuple[Path, Found]:
    """Runs items within `budget` seconds. Returns the path of the report, and the results of each item.

    `machine` is an item that describes the machine; it runs first. `name` is the start of the report's file
    name. Items that an earlier run completed in `work` are not run again, unless `again` names them.
    """
    deadline = time.monotonic() + budget
    done: dict[str, Found] = {}
    here = run_item(machine, device, work, min(machine.most, budget))
    path = results / f"{name}-{plain(here.get('gpu') or ('cpu' if device == 'cpu' else 'none'))}.json"
    others = found_before(path, here)
    write_report(path, here, others)
    for item in items:
        left = deadline - time.monotonic()
        if item.name not in again and (before := found_in(work, item)):
            done[item.name] = before
        elif reason := why_skipped(item, here, done, left):
            done[item.name] = {"outcome": "skipped", "error": reason}
        else:
            done[item.name] = run_item(item, here.get("target") or "cpu", work, min(item.most, left))
        if (saved := report_path(work, item.name)).is_file():
            shutil.copy(saved, path.with_name(f"{path.stem}-{item.name}.json"))
        # Earlier results of an item are more useful than the information that it was skipped now.
        tried = {name: found for name, found in done.items() if found["outcome"] != "skipped"}
        write_report(path, here, {**done, **others, **tried})
        sys.stderr.write(summary_line(item.name, done[item.name]) + "\n")
    return path, {"machine": here, **done}


def with_needs(names: Collection[str], items: Sequence[Item]) -> set[str]:
    """Returns the names of these items and of all items that they need."""
    wanted = set(names)
    for item in reversed(items):
        if item.name in wanted:
            wanted.update(item.needs)
    return wanted


def write_report(path: Path, machine: Found, items: Mapping[str, Found]) -> None:
    """Writes the report of a machine and the results of its items, as JSON."""
    write_atomically(path, json_text({"schema": 1, "machine": machine, "items": items}, indent=1) + "\n")


def found_before(path: Path, machine: Found) -> dict[str, Found]:
    """Returns the items of an earlier report, if its machine and all versions were the same, otherwise {}."""

    def same(found: Found) -> Found:
        return {name: value for name, value in found.items() if name not in ("began", "seconds")}

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return dict(report["items"]) if same(report["machine"]) == same(machine) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def summary_line(name: str, found: Found) -> str:
    """Returns an item's name, outcome, seconds and headline, in at most four lines of WIDTH columns."""
    line = f"{name:<{NAME_WIDTH}}{found['outcome']:<10}{found.get('seconds', 0):>6.1f} s  {headline(found)}"
    indent = " " * (NAME_WIDTH + 20)
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, max_lines=4, placeholder=" …")


def headline(found: Found) -> str:
    """Returns the headline of an item's results, or the last line of its error."""
    return found.get("headline", "") if found["outcome"] == "ok" else last_line(found)


def last_line(found: Found) -> str:
    """Returns the last line of an item's error that is not empty, or ""."""
    return next((x for x in reversed(found.get("error", "").splitlines()) if x.strip()), "")
