"""A whole picture as one graph: diffusers' pictures, the weights once, and what it can't do told."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, replace

import factories
import numpy as np
import pytest
from diffusers_reference import FLOOR, Pair, reference
from factories import build_from
from PIL import Image
from safetensors import safe_open

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.benchmarks.measure.bench import counted
from lcm_compile.benchmarks.measure.work import count_work
from lcm_compile.builder import plan
from lcm_compile.builder.export import export
from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.checkpoint import open
from lcm_compile.engines import find_backend
from lcm_compile.errors import BundleError, UsageError
from lcm_compile.export import onnx_graph
from lcm_compile.graphs import TensorSpec
from lcm_compile.pipeline.check import check_stages
from lcm_compile.pipeline.noise import TorchNoise
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db
from lcm_compile.proof.recording import read_arrays


@dataclass
class Whole:
    """A bundle that draws in one call, and diffusers' pipeline of the same files."""

    bundle: EngineBundle
    pair: Pair


@pytest.fixture(scope="module")
def sdxl(sdxl_checkpoint, tmp_path_factory):
    """SDXL with a LoRA of UNet and text, TorchScript, two pictures at a time, built from an export."""
    folder = tmp_path_factory.mktemp("one")
    theirs = reference(sdxl_checkpoint)
    lora = factories.write_lora(theirs, folder / "lcm.safetensors", "kohya", seed=1)
    theirs.load_lora_weights(lora)
    lcm = LoraSpec(str(lora))
    spec = BuildSpec(str(sdxl_checkpoint), lcm_lora=lcm, batch=2, precision="fp32", whole_loop=True)
    export(spec, folder / "graphs", "torchscript")
    _, bundle = build_from(folder / "graphs", "cpu", "torchscript", folder / "bundle")
    with load(bundle) as ours:
        yield Whole(bundle, Pair(ours, theirs, 64, 64))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A full LCM of SD1.5's layout, v prediction, ONNX Runtime, a picture at a time."""
    folder = tmp_path_factory.mktemp("one")
    base = factories.write_sd15(
        folder / "base", factor=4, prediction_type="v_prediction", time_cond_proj_dim=16
    )
    spec = BuildSpec(str(base), height=48, width=64, backend="onnxruntime", whole_loop=True)
    bundle = build(spec, folder / "bundle")
    with load(bundle) as ours:
        yield Whole(bundle, Pair(ours, reference(base), 48, 64))


@pytest.fixture(params=["sdxl", "sd15"])
def whole(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("seed", "num_images"), [(7, 1), (2**40 + 3, 3)])
def test_pictures_are_those_of_diffusers(whole, seed, num_images):
    assert min(whole.pair.psnr(seed=seed, num_images=num_images)) >= FLOOR


@pytest.mark.parametrize("guidance_scale", [1.5, 8.0])
def test_a_full_lcm_is_guided_by_an_input(sd15, guidance_scale):
    assert min(sd15.pair.psnr(guidance_scale=guidance_scale)) >= FLOOR


def test_it_is_one_call_a_batch(sdxl):
    calls = []
    runner = sdxl.pair.ours.runners["draw"]

    class Counted(type(runner)):
        def __call__(self, inputs):
            calls.append(1)
            return super().__call__(inputs)

    runner.__class__ = Counted
    drawing = sdxl.pair.ours.draw(Request("a star", 1, num_images=3))
    assert len(calls) == 2 and set(drawing.ms) == {"draw", "total", "load"}
    assert list(sdxl.pair.ours.runners) == ["draw"]


