"""Things to try on a machine that nobody has seen, each in a process and a time limit of its own.

A crash or a hang ends that item and no other. After every item the whole report is written; one that was
stopped keeps what it had found by then.
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

LOG_END = 20_000  # characters of what a failed item's libraries printed
WIDTH = 80
NAME_WIDTH = 31

Found = dict[str, Any]
Note = Callable[..., None]


class Missing(Exception):
    """What can't be tried here, and why."""


@dataclass(frozen=True)
class Item:
    """`run(note, target, work, *args)`. It is begun while `least` seconds are left, and ended after `most`.

    `work` is a folder that all items share, `needs` the items that leave something there; a benchmark's
    report goes to `report_path`. One `on_gpu` is skipped without, one `without_target` is tried even where
    the machine's GPU is none that we know.
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
    return work / f"{name}.report.json"


def perform(item: Item, target: str, work: Path) -> None:
    """An item, in this process: all that it finds goes to `work/<name>.json`, at once."""
    found: Found = {}

    def note(**told: Any) -> None:
        found.update(told)
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
    """All that an item found, however it ended."""
    told = work / f"{item.name}.json"
    told.unlink(missing_ok=True)
    began, start = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    ended: Found = {}
    with at_home(work / f"{item.name}.home"):
        try:
            call_in_child(perform, item, target, work, seconds=seconds)
        except TimeoutError:
            ended = {"outcome": "timed out", "error": f"it took more than {seconds:.0f} s"}
        except Exception as error:  # the process ended, or item and process could not understand each other
            ended = {"outcome": "crashed", "error": str(error)}
    found: Found = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    if ended and (part := next((p for p, cost in found.get("parts", {}).items() if cost is None), None)):
        ended["error"] += f", in: {part}"
    found |= {"began": began, "seconds": round(time.monotonic() - start, 1), **ended}
    if found["outcome"] not in ("ok", "missing"):
        with suppress(OSError):
            printed = (work / f"{item.name}.log").read_text(encoding="utf-8", errors="replace")
            found["printed"] = printed[-LOG_END:]
    write_atomically(told, json_text(found, indent=1))
    return found


def found_in(work: Path, item: Item) -> Found | None:
    """What an earlier run left in the same folder of an item that ended well, or None."""
    try:
        found: Found = json.loads((work / f"{item.name}.json").read_text(encoding="utf-8"))
        return found if found["outcome"] == "ok" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def at_home(home: Path) -> Iterator[None]:
    """A store for one item, empty when it begins and gone when it has ended; no network is waited for."""
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
    """Why an item is not even begun, or None."""
    target = machine.get("target")
    if item.on_gpu and target in (None, "cpu"):
        return "it needs a CUDA GPU, and this run has none"
    if target is None and not item.without_target:
        return f"no target is known here: {last_line(machine)}"
    for need in item.needs:
        if done.get(need, {}).get("outcome") != "ok":
            return f"{need} did not end well"
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
    """Runs items within `budget` seconds. Returns the path of the report `name`, and what is known of each.

    What an earlier run left in `work` is not done again, but for those named in `again`.
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
        # What was found before is worth more than that nothing was tried now.
        tried = {name: found for name, found in done.items() if found["outcome"] != "skipped"}
        write_report(path, here, {**done, **others, **tried})
        sys.stderr.write(summary_line(item.name, done[item.name]) + "\n")
    return path, {"machine": here, **done}


def with_needs(names: Collection[str], items: Sequence[Item]) -> set[str]:
    """The named items, and all that they need."""
    wanted = set(names)
    for item in reversed(items):
        if item.name in wanted:
            wanted.update(item.needs)
    return wanted


def write_report(path: Path, machine: Found, items: Mapping[str, Found]) -> None:
    write_atomically(path, json_text({"schema": 1, "machine": machine, "items": items}, indent=1) + "\n")


def found_before(path: Path, machine: Found) -> dict[str, Found]:
    """The items of an earlier report, if its machine and all versions were the same."""

    def same(found: Found) -> Found:
        return {name: value for name, value in found.items() if name not in ("began", "seconds")}

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return dict(report["items"]) if same(report["machine"]) == same(machine) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def summary_line(name: str, found: Found) -> str:
    line = f"{name:<{NAME_WIDTH}}{found['outcome']:<10}{found.get('seconds', 0):>6.1f} s  {headline(found)}"
    indent = " " * (NAME_WIDTH + 20)
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, max_lines=4, placeholder=" …")


def headline(found: Found) -> str:
    """What an item tells of itself, or the end of its error."""
    return found.get("headline", "") if found["outcome"] == "ok" else last_line(found)


def last_line(found: Found) -> str:
    return next((x for x in reversed(found.get("error", "").splitlines()) if x.strip()), "")
