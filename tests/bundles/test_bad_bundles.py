"""Bundles that were damaged, cut short or made to harm: named, never half loaded, nothing outside touched."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

from lcm_compile import load
from lcm_compile.bundles.bundle import list_files
from lcm_compile.bundles.manifest import MANIFEST, read_manifest
from lcm_compile.engines import gpu
from lcm_compile.errors import BackendError, BundleError
from lcm_compile.output.describe import describe_bundle
from lcm_compile.system.dataclass_json import json_text

FILES = ["engines/step.onnx", "tokenizers/tokenizer_2.json", "proof/step.npz"]


@pytest.fixture
def refuse(refused, bundle):
    """Run and verify must both refuse `bundle`, and leave it as it is."""

    def run(*told, verb=("run", "a star", "--engine")):
        before = sorted(p.relative_to(bundle) for p in bundle.rglob("*"))
        refused(1, told, *verb, bundle)
        refused(1, told, "verify", bundle)
        assert sorted(p.relative_to(bundle) for p in bundle.rglob("*")) == before

    return run


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte(refuse, command, bundle, name):
    """Seen although the size and the time are those of the right file, which was checked just before."""
    assert command("inspect", bundle)[0] == command("verify", bundle)[0] == 0
    path = bundle / name
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    refuse(path, "damaged", "--force")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 1000])
def test_a_file_cut_short(refuse, bundle, name, size):
    (bundle / name).write_bytes((bundle / name).read_bytes()[:size])
    refuse(bundle / name, "damaged")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(refuse, bundle, name):
    (bundle / name).unlink()
    refuse(bundle / name, "missing")
    (bundle / name).mkdir()
    refuse(bundle / name, "missing")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", '"x"', "5", "{}", '{"schema": 2}', '{"schema": 999}', "\x00", "[" * 200_000],
    ids=lambda text: text[:16],
)
def test_a_broken_manifest(refuse, bundle, text):
    (bundle / MANIFEST).write_text(text)
    refuse(bundle / MANIFEST, "--force")


def test_a_manifest_that_is_not_text(refuse, bundle):
    (bundle / MANIFEST).write_bytes(b"\xff\xfe\x80")
    refuse(bundle / MANIFEST)


def change(bundle, at, value):
    """Sets one place of the manifest, `stages.0.file`; a value of None takes it out."""
    data = json.loads((bundle / MANIFEST).read_text())
    *path, last = at.split(".")
    inner = data
    for name in path:
        inner = inner[int(name) if isinstance(inner, list) else name]
    last = int(last) if isinstance(inner, list) else last
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    (bundle / MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        ("schema", 1, ["schema 1", "reads 2"]),
        ("schema", "2", "schema '2'"),
        ("backend", None, "backend is missing"),
        ("backend", "os.system", "os.system"),
        ("surprise", 1, "surprise is unknown"),
        ("stages.1.file", 5, "stages.1.file is of type int, not str"),
        ("stages.1.precision", "fp13", "fp13"),
        ("stages.1.contract.inputs.0.shape.0", "1", "stages.1.contract.inputs.0.shape.0"),
        ("stages.1.contract.name", "../../step", "../../step"),
        ("stages.1.contract.inputs.0.name", "latents", "do not fit"),
        ("stages.1.contract.inputs.0.dtype", "float16", "its contract"),
        ("stages.2.contract.outputs.0.shape.3", 4, "do not fit"),
        ("stages.2", None, "decode"),
        ("pipeline.shape.batch", 4, "do not fit"),
        ("pipeline.shape.height", 100_000_000, "do not fit"),
        ("pipeline.shape.width", 0, "width"),
        ("pipeline.tokenizers.0.max_length", 10**9, "do not fit"),
        ("pipeline.tokenizers.0.chunks", 2, "do not fit"),
        ("pipeline.tokenizers.0.width", 31, "do not fit"),
        ("pipeline.tokenizers.0.input", "words", "do not fit"),
        ("pipeline.scheduler.prediction_type", "flow", "flow"),
        ("pipeline.scheduler.num_train_timesteps", 0, "timesteps"),
        ("spec.batch", float("nan"), "spec.batch"),
        ("parity.step.db", float("inf"), "parity.step.db is inf"),
        ("parity.step", None, ""),
    ],
)
def test_a_manifest_changed_in_one_place(refused, command, bundle, at, value, told):
    change(bundle, at, value)
    if told:
        refused(1, told, "run", "a star", "--engine", bundle)
    else:
        assert command("verify", bundle)[0] == 0


PATHS = [
    "../outside.onnx",
    "engines/../../outside.onnx",
    "/etc/hostname",
    "..\\outside.onnx",
    "engines\\step.onnx",
    "C:\\windows\\system.ini",
    "nul\x00byte",
    "",
    "x" * 5000,
    "link/outside.onnx",
    "ring/step.onnx",
]


@pytest.mark.parametrize("name", PATHS, ids=lambda name: name[:20])
@pytest.mark.parametrize("place", ["files", "stages.1.file", "pipeline.tokenizers.0.file", "proof.files.0"])
def test_a_path_that_leaves_the_bundle(refuse, bundle, tmp_path, name, place):
    """By name or through a link, even where what is outside is just what the digest says."""
    outside = tmp_path / "outside.onnx"
    shutil.copyfile(bundle / "engines/step.onnx", outside)
    (bundle / "link").symlink_to(tmp_path)
    (bundle / "ring").symlink_to(bundle / "ring")
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    change(bundle, "files", files | {name: files["engines/step.onnx"]})
    if place != "files":
        change(bundle, place, name)
    refuse("not inside")
    assert outside.is_file()


def test_a_link_to_an_engine_outside(refuse, bundle, tmp_path):
    (bundle / FILES[0]).rename(tmp_path / "step.onnx")
    (bundle / FILES[0]).symlink_to(tmp_path / "step.onnx")
    refuse(FILES[0], "not inside")


def test_a_file_without_a_digest(refuse, bundle):
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    change(bundle, "files", {k: v for k, v in files.items() if k != FILES[0]})
    refuse(FILES[0], "no digest")


WRONG = [None, True, 5, -1, 1.5, "x", [], [5], {}, {"x": 5}, float("nan")]


def places(data, path=()):
    """Every place of a JSON value, of lists the first item's only."""
    yield path
    if isinstance(data, dict):
        for key, value in data.items():
            yield from places(value, (*path, key))
    elif isinstance(data, list) and data:
        yield from places(data[0], (*path, 0))


