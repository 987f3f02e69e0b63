"""The suite for GPUs, on a machine without: what it does when items crash, hang, or find no time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import load_modules
from suite_items import builds_apart, crashes, ends, hangs, is_known, lacks, raises, reads

from lcm_compile.benchmarks.gpu import gpu_items, smoke, suite
from lcm_compile.benchmarks.gpu.gpu_items import Engines
from lcm_compile.benchmarks.gpu.items import Item, Missing, report_path, run_items, summary_line, with_needs
from lcm_compile.benchmarks.gpu.suite import ITEMS, MACHINE, print_measured
from lcm_compile.benchmarks.measure.report import read_report
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.errors import ParityError
from lcm_compile.pipeline.pipeline import LcmPipeline
from lcm_compile.proof.cuda_rehearsal import move
from lcm_compile.spec import REWRITES, BuildSpec, Shape
from lcm_compile.stages.stage import make_stages, rewrite_modules

# The items of which the engines of a large model are made.
PARTS = ("-export", "-encode", "-context", "-step", "-decode")


KNOWN = Item("machine", is_known)


def run(items, budget, results, device="cpu", work=None, again=(), machine=KNOWN):
    """Without `work`, in a folder of its own, as the command does."""
    with tempfile.TemporaryDirectory() as scratch:
        return run_items(machine, items, device, budget, results, work or Path(scratch), again)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_item_ends_the_others(tmp_path):
    report = tmp_path / "gpu_suite-cpu.json"
    items = [
        Item("raises", raises),
        Item("crashes", crashes),
        Item("hangs", hangs, most=10),
        Item("lacks", lacks),
        Item("reads", reads, (str(report),)),
        Item("ends", ends),
    ]
    path, found = run(items, 100, tmp_path, machine=MACHINE)
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
    assert found["hangs"]["error"] == "it took more than 10 s, in: build step"
    assert 10 <= found["hangs"]["seconds"] < 25
    assert not is_running(found["hangs"]["below"])
    # The report was written after every item, not at the end.
    assert found["reads"]["read"]["items"].keys() == {"raises", "crashes", "hangs", "lacks"}
    for name, item in found.items():
        assert max(map(len, summary_line(name, item).splitlines())) <= 80


def test_the_cause_of_an_error_in_a_large_build_is_in_the_report(tmp_path):
    """Its stages are built in processes below the item's, and errors come from there without their causes."""
    _, found = run([Item("builds", builds_apart)], 60, tmp_path)
    assert "BackendError: can't compile" in found["builds"]["error"]
    assert "line 2 of what the compiler said" in found["builds"]["printed"]


def test_the_budget_ends_what_runs_and_skips_the_rest(tmp_path):
    start = time.monotonic()
    items = [
        Item("hangs", hangs, least=0),
        Item("ends", ends, least=20),
        Item("after", ends, least=0, needs=("ends",)),
    ]
    _, found = run(items, 5, tmp_path)
    assert time.monotonic() - start < 12
    assert found["hangs"]["outcome"] == "timed out"
    assert (found["ends"]["outcome"], found["after"]["outcome"]) == ("skipped", "skipped")
    assert "s are left, and it takes 20 at least" in found["ends"]["error"]
    assert found["after"]["error"] == "ends did not succeed"


def test_a_report_keeps_what_other_runs_found_on_the_same_machine(tmp_path):
    path, first = run([Item("ends", ends), Item("other", ends)], 60, tmp_path)
    run([Item("other", raises), Item("ends", ends, least=1000)], 60, tmp_path)
    items = json.loads(path.read_text())["items"]
    assert items["ends"] == first["ends"]  # not tried again: what was found stays
    assert items["other"]["outcome"] == "failed"
    report = json.loads(path.read_text())
    report["machine"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(report))
    run([Item("new", ends)], 60, tmp_path)
    assert json.loads(path.read_text())["items"].keys() == {"new"}


