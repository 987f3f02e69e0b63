"""The smoke test of GPUs, on a machine without: what it does when items crash, hang, or find no time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcm_compile.apart import call_apart
from lcm_compile.benchmarks import gpu_smoke, gpu_smoke_items
from lcm_compile.benchmarks.gpu_smoke import ITEMS, Item, smoke, summary_line
from lcm_compile.errors import BackendError


def ends(note, target, work):
    note(figure=1, target=target)


def raises(note, target, work):
    note(figure=2)
    raise ValueError("the first line\nand the second")


def crashes(note, target, work):
    note(figure=3)
    os.write(2, b"the library's last words")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(note, target, work):
    note(figure=4, parts={"export step": {"seconds": 1}, "build step": None})
    note(below=subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


def lacks(note, target, work):
    import a_backend_that_is_nowhere  # noqa: F401


def reads(note, target, work, path):
    note(read=json.loads(Path(path).read_text()))


def compiles(graph):
    raise BackendError("can't compile") from ValueError("line 2 of what the compiler said")


def builds_apart(note, target, work):
    call_apart(compiles, None)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_item_ends_the_others(tmp_path):
    report = tmp_path / "gpu_smoke-cpu.json"
    items = [
        Item("raises", raises),
        Item("crashes", crashes),
        Item("hangs", hangs, most=3),
        Item("lacks", lacks),
        Item("reads", reads, (str(report),)),
        Item("ends", ends),
    ]
    path, found = smoke(items, "cpu", 100, tmp_path)
    assert path == report
    written = json.loads(path.read_text())
    assert written["machine"]["versions"]["torch"] and written["machine"]["cores"]
    assert written["items"] == {item.name: found[item.name] for item in items}
    outcomes = {name: item["outcome"] for name, item in written["items"].items()}
    assert outcomes == {
        "raises": "failed",
        "crashes": "crashed",
        "hangs": "timed out",
        "lacks": "missing",
        "reads": "ok",
        "ends": "ok",
    }
    # What an item had found before it was ended is there, and all that is known of why.
    assert [found[name]["figure"] for name in ("raises", "crashes", "hangs", "ends")] == [2, 3, 4, 1]
    assert "Traceback" in found["raises"]["error"] and "and the second" in found["raises"]["error"]
    assert "SIGSEGV" in found["crashes"]["error"]
    assert found["crashes"]["printed"] == "the library's last words"
    assert "a_backend_that_is_nowhere" in found["lacks"]["error"]
    assert found["hangs"]["error"] == "it took more than 3 s, in: build step"
    assert 3 <= found["hangs"]["seconds"] < 15
    assert not is_running(found["hangs"]["below"])
    # The report was written after every item, not at the end.
    assert found["reads"]["read"]["items"].keys() == {"raises", "crashes", "hangs", "lacks"}
    for name, item in found.items():
        assert max(map(len, summary_line(name, item).splitlines())) <= 80


def test_the_cause_of_an_error_in_a_large_build_is_in_the_report(tmp_path):
    """Its stages are built in processes below the item's, and errors come from there without their causes."""
    _, found = smoke([Item("builds", builds_apart)], "cpu", 60, tmp_path)
    assert "BackendError: can't compile" in found["builds"]["error"]
    assert "line 2 of what the compiler said" in found["builds"]["printed"]


def test_the_budget_ends_what_runs_and_skips_the_rest(tmp_path):
    start = time.monotonic()
    items = [
        Item("hangs", hangs, least=0),
        Item("ends", ends, least=20),
        Item("after", ends, least=0, needs="ends"),
    ]
    _, found = smoke(items, "cpu", 5, tmp_path)
    assert time.monotonic() - start < 12
    assert found["hangs"]["outcome"] == "timed out"
    assert (found["ends"]["outcome"], found["after"]["outcome"]) == ("skipped", "skipped")
    assert "s are left, and it takes 20 at least" in found["ends"]["error"]
    assert found["after"]["error"] == "ends did not end well"


