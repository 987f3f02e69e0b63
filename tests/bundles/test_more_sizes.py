"""Several sizes in one bundle: what is shared, what each draws, and what removes or outdates them."""

from __future__ import annotations

import json
import shutil

import factories
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.builder.build import add_size
from lcm_compile.errors import BundleError, UsageError


@pytest.fixture(scope="module")
def lora(sd15_checkpoint, tmp_path_factory):
    pipe = DiffusionPipeline.from_pretrained(sd15_checkpoint)
    return factories.write_lora(pipe, tmp_path_factory.mktemp("lora") / "x.safetensors", "kohya")


@pytest.fixture(scope="module")
def spec(sd15_checkpoint, lora):
    loras = (LoraSpec(str(lora)),)
    return BuildSpec(
        str(sd15_checkpoint), no_lcm=True, few_step="lcm", backend="onnxruntime", loras=loras, height=64
    )


@pytest.fixture(scope="module")
def sized(spec, tmp_path_factory):
    """A bundle of two sizes."""
    bundle = build(spec, tmp_path_factory.mktemp("sized") / "bundle")
    add_size(bundle.folder, 64, 96)
    return bundle.folder


def test_each_size_draws_what_its_own_bundle_draws(spec, sized, tmp_path):
    alone = build(BuildSpec(**{**vars(spec), "width": 96}), tmp_path / "alone")
    with load(alone) as expected, load(sized, width=96) as found, load(sized) as own:
        one, other = (np.asarray(p("a red star", seed=7)[0]) for p in (expected, found))
        assert one.shape == (64, 96, 3) and (one == other).all()
        assert own("a red star", seed=7)[0].size == (64, 64)


def test_what_depends_on_no_size_is_stored_once(sized):
    further = sized / "sizes" / "64x96"
    for name in ("engines/encode.onnx", "tokenizers/tokenizer.json"):
        assert (sized / name).samefile(further / name)
    assert not (sized / "engines/step.onnx").samefile(further / "engines/step.onnx")


def test_commands_know_the_sizes(command, refused, sized, tmp_path):
    words = ["run", "a star", "--bundle", sized, "--seed", 3, "--width", 96]
    command(*words, "--out", tmp_path / "a.png")
    command(
        "run", "--again", tmp_path / "a.png", "--bundle", sized / "sizes/64x96", "--out", tmp_path / "b.png"
    )
    first, again = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert first.size == (96, 64) and first.tobytes() == again.tobytes()
    told = ["height 128 and width 64", "64x64, 64x96", f"--into {sized} --size 128x64"]
    refused(2, told, "run", "a star", "--bundle", sized, "--height", 128)
    _, out, _ = command("inspect", sized, "--json")
    assert json.loads(out)["sizes"] == ["64x64", "64x96"]
    _, out, _ = command("verify", sized, "--json")
    assert {"step", "64x96 step", "picture", "64x96 picture"} <= json.loads(out)["parity"].keys()


def test_into_adds_and_changes_nothing_else(command, refused, sized, tmp_path):
    folder = shutil.copytree(sized, tmp_path / "bundle")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    _, out, _ = command("build", "--into", folder, "--size", "96x64", "--json")
    assert json.loads(out)["bundle"] == str(folder / "sizes" / "96x64")
    assert before.items() <= {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}.items()
    _, _, err = command("build", "--into", folder, "--size", "96x64", "--size", "64x96")
    assert err.count("hit:") == 2
    refused(2, "--base and --into", "build", "--into", folder, "--size", "64x128", "--base", "demo")
    refused(2, "give it a --size", "build", "--into", folder)
    refused(2, "is not HEIGHTxWIDTH", "build", "--into", folder, "--size", "big")


def test_build_makes_several_at_once(command, spec, tmp_path):
    words = ["--base", spec.base, "--no-lcm", "--few-step", "lcm", "--gpu", "cpu", "--backend", "torchscript"]
    words += ["--size", "64x64", "--size", "64x96", "--out", tmp_path / "bundle"]
    _, out, _ = command("build", *words, "--dry-run", "--json")
    assert [plan["shape"]["width"] for plan in json.loads(out)] == [64, 96]
    _, _, err = command("build", *words)
    assert err.count("miss:") == 2
    with load(tmp_path / "bundle", height=64, width=96) as pipeline:
        assert pipeline("a star", seed=1)[0].size == (96, 64)
    _, _, err = command("build", *words)
    assert (
        err.count("hit:") == 2
        and "inputs are those of 64x96" in err
        and not list(tmp_path.glob("bundle/sizes/.*"))
    )


def test_a_size_of_another_lora_is_refused(spec, lora, sized, tmp_path):
    folder = shutil.copytree(sized, tmp_path / "bundle")
    kept = lora.read_bytes()
    try:
        pipe = DiffusionPipeline.from_pretrained(spec.base)
        factories.write_lora(pipe, lora, "kohya", seed=5)
        with pytest.raises(BundleError, match="out of date"):
            add_size(folder, 96, 96)
    finally:
        lora.write_bytes(kept)
    assert not (folder / "sizes" / "96x96").exists()
    with pytest.raises(UsageError, match="multiple of 8"):
        add_size(folder, 100, 64)


def test_removing_a_bundle_removes_its_sizes(command, refused, sized, tmp_path):
    folder = shutil.copytree(sized, tmp_path / "bundle")
    with load(folder, width=96):
        refused(1, "a process draws with it", "bundles", "rm", folder)
    (folder / "sizes" / "mine.txt").write_text("x")
    refused(1, "mine.txt", "bundles", "rm", folder)
    (folder / "sizes" / "mine.txt").unlink()
    command("bundles", "rm", folder)
    assert not folder.exists()