def test_a_machine_whose_gpu_torch_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    items = [item for item in ITEMS if item.name in ("demo-weights", "sdxl-weights", "sdxl-aotinductor")]
    path, found = run(items, 60, tmp_path, "cuda", machine=MACHINE)
    assert path.name == "gpu_suite-none.json"
    assert found["machine"]["outcome"] == "missing" and found["machine"]["error"]
    assert found["machine"]["error"] in found["demo-weights"]["error"]
    assert all(found[item.name]["outcome"] == "skipped" for item in items)


def test_the_command(tmp_path):
    """Its report goes where it is asked for."""
    code = f"""
import runpy, sys
sys.argv[1:] = ["--device", "cpu", "--results", {str(tmp_path)!r}, "--only", "sdxl-aotinductor-eager"]
runpy.run_module("lcm_compile.benchmarks.gpu.suite", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    items = json.loads((tmp_path / "gpu_suite-cpu.json").read_text())["items"]
    # An item's need comes with it.
    assert {name: item["outcome"] for name, item in items.items()} == {
        "sdxl-weights": "skipped",
        **{f"sdxl-aotinductor{part}": "skipped" for part in (*PARTS, "", "-eager")},
    }
    lines = done.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= 80 and lines[-1] == str(tmp_path / "gpu_suite-cpu.json")
    assert any(line.startswith("sdxl-weights") and "skipped" in line for line in lines)


def test_what_ended_well_is_not_done_again_in_the_same_folder(tmp_path):
    items = [Item("ends", ends), Item("after", ends, needs=("ends",))]
    _, first = run(items, 60, tmp_path, work=tmp_path)
    _, second = run([*items, Item("raises", raises)], 60, tmp_path, work=tmp_path, again=["after"])
    assert second["ends"] == first["ends"] and second["after"]["outcome"] == "ok"
    assert second["after"]["at"] > first["after"]["at"]
    _, third = run([Item("raises", ends)], 60, tmp_path, work=tmp_path)
    assert third["raises"]["outcome"] == "ok"  # what failed is tried again


TINY = Engines("tiny", "onnxruntime", 2)


def compare_graphs(work, told):
    gpu_items.compare_graphs(lambda **found: told.update(found), "cpu", work, TINY)


@pytest.fixture(scope="module")
def noted(sdxl_checkpoint, new_store, tmp_path_factory):
    """All that the items of one model find, called one after the other, and the folder that they share."""
    work, told = tmp_path_factory.mktemp("work"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCM_COMPILE_HOME", str(new_store(work / "home")))
        patch.setitem(gpu_items.MODELS, "tiny", BuildSpec(str(sdxl_checkpoint), no_lcm=True, few_step="lcm"))
        patch.setattr(gpu_items, "RUNS", 3)
        gpu_items.write_weights(lambda **found: told.update(found), "cpu", work, "tiny")
        gpu_items.build_model(lambda **found: told.update(found), "cpu", work, TINY)
        seen = []

        def note(**found):
            told.update(found)
            seen.append(read_report(report_path(work, "speed")).benchmark.against)

        gpu_items.measure(note, "cpu", work, "speed", TINY, "eager")
    return told, work, seen


def test_engines_and_diffusers_draw_the_same_pictures_in_turn(noted):
    told, work, _ = noted
    assert told["psnr_db"] > 65 and told["parity"].keys() == {
        "encode",
        "context",
        "step",
        "decode",
        "picture",
    }
    cases = {case.name: case for case in read_report(report_path(work, "speed")).cases}
    assert cases.keys() == {"picture", "encode", "context", "step", "decode"}  # no cold starts
    assert len(cases["picture"].samples_ms) == len(cases["picture"].rivals["eager"].samples_ms) == 3
    middle = sorted(cases["picture"].samples_ms)[1]
    assert told["summary"]["cases"]["picture"]["median"] == middle
    assert told["summary"]["pictures_a_second"] == pytest.approx(2 * 1000 / middle)


def test_our_own_figure_is_kept_before_a_rival_is_loaded(noted):
    assert noted[2] == [(), ("eager",), ("eager",)]


def test_pictures_with_cuda_graphs_are_compared_with_those_without(noted, monkeypatch):
    _, work, _ = noted
    told = {}
    monkeypatch.setattr(gpu_items, "RUNS", 3)
    compare_graphs(work, told)
    assert told["psnr_db"] == 200 and told["cuda_graph"] == "not used: it computes on the processor"
    assert {way: len(ms) for way, ms in told["ms"].items()} == {"with": 3, "without": 3}
    draw = LcmPipeline.draw

    def draws_another(self, request):
        return draw(self, request if self.cuda_graph else replace(request, seed=request.seed + 1))

    monkeypatch.setattr(LcmPipeline, "draw", draws_another)
    with pytest.raises(ParityError, match="another picture"):
        compare_graphs(work, told)
    assert told["psnr_db"] < 50  # kept, though it failed


def test_the_rival_draws_with_the_very_weights_that_were_built(noted):
    """They are fused once: there is no second copy of a large model on the disk."""
    _, work, _ = noted
    assert len(list(work.rglob("unet/*.safetensors"))) == 1
    config = json.loads((work / "weights" / "tiny" / "vae" / "config.json").read_text())
    assert config["force_upcast"] is False  # diffusers would decode in fp32, and engines do not


def test_the_tables_fit_a_terminal(noted, capsys):
    print_measured({"sdxl-tensorrt-rtx-by-8-eager": noted[0], "machine": {}})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("sdxl-tensorrt-rtx-by-8-eager") for line in lines) == 2


def test_engines_are_verified_stage_by_stage(noted):
    """By the bundle's own proof; not by one of another size; and by one that was recorded apart."""
    _, work, _ = noted
    own, recorded = {}, {}
    one = replace(TINY, batch=1)

    def ignore(**found):
        """An item's `note`."""

    gpu_items.build_model(ignore, "cpu", work, one)
    gpu_items.verify_model(lambda **found: own.update(found), "cpu", work, one)
    assert own["verified"].keys() == {"encode", "context", "step", "decode", "picture"}
    assert all(figure["db"] >= figure["floor"] for figure in own["verified"].values())

    manifest, _ = read_manifest(one.bundle(work))
    twin = replace(manifest.proof, shape=Shape(1, 32, 32))
    replace(manifest, proof=twin).write(one.bundle(work))
    with pytest.raises(Missing, match="of a smaller picture"):
        gpu_items.verify_model(ignore, "cpu", work, one)

    for path in (one.bundle(work) / "proof").glob("*.npz"):
        path.write_bytes(b"another")
    gpu_items.record_proof(ignore, "cpu", work, "tiny")
    gpu_items.verify_model(lambda **found: recorded.update(found), "cpu", work, one)
    for name, figure in recorded["verified"].items():
        assert figure == pytest.approx(own["verified"][name], abs=3)

    calls = gpu_items.proof_of(work, "tiny") / "proof" / "decode.npz"
    arrays = dict(np.load(calls))
    np.savez(calls, **{k: 255 - a if ".out." in k else a for k, a in arrays.items()})
    with pytest.raises(ParityError, match="decode"):  # an engine that computes something else
        gpu_items.verify_model(lambda **found: recorded.update(found), "cpu", work, one)
    assert (
        recorded["verified"]["decode"]["db"] < 20 < recorded["verified"]["step"]["db"]
    )  # kept, though it failed


