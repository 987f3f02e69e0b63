"""Engines that another bundle has are taken from there: those of what a changed LoRA does not touch."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import factories
import numpy as np
import pytest
from diffusers import StableDiffusionXLPipeline

from lcm_compile import BuildSpec, LoraSpec, load
from lcm_compile.builder.build import build_plans
from lcm_compile.builder.export import export
from lcm_compile.builder.plan import make_plan_from
from lcm_compile.bundles.engine_reuse import take_engine
from lcm_compile.bundles.export_manifest import open_export


@pytest.fixture(scope="module")
def styles(sdxl_checkpoint, tmp_path_factory):
    """Exports of a base with two LoRAs of its UNet."""
    pipe, folders = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint), []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("style")
        lora = factories.write_lora(pipe, folder / "lora.safetensors", "kohya", seed=seed, text=False)
        spec = BuildSpec(str(sdxl_checkpoint), no_lcm=True, few_step="lcm", loras=(LoraSpec(str(lora)),))
        export(replace(spec, precision="fp32"), folder / "graphs")
        folders.append(folder / "graphs")
    return folders


@pytest.fixture
def built(styles, own_home, tmp_path):
    """Builds a bundle of a style in a store of its own, and returns also how it came to each engine."""

    def build(style, name, backend="onnxruntime", force=False):
        plan = make_plan_from(open_export(styles[style]), "cpu", backend, tmp_path / name, force)
        tasks = set()
        [(_, bundle)] = build_plans([plan], force, lambda task, cost: tasks.add(task))
        return bundle, {task for task in tasks if task.startswith(("take", "build"))}

    return build


def inodes(bundle):
    return {path.name: path.stat().st_ino for path in (bundle.folder / "engines").iterdir()}


def picture(bundle):
    with load(bundle) as pipeline:
        return np.asarray(pipeline("a star", seed=3)[0])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_another_style_takes_the_engines_that_it_does_not_change(backend, built):
    pytest.importorskip(backend)
    first, told = built(0, "first", backend)
    assert told == {"build encode", "build context", "build step", "build decode"}
    second, told = built(1, "second", backend)
    assert told == {"take encode from first", "build context", "build step", "take decode from first"}
    same = {name for name, inode in inodes(second).items() if inode == inodes(first).get(name)}
    assert {name.partition(".")[0] for name in same} == {"encode", "decode"}
    assert not [*second.folder.rglob(".*")]
    digests = [{s.contract.name: s.made_of for s in bundle.manifest.stages} for bundle in (first, second)]
    assert {name for name in digests[0] if digests[0][name] == digests[1][name]} == {"encode", "decode"}
    forced, told = built(1, "forced", backend, force=True)
    assert not {task for task in told if task.startswith("take")}
    np.testing.assert_array_equal(picture(second), picture(forced))
    assert not np.array_equal(picture(first), picture(second))


def test_a_damaged_engine_is_not_taken(built):
    first, _ = built(0, "first")
    path = first.folder / "engines" / "decode.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    second, told = built(1, "second")
    assert told == {"take encode from first", "build context", "build step", "build decode"}
    assert picture(second).any()


def test_a_removed_bundle_leaves_the_engines_that_others_took(built):
    first, _ = built(0, "first")
    second, _ = built(1, "second")
    shutil.rmtree(first.folder)
    assert picture(second).any()
    _, told = built(0, "third")
    assert told == {"take encode from second", "build context", "build step", "take decode from second"}


def test_a_file_that_all_stages_share_is_linked_and_never_written_over(built, tmp_path):
    first, _ = built(0, "first")
    shared = first.folder / "engines" / "kernels.so"
    shared.write_bytes(b"first")
    data = json.loads((first.folder / "manifest.json").read_text())
    data["files"]["engines/kernels.so"] = hashlib.sha256(b"first").hexdigest()
    (first.folder / "manifest.json").write_text(json.dumps(data))
    new, other = tmp_path / "new", tmp_path / "other"
    for name in ("encode", "decode"):
        assert take_engine(first.folder, name, new).samefile(first.folder / "engines" / f"{name}.onnx")
    assert (new / "engines" / "kernels.so").samefile(shared)
    (other / "engines").mkdir(parents=True)
    (other / "engines" / "kernels.so").write_bytes(b"other")
    with pytest.raises(FileExistsError):
        take_engine(first.folder, "encode", other)
    assert [path.name for path in (other / "engines").iterdir()] == ["kernels.so"]


def test_another_backend_takes_nothing(built):
    built(0, "first")
    _, told = built(0, "second", "openvino")
    assert not {task for task in told if task.startswith("take")}