def test_a_report_keeps_what_other_runs_found_on_the_same_machine(tmp_path):
    path, first = smoke([Item("ends", ends), Item("other", ends)], "cpu", 60, tmp_path)
    smoke([Item("other", raises), Item("ends", ends, least=1000)], "cpu", 60, tmp_path)
    items = json.loads(path.read_text())["items"]
    assert items["ends"] == first["ends"]  # not tried again: what was found stays
    assert items["other"]["outcome"] == "failed"
    report = json.loads(path.read_text())
    report["machine"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(report))
    smoke([Item("new", ends)], "cpu", 60, tmp_path)
    assert json.loads(path.read_text())["items"].keys() == {"new"}


def test_a_machine_whose_gpu_torch_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    items = [item for item in ITEMS if item.name in ("demo-onnxruntime", "sdxl-weights", "sdxl-aotinductor")]
    path, found = smoke(items, "cuda", 60, tmp_path)
    assert path.name == "gpu_smoke-none.json"
    assert found["machine"]["outcome"] == "missing" and found["machine"]["error"]
    assert found["machine"]["error"] in found["demo-onnxruntime"]["error"]
    assert all(found[item.name]["outcome"] == "skipped" for item in items)


def test_the_command(tmp_path):
    """As the documentation has it; only where the report goes is another folder."""
    code = f"""
import runpy, sys
from pathlib import Path
from lcm_compile.benchmarks import gpu_smoke
gpu_smoke.RESULTS = Path({str(tmp_path)!r})
sys.argv[1:] = ["--device", "cpu", "--only", "demo-tensorrt", "--only", "sdxl-aotinductor"]
runpy.run_module("lcm_compile.benchmarks.gpu_smoke", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    items = json.loads((tmp_path / "gpu_smoke-cpu.json").read_text())["items"]
    # An item's need comes with it.
    assert {name: item["outcome"] for name, item in items.items()} == {
        "demo-tensorrt": "missing",
        "sdxl-weights": "skipped",
        "sdxl-aotinductor": "skipped",
    }
    assert "runs on NVIDIA GPUs only" in items["demo-tensorrt"]["error"]
    lines = done.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80 and lines[-1] == str(tmp_path / "gpu_smoke-cpu.json")
    assert any(line.startswith("demo-tensorrt") and "missing" in line for line in lines)


def test_engines_and_diffusers_draw_the_same_picture_in_turns(sdxl_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_smoke_items, "SDXL_ROUNDS", 3)
    (tmp_path / "weights").symlink_to(sdxl_checkpoint)
    found = {}
    gpu_smoke_items.draw_sdxl(lambda **told: found.update(told), "cpu", tmp_path, "onnxruntime")
    assert found["diffusers_psnr_db"] > 65
    assert min(found["parity"].values()) > 65 and found["parity"].keys() == {
        "encode",
        "step",
        "decode",
        "picture",
    }
    assert found["stage_ms"].keys() == {"encode", "context", "step", "decode"}
    assert found["in_turns_ms"].keys() == {"engines", "diffusers"}
    for times in (*found["stage_ms"].values(), *found["in_turns_ms"].values()):
        assert len(times["samples"]) == 3 and times["median"] == sorted(times["samples"])[1] > 0


def test_what_takes_turns_alternates():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = gpu_smoke_items.timed(calls, gpu_smoke_items.TARGETS["cpu"], 20)
    assert order == ["a", "b"] * (20 + gpu_smoke_items.WARM_UP)
    assert all(len(found["samples"]) == 20 for found in times.values())


@pytest.mark.parametrize("item", gpu_smoke.ITEMS, ids=lambda item: item.name)
def test_needs_come_before(item):
    names = [other.name for other in ITEMS]
    assert not item.needs or names.index(item.needs) < names.index(item.name)