def test_any_place_of_the_manifest_holding_anything(sdxl_bundle, tmp_path):
    """Each place holds each wrong value in turn: refused by name, or told about as usual."""
    text = (sdxl_bundle / MANIFEST).read_text()
    refusals = 0
    for path in places(json.loads(text)):
        if path[:1] == ("key",) and len(path) == 2 and path[1] != "shape":
            continue  # they are all alike
        for wrong in WRONG:
            data = [json.loads(text)]
            *outer, last = (0, *path)
            inner = data
            for step in outer:
                inner = inner[step]
            inner[last] = wrong
            (tmp_path / MANIFEST).write_text(json.dumps(data[0]))
            try:
                manifest, digest = read_manifest(tmp_path)
            except BundleError as error:
                refusals += 1
                assert MANIFEST in error.message
            else:
                json_text(describe_bundle(tmp_path, manifest, digest), indent=1)
                manifest.spec.command()
    assert refusals > 500


def test_a_manifest_that_can_not_be_read_hinders_no_other_build(command, sdxl_checkpoint, own_home):
    for name, text in (("one", "[" * 100_000), ("two", "{}")):
        (own_home / "bundles" / name).mkdir(parents=True)
        (own_home / "bundles" / name / MANIFEST).write_text(text)
    (own_home / "bundles/three" / MANIFEST).mkdir(parents=True)
    words = ("build", "--base", sdxl_checkpoint, "--gpu", "cpu", "--no-lcm", "--dry-run")
    code, out, _ = command(*words)
    assert code == 0 and "no bundle yet" in out


def rehash(bundle):
    change(bundle, "files", list_files(bundle, but=bundle / MANIFEST))


def test_an_engine_that_is_none_with_a_right_digest(refused, bundle):
    path = bundle / FILES[0]
    path.write_bytes(path.read_bytes()[:-100_000])
    rehash(bundle)
    refused(1, [path, "ONNX Runtime"], "run", "a star", "--engine", bundle)


def test_an_engine_of_another_stage_with_a_right_digest(refused, bundle):
    shutil.copyfile(bundle / "engines/decode.onnx", bundle / FILES[0])
    rehash(bundle)
    refused(1, [bundle / FILES[0], "contract"], "run", "a star", "--engine", bundle)


def test_a_tokenizer_that_is_none_with_a_right_digest(refused, bundle):
    (bundle / FILES[1]).write_text("{}")
    rehash(bundle)
    refused(1, bundle / FILES[1], "run", "a star", "--engine", bundle)


@pytest.mark.parametrize("what", ["garbage", "empty", "objects", "another stage's", "no calls", "no file"])
def test_a_proof_that_is_none_with_a_right_digest(refused, bundle, tmp_path, what):
    """And pickled objects in it are never opened."""
    path, marker = bundle / FILES[2], tmp_path / "executed"

    class Malice:
        def __reduce__(self):
            return type(marker).touch, (marker,)

    if what == "objects":
        np.savez(path, **{"0.in.latent": np.array([Malice()], dtype=object)})
    elif what == "another stage's":
        shutil.copyfile(bundle / "proof/decode.npz", path)
    elif what == "no calls":
        np.savez(path, x=np.zeros(3))
    elif what == "no file":
        path.unlink()
        change(bundle, "proof.files", ["proof/picture.npz"])
    else:
        path.write_bytes(b"" if what == "empty" else b"PK\x03\x04" + bytes(100))
    rehash(bundle)
    refused(1, "proof/step.npz", "verify", bundle)
    assert not marker.exists()


