"""The commands as people type them, from build to picture."""

from __future__ import annotations

import json
import shutil

import factories
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.bundles.manifest import MANIFEST
from lcm_compile.engines import BACKENDS
from lcm_compile.output.console import note
from lcm_compile.output.picture_settings import read_origin
from lcm_compile.pipeline.request import Request


def test_run_writes_the_picture_and_how_it_was_made(command, sdxl_bundle, tmp_path):
    picture = tmp_path / "new folder" / "star.png"
    code, out, _ = command(
        "run", "a red star ★", "--engine", sdxl_bundle, "--seed", 0, "--steps", 2, "--out", picture
    )
    assert (code, out.strip()) == (0, str(picture))
    image = Image.open(picture)
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 5
    digest = open_bundle(sdxl_bundle).digest
    origin = read_origin(picture)
    assert (origin.request, origin.bundle) == (Request("a red star ★", 0, steps=2, index=0), digest)


def test_run_json(command, sdxl_bundle, tmp_path):
    code, out, _ = command(
        "run",
        "a star",
        "--engine",
        sdxl_bundle,
        "--num-images",
        3,
        "--seed",
        5,
        "--out",
        tmp_path / "many",
        "--json",
    )
    data = json.loads(out)
    assert code == 0
    assert [image["index"] for image in data["images"]] == [0, 1, 2]
    assert all((tmp_path / "many").joinpath(f"{i:03d}.png").is_file() for i in range(3))
    assert {image["seed"] for image in data["images"]} == {5}
    assert (data["steps"], data["guidance_scale"], data["engine"]) == (4, 1.0, str(sdxl_bundle))
    assert set(data["ms"]) == {"encode", "context", "step", "decode", "total", "load"}
    assert len(data["ms"]["step"]) == 12
    parts = data["ms"]["encode"] + sum(data["ms"]["step"]) + data["ms"]["decode"]
    assert 0 < parts <= data["ms"]["total"] * 1.01


def test_without_a_seed_one_is_drawn_and_printed(command, sdxl_bundle, tmp_path):
    _, _, err = command("run", "a star", "--engine", sdxl_bundle, "--out", tmp_path / "a.png")
    seed = read_origin(tmp_path / "a.png").request.seed
    assert f"seed {seed}" in err
    command("run", "a star", "--engine", sdxl_bundle, "--seed", seed, "--out", tmp_path / "b.png")
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_hints(command, sdxl_bundle, tmp_path):
    out = tmp_path / "a.png"
    _, _, err = command("run", "a", "--engine", sdxl_bundle, "--guidance-scale", 3, "--out", out)
    assert "guidance" in err
    _, _, err = command("run", "red star " * 60, "--engine", sdxl_bundle, "--out", out)
    assert "warning" in err and "77 tokens" in err and "star red star" in err
    _, _, err = command("run", "a", "--engine", sdxl_bundle, "--guidance-scale", 3, "--out", out, "--quiet")
    assert err == ""


def test_bare_run_takes_the_bundle_built_or_hit_last(command, sdxl_checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = ("build", "--base", sdxl_checkpoint, "--no-lcm", "--gpu", "cpu", "--backend", "torchscript")
    code, first, _ = command(*options)
    assert code == 0
    assert command(*options, "--width", 32)[0] == 0
    assert "hit" in command(*options)[2]
    code, out, _ = command("run", "--json")
    data = json.loads(out)
    assert (code, data["engine"]) == (0, first.strip())
    assert Image.open(data["images"][0]["path"]).size == (64, 64)


def test_a_moved_bundle_runs_without_its_checkpoint(command, tmp_path):
    base = factories.write_sd15(tmp_path / "base", factor=4)
    code, _, _ = command(
        "build",
        "--base",
        base,
        "--no-lcm",
        "--gpu",
        "cpu",
        "--backend",
        "torchscript",
        "--out",
        tmp_path / "one",
    )
    assert code == 0
    before = command("run", "a star", "--engine", tmp_path / "one", "--seed", 1, "--out", tmp_path / "a.png")
    shutil.rmtree(base)
    (tmp_path / "one").rename(tmp_path / "two")
    after = command("run", "a star", "--engine", tmp_path / "two", "--seed", 1, "--out", tmp_path / "b.png")
    assert before[0] == after[0] == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    assert command("verify", tmp_path / "two")[0] == 0


def test_verify_passes_and_tells_its_figures(command, sdxl_bundle):
    code, out, _ = command("verify", sdxl_bundle, "--json")
    data = json.loads(out)
    assert (code, data["passed"]) == (0, True)
    assert set(data["parity"]) == {"encode", "context", "step", "decode", "picture"}
    assert all(figure["db"] >= 80 for figure in data["parity"].values())


def test_verify_exits_3_for_an_engine_of_other_weights(command, sdxl_bundle, tmp_path):
    """An engine swapped for one of a slightly different model, its digest put right."""
    import onnx

    from lcm_compile.bundles.bundle import list_files

    bundle = tmp_path / "bundle"
    shutil.copytree(sdxl_bundle, bundle)
    model = onnx.load(bundle / "engines/step.onnx")
    weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, bundle / "engines/step.onnx")
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"] = list_files(bundle)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    code, out, err = command("verify", bundle)
    assert code == 3
    assert "step" in err and "MISS" in out and "--force" in err


