"""What a build takes of the disk and of memory, told before it and looked for before it starts."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from diffusers import StableDiffusionXLPipeline

from lcm_compile import BuildSpec
from lcm_compile.builder.estimate import estimate, parameters
from lcm_compile.builder.plan import make_plan
from lcm_compile.bundles.store import bundles_folder


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_parameters_are_those_of_the_models(sdxl_checkpoint):
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint, add_watermarker=False)
    plan = make_plan(BuildSpec(str(sdxl_checkpoint), no_lcm=True, few_step="lcm"))
    for name, component in plan.export.checkpoint.components.items():
        assert parameters(component) == sum(p.numel() for p in getattr(pipe, name).parameters()), name


# A full LCM has 320 × 256 weights more than what it was made of: they embed the guidance scale.
MILLIONS = {
    "sd15": 859.521,
    "sdxl": 2567.464,
    "ssd-1b": 1331.334,
    "lcm-dreamshaper": 859.521 + 0.082,
    "lcm-sdxl": 2567.464 + 0.082,
    "lcm-ssd-1b": 1331.334 + 0.082,
}


@pytest.mark.parametrize(("family", "millions"), MILLIONS.items())
def test_random_weights_are_counted_too(family, millions, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("tensorrt_rtx")
    plan = make_plan(BuildSpec(family, gpu="a10", weights="random"))
    assert parameters(plan.export.checkpoint.components["unet"]) / 1e6 == pytest.approx(millions, abs=0.002)


# Full-size builds for an A10 on 2 cores, by tests/test_full_size.py: GB of memory, of the engines, seconds.
MEASURED = {"sd15": (5.59, 2.15, 106), "sdxl": (11.9, 6.94, 288)}


@pytest.mark.parametrize("family", MEASURED)
def test_within_thirty_percent_of_what_was_measured(family, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("tensorrt_rtx")
    told = estimate(make_plan(BuildSpec(family, gpu="a10", weights="random")).export)
    memory, disk, seconds = MEASURED[family]
    assert told.memory_bytes / 1e9 == pytest.approx(memory, rel=0.3)
    assert told.seconds == pytest.approx(seconds, rel=0.3)
    assert told.bundle_bytes / 1e9 == pytest.approx(disk, rel=0.3)


def test_the_dry_run_tells(command, sdxl_checkpoint, sdxl_bundle, tmp_path):
    words = ("build", "--base", sdxl_checkpoint, "--no-lcm", "--gpu", "cpu", "--out", tmp_path, "--dry-run")
    words += ("--backend", "onnxruntime")
    told = json.loads(command(*words, "--json")[1])["estimate"]
    assert told["bundle_bytes"] == pytest.approx(size(sdxl_bundle / "engines"), rel=0.3)
    out = command(*words)[1]
    assert "MB while it is built" in out and "s on 2 cores" in out


def test_a_disk_that_is_too_small_is_told_before_anything_is_done(refused, sdxl_checkpoint, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3_000_000))
    words = ("build", "--base", sdxl_checkpoint, "--no-lcm", "--gpu", "cpu", "--width", "24")
    err = refused(1, ["3.0 MB free", "make room"], *words)
    assert "export" not in err
    assert not list(bundles_folder().glob(".*"))


@pytest.fixture
def free_disk(monkeypatch):
    """Sets how many bytes are free, by a function."""

    def set_free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size))

    return set_free


@pytest.mark.parametrize("targets", [("a10", "l4"), ("cpu", "a10")], ids="+".join)
def test_room_is_looked_for_for_all_targets_of_a_command(
    refused, command, free_disk, sdxl_checkpoint, tmp_path, targets
):
    """For all bundles and for one export at a time, be its graphs those of all targets or of one."""
    pytest.importorskip("tensorrt_rtx")
    words = ("build", "--base", sdxl_checkpoint, "--no-lcm", "--out", tmp_path / "b", "--gpu", targets[0])
    words = (*words, "--gpu", targets[1])
    plans = json.loads(command(*words, "--dry-run", "--json")[1])
    bundles = [plan["estimate"]["bundle_bytes"] for plan in plans]
    graphs = max(plan["estimate"]["disk_bytes"] - plan["estimate"]["bundle_bytes"] for plan in plans)
    needed = sum(bundles) + graphs
    free_disk(int(1.1 * max(plan["estimate"]["disk_bytes"] for plan in plans)) + 1_000_001)  # for one of them
    err = refused(1, [f"take {needed / 1e6:.1f} MB", "make room"], *words)
    assert "export" not in err and list((tmp_path / "b").iterdir()) == []


def test_from_an_export_the_dry_run_tells_and_room_is_looked_for(
    refused, command, free_disk, sdxl_graphs, sdxl_bundle, tmp_path
):
    words = (
        "build",
        "--from",
        sdxl_graphs,
        "--gpu",
        "cpu",
        "--backend",
        "onnxruntime",
        "--out",
        tmp_path / "b",
    )
    told = json.loads(command(*words, "--dry-run", "--json")[1])["estimate"]
    assert told["bundle_bytes"] == pytest.approx(size(sdxl_bundle / "engines"), rel=0.3)
    assert told["disk_bytes"] == told["bundle_bytes"]  # the graphs are there already
    assert "MB while it is built" in command(*words, "--dry-run")[1]
    free_disk(told["disk_bytes"])
    err = refused(1, ["MB free", "make room"], *words)
    assert "build encode" not in err and not (tmp_path / "b").exists()
    free_disk(2 * told["disk_bytes"] + 1_000_000)
    assert command(*words)[0] == 0


def test_from_an_export_room_is_looked_for_for_all_targets(refused, free_disk, sdxl_graphs, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    words = ("build", "--from", sdxl_graphs, "--out", tmp_path / "b", "--gpu", "cpu", "--gpu", "a10")
    free_disk(int(1.5 * size(sdxl_graphs / "graphs")) + 1_000_000)
    err = refused(1, ["MB free", "make room"], *words)
    assert "build encode" not in err and list((tmp_path / "b").iterdir()) == []