def test_a_picture_of_another_size(refused, bundle):
    np.savez(bundle / "proof/picture.npz", picture=np.zeros((8, 8, 3), np.float32))
    rehash(bundle)
    refused(1, "proof/picture.npz", "verify", bundle)


def test_for_another_gpu(refused, a10_bundle, monkeypatch):
    """Named are the bundle's GPU, this machine, and what to do."""
    words = ("run", "a star", "--engine", a10_bundle.folder)
    if gpu.gpu_here() is None:
        told = ["a10 (A10)", "this machine (cpu)", "no NVIDIA GPU", "--gpu cpu"]
        refused(1, told, *words)
        refused(1, told, "verify", a10_bundle.folder)
    monkeypatch.setattr(gpu, "gpu_here", lambda: ("NVIDIA L4", "8.9"))
    told = [
        "a10 (A10)",
        "NVIDIA L4 (compute capability 8.9)",
        "a10 is 8.6",
        "lcm-compile build --base",
        "--gpu l4",
    ]
    refused(1, told, *words)


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "onnxruntime", "aotinductor"])
def test_for_this_gpu_whose_driver_is_too_old(refused, a10_bundle, tmp_path, monkeypatch, backend):
    """The driver is named, and what it must be: no other machine and no other build is needed."""
    monkeypatch.setattr(gpu, "driver_cuda", lambda: 12)
    monkeypatch.setattr(gpu, "DRIVER", tmp_path / "version")
    gpu.DRIVER.write_text("570.211.01\n")
    monkeypatch.setattr(gpu, "gpu_here", lambda: ("NVIDIA A10", "8.6"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    folder = shutil.copytree(a10_bundle.folder, tmp_path / "bundle")
    change(folder, "backend", backend)
    told = ["a10 (A10)", "driver here is 570.211.01", "CUDA 13 needs 580", "update the NVIDIA driver to 580"]
    for words in (("run", "a star", "--engine"), ("verify",)):
        err = refused(1, told, *words, folder)
        assert "copy it to" not in err and "build" not in err.split("try:")[1]


def test_for_this_gpu_built_with_another_version(refused, a10_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gpu_here", lambda: ("NVIDIA A10", "8.6"))
    folder = shutil.copytree(a10_bundle.folder, tmp_path / "bundle")
    key = {**read_manifest(folder)[0].key, "backend version": "tensorrt-rtx 1.0.0"}
    change(folder, "key", key)
    told = ["built with tensorrt-rtx 1.0.0", "this machine has tensorrt-rtx", "lcm-compile build --base"]
    refused(1, told, "run", "a star", "--engine", folder)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ({"backend version": "torch 1.13.0"}, ["torch 1.13.0", f"torch {torch.__version__}"]),
        ({"builder options": '{"instruction_set": ["avx9", "sse4_2"]}'}, ["processor with avx9"]),
    ],
)
def test_built_by_another_version_or_for_another_processor(refused, bundle, key, told):
    """Told before an engine is opened, with both sides and the command that builds it again."""
    change(bundle, "backend", "aotinductor")
    right = {"backend version": f"torch {torch.__version__}", "builder options": "{}"}
    change(bundle, "key", {**right, **key})
    refused(1, [*told, "lcm-compile build --base"], "run", "a star", "--engine", bundle)


@pytest.mark.parametrize("key", [{}, {"backend version": "1", "builder options": "[1]"}])
def test_not_telling_what_built_it(refused, bundle, key):
    change(bundle, "key", key)
    refused(1, "does not say what built it", "run", "a star", "--engine", bundle)


def test_bare_run_passes_over_bundles_for_other_gpus(command, a10_bundle, bundle, tmp_path, monkeypatch):
    if gpu.gpu_here():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LCM_COMPILE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    recent = tmp_path / "home/recent.json"
    recent.write_text(json.dumps({str(a10_bundle.folder): 2.0}))
    code, _, err = command("run", "a star")
    assert code == 1 and "no bundle here runs on this machine" in err and "a10" not in err.split("try:")[1]
    recent.write_text(json.dumps({str(a10_bundle.folder): 2.0, str(bundle): 1.0}))
    assert command("run", "a star")[0] == 0


def test_python_raises_the_same(bundle):
    (bundle / FILES[0]).unlink()
    with pytest.raises(BundleError, match=r"step\.onnx is missing"):
        load(bundle)
    with pytest.raises((BundleError, BackendError)):
        load(bundle / "engines")