def test_the_weights_are_in_the_engine_once(whole):
    folder = sorted((whole.bundle.folder.parent).glob("graphs/graphs/*"))
    files = [*folder, *(whole.bundle.folder / "engines").iterdir()]
    unet = open.open_base(whole.bundle.manifest.spec, half=False).components["unet"].files[0]
    with safe_open(unet, framework="np") as file:
        least = 4 * sum(np.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert files and all(least < file.stat().st_size < 2 * least for file in files)


def test_one_file_holds_all_that_another_program_needs(sd15):
    """What onnxruntime alone draws of the inputs in the proof, which are those of a plain request."""
    import onnxruntime

    [stage] = sd15.bundle.manifest.stages
    arrays = read_arrays(sd15.bundle.path("proof/draw.npz"))
    given = {spec.name: arrays[f"0.in.{spec.name}"] for spec in stage.contract.inputs}
    engine = onnxruntime.InferenceSession(sd15.bundle.path(stage.file), providers=["CPUExecutionProvider"])
    [picture] = engine.run(None, given)
    assert picture.shape == (1, 48, 64, 3) and picture.dtype == np.uint8
    proof = sd15.bundle.manifest.proof
    assert psnr_db(picture, sd15.pair.ours.draw(Request(proof.prompt, proof.seed)).pictures) >= FLOOR
    noise = TorchNoise(proof.seed)
    for drawn in given["noise"]:
        np.testing.assert_allclose(drawn, noise(drawn.shape), atol=1e-6)


def test_the_bundle_is_another_one_than_that_of_stages(sd15):
    spec = sd15.bundle.manifest.spec
    one, stages = plan.make_plan(spec), plan.make_plan(replace(spec, whole_loop=False))
    assert one.key != stages.key and one.folder != stages.folder
    assert "--whole-loop" in spec.command() and "--whole-loop" not in stages.spec.command()


def test_verify_inspect_and_run_take_it(sd15, command, tmp_path):
    folder = sd15.bundle.folder
    code, out, _ = command("verify", folder, "--json")
    figures = json.loads(out)["parity"]
    assert code == 0 and set(figures) == {"draw", "picture"}
    assert all(figure["db"] >= FLOOR for figure in figures.values())
    assert [stage["name"] for stage in json.loads(command("inspect", folder, "--json")[1])["stages"]] == [
        "draw"
    ]
    words = "run", "a red star", "--engine", folder, "--seed", 3, "--out"
    assert command(*words, tmp_path / "star.png")[0] == 0
    picture = np.asarray(Image.open(tmp_path / "star.png"))
    drawn = sd15.pair.ours.draw(Request("a red star", 3, guidance_scale=8.5))
    np.testing.assert_array_equal(picture, drawn.pictures[0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--steps", 3), "one graph of 4 steps"),
        (("--grid", "steps=4..5"), "one graph of 4 steps"),
        (("--hires", 2), "draws no second pass"),
    ],
)
def test_what_takes_another_graph_is_refused_without_waiting_for_engines(
    sd15, refused, monkeypatch, words, told
):
    done, backend = threading.Event(), find_backend(sd15.bundle.manifest.backend)
    monkeypatch.setattr(backend, "load", lambda *_: done.wait(60))
    start = time.monotonic()
    refused(2, [told, "without --whole-loop"], "run", "a star", "--engine", sd15.bundle.folder, *words)
    assert time.monotonic() - start < 30
    done.set()


def test_python_refuses_it_too(sdxl, sd15):
    with pytest.raises(UsageError, match="can't be guided"):
        sdxl.pair.ours("a star", guidance_scale=1.5)
    with pytest.raises(UsageError, match="negative prompt"):
        sdxl.pair.ours("a star", negative_prompt="blue")


def test_a_full_lcm_reads_no_negative_prompt(sd15):
    plain = sd15.pair.ours("a star", seed=3)[0]
    assert plain.tobytes() == sd15.pair.ours("a star", seed=3, negative_prompt="blue")[0].tobytes()


@pytest.mark.parametrize("name", ["context", "lcm-step"])
def test_rewrites_that_it_is_made_of_are_needed(refused, name):
    refused(
        2,
        [name, f"drop --without {name}"],
        "build",
        "--base",
        "demo",
        "--gpu",
        "cpu",
        "--whole-loop",
        "--without",
        name,
    )


def test_the_dry_run_tells(sdxl_checkpoint, command):
    words = (
        "build",
        "--base",
        sdxl_checkpoint,
        "--no-lcm",
        "--gpu",
        "cpu",
        "--backend",
        "torchscript",
        "--dry-run",
    )
    code, out, _ = command(*words, "--whole-loop")
    assert code == 0 and "one for the complete picture" in out
    assert json.loads(command(*words, "--whole-loop", "--json")[1])["whole_loop"] is True
    assert "one for the complete picture" not in command(*words)[1]


def test_bench_counts_the_work_of_all_stages_and_steps(sdxl):
    manifest = sdxl.bundle.manifest
    parts = count_work(open.open_base(manifest.spec, half=False), manifest.pipeline.shape)
    work, notes = counted(sdxl.bundle)
    once = ("encode", "decode")
    assert not notes and list(work) == ["draw"]
    assert work["draw"].flop == 4 * parts["step"].flop + sum(parts[name].flop for name in once)
    assert work["draw"].weights == 4 * parts["step"].weights + sum(parts[name].weights for name in once)


def test_a_contract_of_another_shape_is_refused(sd15):
    manifest = sd15.bundle.manifest
    [stage] = manifest.stages
    for wrong in (
        TensorSpec("coefficients", (4, 5), "float32", ""),
        TensorSpec("input_ids", (1, 76), "int64", ""),
        TensorSpec("noise", (4, 2, 4, 12, 16), "float32", ""),
        TensorSpec("noise", (4,), "float32", ""),
    ):
        inputs = tuple(wrong if spec.name == wrong.name else spec for spec in stage.contract.inputs)
        changed = replace(stage, contract=replace(stage.contract, inputs=inputs))
        with pytest.raises(BundleError, match="do not fit"):
            check_stages(replace(sd15.bundle, manifest=replace(manifest, stages=(changed,))))


@pytest.mark.slow
def test_8_bits_for_a_gpu_that_is_not_here_are_proved_by_a_twin(sd15_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(plan, "LARGE_BYTES", 0)
    monkeypatch.setattr(plan, "TWIN_LATENT", 4)
    monkeypatch.setattr(onnx_graph, "INLINE_LIMIT", 1000)
    monkeypatch.setattr("lcm_compile.builder.schedule.ForkServer", factories.InThisProcess)
    spec = BuildSpec(
        str(sd15_checkpoint), gpu="a10", no_lcm=True, few_step="lcm", precision="int8", whole_loop=True
    )
    manifest = build(spec, tmp_path / "b").manifest
    [stage] = manifest.stages
    assert stage.precision == "int8+fp16" and "step" in manifest.lossy
    assert stage.quantized_layers and all(name.startswith("step.") for name in stage.quantized_layers)
    assert manifest.proof.shape.height == 32 and manifest.pipeline.shape.height == 64
    assert {"of a twin of 1×32×32" in f.checked for f in manifest.parity.values()} == {True}
