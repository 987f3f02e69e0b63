"""Finds out which backends really run on this machine's GPU, in under 8 minutes.

`python -m lcm_compile.benchmarks.gpu_smoke`

Each item has a process and a time limit of its own: a crash or a hang ends that item and no other. After
every item the whole report is written to `benchmarks/results/gpu_smoke-<gpu>.json`; an item that was stopped
keeps what it had found by then. Full-size SDXL may want a run of its own: `--only sdxl-aotinductor`. What
other runs found with the same machine and versions stays in the report.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from lcm_compile.apart import call_apart
from lcm_compile.benchmarks import gpu_smoke_items as does
from lcm_compile.benchmarks.gpu_smoke_items import Found, Missing
from lcm_compile.engines import BACKENDS
from lcm_compile.engines.tensorrt_caches import plain
from lcm_compile.errors import LcmCompileError
from lcm_compile.schema import json_text
from lcm_compile.store import write_atomically

RESULTS = Path(__file__).parent / "results"
LOG_END = 20_000  # characters of what a failed item's libraries printed
WIDTH = 80


@dataclass(frozen=True)
class Item:
    """`run(note, target, work, *args)`. It is begun while `least` seconds are left, and ended after `most`.

    `work` is a folder that all items share, `needs` the item that leaves something there. One `on_gpu` is
    skipped without.
    """

    name: str
    run: Callable[..., None]
    args: tuple[Any, ...] = ()
    least: float = 20
    most: float = 180
    on_gpu: bool = False
    needs: str = ""


MACHINE = Item("machine", does.examine_machine, least=0, most=60)
GPU_BACKENDS = [name for name in BACKENDS if name != "torchscript"]
ITEMS = (
    Item("doctor", does.examine_backends, most=150),
    *(Item(f"demo-{name}", does.draw_demo, (name,)) for name in GPU_BACKENDS),
    Item("demo-tensorrt-rtx-portable", does.draw_portable, on_gpu=True),
    Item("sdxl-weights", does.write_weights, least=60, on_gpu=True),
    *(
        Item(f"sdxl-{name}", does.draw_sdxl, (name,), 120, 900, on_gpu=True, needs="sdxl-weights")
        for name in ("aotinductor", "tensorrt", "onnxruntime")
    ),
)


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
    began, start = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    ended: Found = {}
    with at_home(work / f"{item.name}.home"):
        try:
            call_apart(perform, item, target, work, seconds=seconds)
        except TimeoutError:
            ended = {"outcome": "timed out", "error": f"it took more than {seconds:.0f} s"}
        except Exception as error:  # the process ended, or item and process could not understand each other
            ended = {"outcome": "crashed", "error": str(error)}
    told = work / f"{item.name}.json"
    found: Found = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    if ended and (part := next((p for p, cost in found.get("parts", {}).items() if cost is None), None)):
        ended["error"] += f", in: {part}"
    found |= {"began": began, "seconds": round(time.monotonic() - start, 1), **ended}
    if found["outcome"] not in ("ok", "missing"):
        with suppress(OSError):
            printed = (work / f"{item.name}.log").read_text(encoding="utf-8", errors="replace")
            found["printed"] = printed[-LOG_END:]
    return found


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
    if target is None and item.run is not does.examine_backends:
        return f"no target is known here: {last_line(machine)}"
    if item.needs and done.get(item.needs, {}).get("outcome") != "ok":
        return f"{item.needs} did not end well"
    if left < item.least:
        return f"{max(left, 0):.0f} s are left, and it takes {item.least:.0f} at least"
    return None


def smoke(items: Sequence[Item], device: str, budget: float, results: Path) -> tuple[Path, Found]:
    """Runs items within `budget` seconds. Returns the report's path, and what was found in this run."""
    deadline = time.monotonic() + budget
    done: dict[str, Found] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-smoke-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        machine = run_item(MACHINE, device, work, min(MACHINE.most, budget))
        gpu = machine.get("gpu") or ("cpu" if device == "cpu" else "none")
        path = results / f"gpu_smoke-{plain(gpu)}.json"
        others = found_before(path, machine)
        write_report(path, machine, others)
        for item in items:
            left = deadline - time.monotonic()
            if reason := why_skipped(item, machine, done, left):
                done[item.name] = {"outcome": "skipped", "error": reason}
            else:
                target = machine.get("target") or "cpu"
                done[item.name] = run_item(item, target, work, min(item.most, left))
            # What was found before is worth more than that nothing was tried now.
            tried = {name: found for name, found in done.items() if found["outcome"] != "skipped"}
            write_report(path, machine, {**done, **others, **tried})
            sys.stderr.write(summary_line(item.name, done[item.name]) + "\n")
    return path, {"machine": machine, **done}


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
    line = f"{name:<27}{found['outcome']:<10}{found.get('seconds', 0):>6.1f} s  {headline(found)}"
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * 47, max_lines=4, placeholder=" …")


def headline(found: Found) -> str:
    """The figures that matter most, or the end of the error."""
    if found["outcome"] != "ok":
        return last_line(found)
    told = []
    if parity := found.get("parity"):
        told.append(f"{min(parity.values()):.0f} dB")
    times: Mapping[str, Found] = found.get("in_turns_ms") or found.get("picture_ms") or {}
    for name, ms in times.items():
        told.append(f"{name} {ms['median']:.1f} ms")
    if backends := found.get("backends"):
        told.append(f"run: {', '.join(name for name, found in backends.items() if found['runs']) or 'none'}")
    if gpu := found.get("gpu"):
        told.append(gpu)
    return ", ".join(told)


def last_line(found: Found) -> str:
    return next((x for x in reversed(found.get("error", "").splitlines()) if x.strip()), "")


@click.command()
@click.option("--only", multiple=True, type=click.Choice([item.name for item in ITEMS]), help="Repeatable.")
@click.option("--budget", type=float, default=460, show_default=True, help="Seconds for all.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(only: tuple[str, ...], budget: float, device: str) -> None:
    """Tries every backend on this machine; what does not work is in the report, and no error."""
    wanted = {*only, *(item.needs for item in ITEMS if item.name in only)} if only else None
    items = [item for item in ITEMS if wanted is None or item.name in wanted]
    path, found = smoke(items, device, budget, RESULTS)
    print("\n".join(summary_line(name, told) for name, told in found.items()))
    print(path)


if __name__ == "__main__":
    # Items are pickled by their module's name, which is not __main__ in the processes that run them.
    from lcm_compile.benchmarks.gpu_smoke import main as run

    run()