def change_weights(checkpoint, folder, component, change):
    shutil.copytree(checkpoint, folder)
    path = folder / component / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def nan(tensors):
    tensors["conv_in.weight"].fill_(float("nan"))


def flat(tensors):
    tensors["decoder.conv_out.weight"].zero_()


def underflowing(tensors):
    """Right in fp32; in fp16 the first weights fall among the subnormals."""
    tensors["post_quant_conv.weight"].mul_(1e-6)
    tensors["post_quant_conv.bias"].mul_(1e-6)
    tensors["decoder.conv_in.weight"].mul_(1e4)
    tensors["decoder.conv_in.bias"].mul_(1e-2)


@pytest.mark.parametrize(
    ("component", "change", "told"),
    [("unet", nan, "NaN"), ("vae", flat, "flat"), ("vae", underflowing, "decode")],
)
def test_a_parity_miss_is_exit_3_and_publishes_nothing(
    command, sdxl_checkpoint, tmp_path, component, change, told
):
    base = change_weights(sdxl_checkpoint, tmp_path / "base", component, change)
    out = tmp_path / "out" / "bundle"
    code, stdout, err = command(
        *("build", "--base", base, "--no-lcm", "--gpu", "cpu", "--precision", "fp16", "--out", out)
    )
    assert (code, stdout) == (3, "")
    assert told in err and "Traceback" not in err
    assert list(out.parent.iterdir()) == []


def test_dry_run_tells_the_plan_and_builds_nothing(command, sdxl_checkpoint, tmp_path):
    out = tmp_path / "bundle"
    code, stdout, _ = command(
        "build", "--base", sdxl_checkpoint, "--no-lcm", "--gpu", "t4", "--out", out, "--dry-run", "--json"
    )
    plan = json.loads(stdout)
    assert (code, plan["hit"], plan["backend"]) == (0, False, "tensorrt-rtx")
    assert plan["precisions"] == dict.fromkeys(("encode", "context", "step", "decode"), "fp16")
    assert plan["shape"] == {"batch": 1, "height": 64, "width": 64}
    assert plan["reasons"] and not out.exists()


def test_inspect_a_bundle(command, sdxl_bundle):
    code, out, _ = command("inspect", sdxl_bundle, "--json")
    data = json.loads(out)
    assert code == 0
    assert (data["target"], data["backend"], data["architecture"]) == ("cpu", "onnxruntime", "sdxl")
    assert [stage["name"] for stage in data["stages"]] == ["encode", "context", "step", "decode"]
    assert command("inspect", sdxl_bundle)[0] == 0


def test_targets(command):
    code, out, _ = command("targets", "--json")
    found = {target["name"]: target for target in json.loads(out)}
    assert code == 0
    assert found["a10"]["compute_capability"] == "8.6"
    assert found["4090"]["memory_bytes"] == 24 * 2**30
    assert found["cpu"]["compute_capability"] is None
    assert {"t4", "2080ti", "a10g", "a100", "3090", "l4", "l40s", "5090", "h100", "h200", "b200"} <= set(
        found
    )
    code, out, _ = command("targets")
    assert max(map(len, out.splitlines())) < 80


def test_doctor_finds_out_by_computing(command):
    code, out, _ = command("doctor", "--json")
    found = {backend["backend"]: backend for backend in json.loads(out)}
    assert code == 0
    assert set(found) == set(BACKENDS)
    assert all(found[name]["runs"] for name in ("onnxruntime", "openvino", "torchscript", "aotinductor"))
    timed = {name for name, backend in found.items() if backend["milliseconds"]}
    assert timed == {"onnxruntime", "openvino", "torchscript"}
    if not torch.cuda.is_available():
        assert not found["tensorrt-rtx"]["runs"]
        assert "GPU" in found["tensorrt-rtx"]["reason"]
    assert all(backend["reason"] for backend in found.values())


def test_quiet_ends_with_its_command(command, capsys, tmp_path):
    """A program that runs a quiet command in its own process still sees later notes."""
    command("verify", tmp_path, "--quiet")
    note("shown")
    assert capsys.readouterr().err == "shown\n"