def move_by_torch(module, device):
    module.to(device)


@pytest.mark.parametrize("rewrites", [(), REWRITES], ids=["plain", "shaped"])
@pytest.mark.parametrize("moves", [move, move_by_torch])
def test_a_moved_stage_has_all_its_tensors_there(sdxl_checkpoint, moves, rewrites):
    """On the device that stands for any other: torch refuses to mix it with the processor."""
    checkpoint, shape = open_checkpoint(str(sdxl_checkpoint)), Shape(1, 64, 64)
    modules = rewrite_modules(load_modules(checkpoint).named(), rewrites, [shape], checkpoint.vae_factor)
    failed = []
    for stage in make_stages(checkpoint, modules, shape, rewrites):
        moves(stage.module, "meta")
        try:
            with torch.inference_mode():
                outputs = stage.module(*(x.to("meta") for x in stage.example_inputs()))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            assert {output.device.type for output in outputs} == {"meta"}
        except RuntimeError:
            failed.append(stage.name)
    assert failed == ([] if moves is move else ["decode"])  # whose scaling of latents is no buffer


@pytest.mark.slow
def test_the_smoke_command(tmp_path):
    code = f"""
import runpy, sys
sys.argv[1:] = ["--device", "cpu", "--results", {str(tmp_path)!r}]
sys.argv += ["--only", "demo-onnxruntime-verify", "--only", "sdxl-aotinductor-verify"]
runpy.run_module("lcm_compile.benchmarks.gpu.smoke", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "gpu_smoke-cpu.json")
    items = json.loads((tmp_path / "gpu_smoke-cpu.json").read_text())["items"]
    told = {name: item["outcome"] for name, item in items.items()}
    assert all(outcome == ("ok" if "demo" in name else "skipped") for name, outcome in told.items())
    assert {"sdxl-weights", "sdxl-proof", "sdxl-aotinductor", "demo-weights"} < told.keys()
    assert items["demo-onnxruntime-verify"]["verified"].keys() >= {"encode", "step", "decode", "picture"}


def test_an_8_bit_unet_is_tried_after_fp16_and_told_where_the_gpu_has_none(tmp_path):
    names = [item.name for item in ITEMS]
    for backend in ("tensorrt", "tensorrt-rtx"):
        order = [f"sdxl-{backend}{precision}" for precision in ("", "-fp8", "-int8")]
        assert [name for name in names if name in order] == order
        assert f"sdxl-{backend}-fp8-eager" in names
    item = next(item for item in ITEMS if item.name == "sdxl-tensorrt-fp8-export")
    with pytest.raises(Missing, match="A10 does not compute in fp8"):
        item.run(lambda **found: None, "a10", tmp_path, *item.args)


def test_a_named_item_comes_with_all_that_it_needs():
    assert with_needs(["sdxl-aotinductor-compile"], ITEMS) == {
        "sdxl-weights",
        *(f"sdxl-aotinductor{part}" for part in (*PARTS, "", "-compile")),
    }


def test_a_model_is_built_a_stage_each(sdxl_checkpoint, own_home, tmp_path, monkeypatch):
    """As it is built in one go: what one stage takes, no other item loses."""
    monkeypatch.setitem(
        gpu_items.MODELS, "tiny", BuildSpec(str(sdxl_checkpoint), no_lcm=True, few_step="lcm")
    )
    items = [replace(item, on_gpu=False) for item in (suite.weights("tiny", 60), *suite.built(TINY))]
    assert [item.name for item in items[1:]] == [TINY.name + part for part in (*PARTS, "")]
    assert max(item.most for item in items) <= 270
    for item in items:
        found = {}
        item.run(lambda found=found, **new: found.update(new), "cpu", tmp_path, *item.args)
        (tmp_path / f"{item.name}.json").write_text(json.dumps(found))
    assert found["parity"].keys() == {"encode", "context", "step", "decode", "picture"}
    bundle = TINY.bundle(tmp_path)
    open_bundle(bundle).manifest.check_files(bundle)
    assert not gpu_items.parts_of(tmp_path, TINY).exists()
    assert gpu_items.quick_plan(TINY.spec(tmp_path, "cpu"), bundle).hit


@pytest.mark.parametrize("items", [ITEMS, smoke.ITEMS], ids=["suite", "smoke"])
def test_needs_come_before(items):
    names = [other.name for other in items]
    assert all(names.index(need) < names.index(item.name) for item in items for need in item.needs)
    assert len(names) == len(set(names))
