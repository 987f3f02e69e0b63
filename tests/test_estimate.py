"""What a build takes of the disk and of memory, told before it and looked for before it starts."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from diffusers import StableDiffusionXLPipeline

from lcm_compile import BuildSpec
from lcm_compile.estimate import estimate, parameters
from lcm_compile.plan import make_plan
from lcm_compile.store import bundles_folder


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_parameters_are_those_of_the_models(sdxl_checkpoint):
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint, add_watermarker=False)
    plan = make_plan(BuildSpec(str(sdxl_checkpoint), no_lcm=True))
    for name, component in plan.export.checkpoint.components.items():
        assert parameters(component) == sum(p.numel() for p in getattr(pipe, name).parameters()), name


@pytest.mark.parametrize(("family", "millions"), [("sd15", 859.52), ("sdxl", 2567.46), ("ssd-1b", 1331.33)])
def test_random_weights_are_counted_too(family, millions, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("tensorrt_rtx")
    plan = make_plan(BuildSpec(family, gpu="a10", weights="random"))
    assert parameters(plan.export.checkpoint.components["unet"]) / 1e6 == pytest.approx(millions, abs=0.01)


# Full-size builds for an A10 on 2 cores, by tests/test_full_size.py: GB of memory, of the engines, seconds.
MEASURED = {"sd15": (6.35, 2.15, 180), "sdxl": (14.97, 6.94, 474)}


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
