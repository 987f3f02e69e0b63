"""Graphs made once: for several targets of one command, and for another machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lcm_compile import BuildSpec, build, load
from lcm_compile.builder import prepare
from lcm_compile.bundles.export_manifest import EXPORT
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.pipeline.request import Request


@pytest.fixture(scope="module")
def base(sdxl_checkpoint):
    return BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="onnxruntime")


@pytest.fixture
def counted(monkeypatch):
    """The names of the models that torch prepared."""
    made, real = [], prepare.prepare_model
    monkeypatch.setattr(
        prepare, "prepare_model", lambda plan, name, *rest: (made.append(name), real(plan, name, *rest))[1]
    )
    return made


def test_several_targets_share_one_export(command, base, counted, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    words = ("build", "--base", base.base, "--no-lcm", "--gpu", "a10", "--gpu", "l4", "--gpu", "A10")
    code, out, err = command(*words, "--out", tmp_path / "both")
    assert code == 0, err
    assert counted == ["text", "unet", "vae"]
    folders = [tmp_path / "both" / name for name in ("a10", "l4")]
    assert out.split() == [str(folder) for folder in folders]
    capabilities = [read_manifest(folder)[0].target.compute_capability for folder in folders]
    assert capabilities == ["8.6", "8.9"]
    code, out, err = command(*words, "--out", tmp_path / "both", "--json")
    assert code == 0 and [told["hit"] for told in json.loads(out)] == [True, True]


def test_targets_of_other_precisions_are_exported_apart(command, base, counted, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    words = ("build", "--base", base.base, "--no-lcm", "--gpu", "cpu", "--gpu", "a10")
    code, _, err = command(*words, "--out", tmp_path / "both")
    assert code == 0, err
    assert len(counted) == 6
    precisions = [read_manifest(tmp_path / "both" / n)[0].stages[1].precision for n in ("cpu", "a10")]
    assert precisions == ["fp32", "fp16"]


def test_an_export_builds_what_the_base_builds(base, sdxl_graphs, tmp_path):
    """Moved, and in a process that can import neither diffusers nor transformers: the other machine."""
    moved = shutil.copytree(sdxl_graphs, tmp_path / "moved")
    script = """
import sys
sys.modules.update(diffusers=None, transformers=None, torch=None)
from lcm_compile.cli import main
main()
"""
    words = ["build", "--from", str(moved), "--gpu", "cpu", "--out", str(tmp_path / "b")]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    request = Request("a red star", 3)
    with load(tmp_path / "b") as one, load(build(base)) as other:
        np.testing.assert_array_equal(one.draw(request).pictures, other.draw(request).pictures)
    manifest, _ = read_manifest(tmp_path / "b")
    assert manifest.parity["picture"].checked == "engine" and manifest.parity["picture"].passed
    assert manifest.spec.base == base.base


def test_an_export_has_the_key_of_the_base(command, sdxl_graphs, base, tmp_path):
    """What was built from an export is a hit for the same base, and the other way round."""
    out = tmp_path / "b"
    assert command("build", "--from", sdxl_graphs, "--gpu", "cpu", "--out", out)[0] == 0
    words = ("build", "--base", base.base, "--no-lcm", "--few-step", "lcm", "--gpu", "cpu", "--out", out)
    words += ("--backend", "onnxruntime")
    assert json.loads(command(*words, "--json")[1])["hit"] is True
    assert json.loads(command("build", "--from", sdxl_graphs, "--gpu", "cpu", "--out", out, "--json")[1])[
        "hit"
    ]
    code, told, err = command("build", "--from", sdxl_graphs, "--gpu", "cpu", "--out", out, "--quiet")
    assert (code, told, err) == (0, f"{out}\n", "")


def test_a_damaged_export_is_refused(refused, sdxl_graphs, tmp_path):
    copy = shutil.copytree(sdxl_graphs, tmp_path / "copy")
    step = copy / "graphs" / "step.onnx"
    step.write_bytes(step.read_bytes()[:-1] + b"\0")
    refused(1, ["step.onnx", "damaged"], "build", "--from", copy, "--gpu", "cpu")
    step.unlink()
    refused(1, ["step.onnx", "missing from the export"], "build", "--from", copy, "--gpu", "cpu")
    manifest = json.loads((copy / EXPORT).read_text())
    elsewhere = {**manifest, "files": {**manifest["files"], "../graphs/graphs/step.onnx": "0"}}
    (copy / EXPORT).write_text(json.dumps(elsewhere))
    refused(1, [EXPORT, "not inside"], "build", "--from", copy, "--gpu", "cpu")
    unlisted = {k: v for k, v in manifest["files"].items() if k != "graphs/step.onnx"}
    (copy / EXPORT).write_text(json.dumps({**manifest, "files": unlisted}))
    refused(1, ["graphs/step.onnx", "no digest"], "build", "--from", copy, "--gpu", "cpu")
    (copy / EXPORT).write_text("{}")
    refused(1, ["schema"], "build", "--from", copy, "--gpu", "cpu")
    refused(1, "is not an export", "build", "--from", tmp_path, "--gpu", "cpu")


def test_what_an_export_has_settled_is_not_asked_again(refused, sdxl_graphs):
    refused(2, ["--height", "--from"], "build", "--from", sdxl_graphs, "--gpu", "cpu", "--height", "64")
    refused(2, ["--base", "--from"], "build", "--from", sdxl_graphs, "--base", "demo", "--gpu", "cpu")
    refused(2, "--base", "build", "--gpu", "cpu")


def test_a_backend_of_other_graphs_is_refused(refused, sdxl_graphs):
    told = ["torchscript", "onnx"]
    refused(1, told, "build", "--from", sdxl_graphs, "--gpu", "cpu", "--backend", "torchscript")


def test_nothing_of_the_users_is_overwritten_by_an_export(refused, base, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    refused(2, ["mine.txt"], "export", "--base", base.base, "--no-lcm", "--out", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_unknown_format(refused, base, tmp_path):
    words = ("export", "--base", base.base, "--no-lcm", "--out", tmp_path / "x", "--format", "onx")
    refused(2, ["onx", "onnx"], *words)
