"""The probe of a GPU, tried on a processor: its parts, and the kit in which it travels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distribution

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from lcm_compile.benchmarks.gpu import kit, probe, probe_items
from lcm_compile.benchmarks.gpu.items import Missing
from lcm_compile.bundles.bundle import list_files, open_bundle
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.errors import UsageError


@pytest.fixture
def noted(monkeypatch):
    """What a part notes; each measurement takes no longer than it must."""
    monkeypatch.setattr(probe_items, "EACH", 0.0)
    found = {}
    return found, lambda **results: found.update(results)


@pytest.fixture
def weighty(sdxl_bundle, tmp_path):
    """A bundle with weights in a file of their own, and these."""
    folder = shutil.copytree(sdxl_bundle, tmp_path / "bundle")
    weights = {
        "layer": np.ones((600, 512), np.float32),
        "half": np.ones((64, 64), np.float16),
        "count": np.ones(3, np.int64),
    }
    save_file(weights, folder / "engines" / "step.safetensors", {"of": "step"})
    manifest, _ = read_manifest(folder)
    replace(manifest, files=list_files(folder)).write(folder)
    return folder, weights


def test_facts(noted, tmp_path):
    found, note = noted
    probe_items.facts(note, "cpu", tmp_path)
    assert found["cannot_run"]["torchscript"] is None
    assert "NVIDIA GPUs only" in found["cannot_run"]["tensorrt-rtx"]
    assert found["compiler"] == shutil.which("g++") and found["headline"]


def test_ceilings(noted, tmp_path):
    found, note = noted
    probe_items.ceilings(note, "cpu", tmp_path)
    assert len(found["tflop_s"]) == 8 and found["copy_gb_s"] > 0
    for figures in found["tflop_s"].values():
        assert figures["bf16"] > 0 and figures.keys() == {"fp16", "bf16", "fp8", "int8"}


def test_what_one_form_of_attention_can_not_do_ends_no_other(noted, tmp_path):
    found, note = noted
    probe_items.attention(note, "cpu", tmp_path)
    assert len(found["attention_ms"]) == 5
    for figures in found["attention_ms"].values():
        assert isinstance(figures["CUDNN_ATTENTION"], str) and figures["written out"] > 0


def test_all_forms_compute_the_same(noted, tmp_path, monkeypatch):
    found, note = noted
    monkeypatch.setattr(probe_items, "MAPS", ((32, 128),))
    monkeypatch.setattr(probe_items, "NORMALIZED", ((64, 128),))
    probe_items.forms(note, "cpu", tmp_path)
    assert all(len(forms) == 4 for forms in found["doubling"].values()) and len(found["doubling"]) == 2
    for forms in (*found["doubling"].values(), *found["normalization"].values()):
        assert all(form["ms"] > 0 and form["differs"] < 1e-4 for form in forms.values()), forms


def test_engines_are_timed_and_held_to_their_proof(noted, sdxl_bundle, tmp_path):
    found, note = noted
    probe_items.stages(note, "cpu", tmp_path, sdxl_bundle)
    assert found["stages"].keys() == {"encode", "context", "step", "decode"}
    for result in found["stages"].values():
        assert result["ms"] > 0 and result["db"] > 80 and result["captured"] == "it computes on the processor"
    with pytest.raises(Missing, match="is for cpu, and this run is for h100"):
        probe_items.stages(note, "h100", tmp_path, sdxl_bundle)


def test_what_follows_a_product_is_the_same_within_it(noted, tmp_path):
    found, note = noted
    probe_items.epilogues(note, "cpu", tmp_path)
    assert len(found["epilogues"]) == 4
    for forms in found["epilogues"].values():
        assert len(forms) == 2 and all(form["ms"] > 0 and form["differs"] < 1e-5 for form in forms.values())


def test_a_bundle_travels_without_its_weights_and_gets_random_ones(noted, weighty, tmp_path):
    folder, weights = weighty
    kit.strip(folder, tmp_path / "kit" / "bundle")
    travelled = tmp_path / "kit" / "bundle"
    assert not list(travelled.rglob("*.safetensors")) and len(kit.left_out(travelled)) == 1
    saved = sum(array.nbytes for array in weights.values())
    calls = sum(path.stat().st_size for path in folder.glob("proof/*.npz"))
    sizes = [sum(p.stat().st_size for p in one.rglob("*") if p.is_file()) for one in (folder, travelled)]
    assert sizes[0] - sizes[1] == saved + calls and calls
    found, note = noted
    probe_items.stages(note, "cpu", tmp_path / "work", travelled)
    assert found["stages"]["step"]["ms"] > 0 and "db" not in found["stages"]["step"]
    filled = tmp_path / "work" / "filled" / "bundle"
    open_bundle(filled).manifest.check_files(filled)
    made = load_file(filled / "engines" / "step.safetensors")
    assert {n: (a.dtype, a.shape) for n, a in made.items()} == {
        n: (a.dtype, a.shape) for n, a in weights.items()
    }
    assert made["layer"].std() == pytest.approx(kit.SCALE, rel=0.02) and abs(made["layer"].mean()) < 1e-3
    assert made["half"].std() > 0 and not made["count"].any()
    # The header, with what it tells besides, is the original's.
    originals, copies = (one / "engines" / "step.safetensors" for one in (folder, filled))
    size = len(originals.read_bytes()) - saved
    assert originals.read_bytes()[:size] == copies.read_bytes()[:size]


def test_random_weights_of_products_in_fp8_have_scales_that_are_no_noise(tmp_path):
    """A scale of noise may be next to nothing, which makes every input of the product the largest value."""
    arrays = {"weight": torch.ones(640, 640).to(torch.float8_e4m3fn), "scale": torch.tensor(3.0)}
    save_torch(arrays, tmp_path / "plain.safetensors")
    content = (tmp_path / "plain.safetensors").read_bytes()
    (tmp_path / "header").write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    kit.write_random(tmp_path / "header", tmp_path / "random.safetensors")
    made = load_torch(tmp_path / "random.safetensors")
    assert made["scale"] == pytest.approx(kit.SCALE) and made["weight"].dtype == torch.float8_e4m3fn
    as_large = made["weight"].float() * made["scale"]
    assert float(as_large.std()) == pytest.approx(kit.SCALE, rel=0.02)


def needed_by(*names):
    """The packages that these need here, themselves among them, by what they say of themselves."""
    found, left = set(), list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name not in found:
            found.add(name)
            wanted = [Requirement(line) for line in distribution(name).requires or ()]
            left += [w.name for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    return found


def test_what_diffusers_and_the_probe_need_is_in_the_kit_or_there():
    there = needed_by("torch", "transformers", "pillow")
    wanted = needed_by("diffusers", "click", "rich", "platformdirs") - there
    assert wanted <= {canonicalize_name(name) for name in ("diffusers", *kit.SMALL)}


def test_a_kit_that_is_too_large_names_the_largest_file(weighty, tmp_path, monkeypatch):
    """Without what it downloads."""
    folder, _ = weighty
    monkeypatch.setattr(kit.subprocess, "run", lambda *_, **__: None)
    kit.pack(tmp_path / "kit.tar", (folder,))
    assert (tmp_path / "kit.tar").stat().st_size < 60e6
    monkeypatch.setattr(kit, "MOST_BYTES", 1000)
    with pytest.raises(UsageError) as caught:
        kit.pack(tmp_path / "large.tar", (folder,))
    assert "bundles/bundle/engines/" in (caught.value.hint or "") and not (tmp_path / "large.tar").exists()


def test_parts_are_in_the_order_of_their_worth_each_with_a_limit(tmp_path):
    parts = probe.parts_of((tmp_path / "a", tmp_path / "b"))
    assert [part.name for part in parts] == [
        *("facts", "ceilings", "attention", "forms"),
        *("stages-a", "stages-b", "pictures-a", "pictures-b", "epilogues"),
    ]
    assert all(part.most <= 240 for part in parts)


@pytest.mark.slow
def test_the_command_writes_the_report_where_it_is_asked_for(sdxl_bundle, tmp_path):
    words = ["--device", "cpu", "--results", tmp_path / "results", "--bundle", sdxl_bundle, "--budget", "300"]
    command = [sys.executable, "-m", "lcm_compile.benchmarks.gpu.probe", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads((tmp_path / "results" / "gpu_probe-cpu.json").read_text())
    assert done.stdout.rstrip().endswith("gpu_probe-cpu.json")
    outcomes = {name: item["outcome"] for name, item in report["items"].items()}
    assert set(outcomes.values()) == {"ok"}, report["items"]
    assert report["items"][f"pictures-{sdxl_bundle.name}"]["summary"]
