"""OpenVINO: engines from ONNX graphs, in the precision that they are labelled with."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from factories import build_from

from lcm_compile import BuildSpec, build, load
from lcm_compile.engines import openvino
from lcm_compile.errors import BackendError
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import psnr_db, snr_db
from lcm_compile.proof.recording import read_calls
from lcm_compile.targets import find_target

pytest.importorskip("openvino")

CPU = find_target("cpu")
COMPUTES_BF16 = openvino.cannot_compute(Precision.BF16) is None


@pytest.fixture(scope="module")
def openvino_bundle(sdxl_graphs, tmp_path_factory):
    return build_from(sdxl_graphs, "cpu", "openvino", tmp_path_factory.mktemp("openvino") / "bundle")[1]


@pytest.fixture(scope="module")
def decode(openvino_bundle):
    """The decoder's engine, its contract, and one recorded call."""
    stage = openvino_bundle.manifest.stages[-1]
    call = read_calls(openvino_bundle.path("proof/decode.npz"), stage.contract)[0]
    return openvino_bundle.path(stage.file), stage.contract, call


def diffusers_picture(checkpoint):
    theirs = DiffusionPipeline.from_pretrained(checkpoint)
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(7)
    return theirs("a red star", num_inference_steps=4, guidance_scale=1.0, generator=generator,
                  height=64, width=64, output_type="np").images  # fmt: skip


def test_a_bundle_draws_what_diffusers_draws(openvino_bundle, sdxl_checkpoint):
    """fp32 is fp32 also where OpenVINO would take bf16 by itself."""
    with load(openvino_bundle) as ours:
        drawn = ours.draw(Request("a red star", 7)).pictures
    assert psnr_db(eight_bits(diffusers_picture(sdxl_checkpoint)), drawn) >= 65


@pytest.mark.skipif(not COMPUTES_BF16, reason="this processor does not compute in bf16")
def test_it_computes_in_bf16(sdxl_checkpoint, tmp_path):
    """But for the sinusoids of timesteps: with those in bf16, the step misses its floor."""
    spec = BuildSpec(
        base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="openvino", precision="bf16"
    )
    bundle = build(spec, tmp_path / "bundle")
    assert all(30 <= bundle.manifest.parity[name].db < 80 for name in ("encode", "step", "decode"))
    stage = bundle.manifest.stages[-1]
    inputs, outputs = read_calls(bundle.path("proof/decode.npz"), stage.contract)[0]
    with openvino.load(bundle.path(stage.file), stage.contract, CPU) as runner:
        assert precisions_in(runner) >= {"bf16"}
        assert 30 <= snr_db(outputs["picture"], runner(inputs)["picture"]) < 80


def precisions_in(runner):
    """What the kernels of an engine compute in, as OpenVINO tells it."""
    nodes = runner._model.get_runtime_model().get_ops()
    told = (node.get_rt_info()["runtimePrecision"] for node in nodes)
    return {str(name.astype(str) if hasattr(name, "astype") else name) for name in told}


def test_fp32_engines_compute_in_nothing_less(decode):
    path, contract, _ = decode
    with openvino.load(path, contract, CPU) as runner:
        assert not precisions_in(runner) & {"bf16", "f16"}


def test_the_threads_of_a_large_model_take_work_from_each_other(decode, monkeypatch):
    path, contract, (inputs, expected) = decode

    def partitioner_of(runner):
        model = runner._model
        if "TBB_PARTITIONER" not in model.get_property("SUPPORTED_PROPERTIES"):
            pytest.skip("this OpenVINO has no such setting")
        return model.get_property("TBB_PARTITIONER").name

    with openvino.load(path, contract, CPU) as small:
        plain = partitioner_of(small)
    monkeypatch.setattr(openvino, "LARGE", 0)
    with openvino.load(path, contract, CPU) as large:
        assert partitioner_of(large) == "AUTO" != plain
        assert snr_db(expected["picture"], large(inputs)["picture"]) >= 60


def test_it_runs_alone(decode, tmp_path):
    """In a process of its own: no torch, nothing sent to anybody, no path of the machine that built it."""
    path, contract, (inputs, _) = decode
    for file in (path, path.with_suffix(".bin")):
        shutil.copy(file, tmp_path)
    np.save(tmp_path / "latent.npy", inputs["latent"])
    script = f"""
import sys, numpy as np
from pathlib import Path
from lcm_compile.engines import openvino
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.targets import find_target
runner = openvino.load(Path("decode.xml"), {contract!r}, find_target("cpu"))
np.save("picture.npy", runner({{"latent": np.load("latent.npy")}})["picture"])
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & {{"torch", "diffusers", "onnx", "openvino_telemetry"}}, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    here = openvino.load(path, contract, CPU)(inputs)["picture"]
    assert (here == np.load(tmp_path / "picture.npy")).all()


def test_arrays_of_other_layouts_and_types_give_the_same_picture(decode):
    path, contract, (inputs, _) = decode
    latent = inputs["latent"]
    strided = np.empty((*latent.shape[:3], 2 * latent.shape[3]), np.float32)[..., ::2]
    strided[...] = latent
    frozen = latent.copy()
    frozen.flags.writeable = False
    with openvino.load(path, contract, CPU) as runner:
        expected = runner({"latent": latent})["picture"].copy()
        for other in (strided, frozen, latent.astype(np.float64), torch.from_numpy(latent)):
            np.testing.assert_array_equal(runner({"latent": other})["picture"], expected)
        with pytest.raises(BackendError, match=r"not \(1, 4, 4, 4\)"):
            runner({"latent": np.zeros((1, 4, 4, 4), np.float32)})


def test_inputs_are_not_copied_and_results_stay_as_they_are(decode):
    """Another call, of this thread or another, writes to other memory."""
    path, contract, (inputs, _) = decode
    latent = inputs["latent"].copy()
    with openvino.load(path, contract, CPU) as runner:
        assert runner.readable(contract.inputs[0], latent) is latent
        first = runner({"latent": latent})["picture"]
        kept = first.copy()
        assert not np.shares_memory(first, runner({"latent": -latent})["picture"])
    np.testing.assert_array_equal(first, kept)  # and it outlives the engine


@pytest.mark.parametrize("damage", ["xml", "bin", "no bin", "label"])
def test_a_broken_engine_is_a_plain_error(decode, tmp_path, damage):
    source, contract, _ = decode
    path = tmp_path / "decode.xml"
    shutil.copy(source, path)
    if damage == "xml":
        path.write_bytes(source.read_bytes()[:1000])
    elif damage == "label":
        path.write_text(source.read_text().replace('precision value="fp32"', 'precision value="fp7"'))
    if damage != "no bin":
        size = 100 if damage == "bin" else None
        path.with_suffix(".bin").write_bytes(source.with_suffix(".bin").read_bytes()[:size])
    with pytest.raises(BackendError, match=r"can't open .*decode\.xml: ."):
        openvino.load(path, contract, CPU)


def test_an_engine_of_another_shape_is_refused(decode, openvino_bundle):
    with pytest.raises(BackendError, match="its contract says"):
        openvino.load(decode[0], openvino_bundle.manifest.stages[1].contract, CPU)


@pytest.mark.parametrize(
    ("flags", "computes"),
    [
        ("avx2 avx512f", ["fp32"]),
        ("avx512_bf16", ["fp32", "bf16"]),
        ("amx_bf16 amx_tile", ["fp32", "bf16"]),
        ("avx512_bf16 avx512_fp16", ["fp32", "bf16", "fp16"]),
    ],
)
def test_a_precision_needs_its_instructions(monkeypatch, flags, computes):
    """OpenVINO would take bf16 anywhere, and the label would not be true."""
    monkeypatch.setattr(openvino, "instruction_set", lambda: ["x86_64", *flags.split()])
    assert [
        p for p in (Precision.FP32, Precision.BF16, Precision.FP16) if openvino.cannot_build(CPU, p) is None
    ] == computes


def test_a_bf16_bundle_is_refused_where_bf16_is_not_computed(monkeypatch, decode, tmp_path):
    source, contract, _ = decode
    path = tmp_path / "decode.xml"
    path.write_text(source.read_text().replace('precision value="fp32"', 'precision value="bf16"'))
    shutil.copy(source.with_suffix(".bin"), path.with_suffix(".bin"))
    monkeypatch.setattr(openvino, "instruction_set", lambda: ["x86_64", "avx2"])
    with pytest.raises(BackendError, match="neither avx512_bf16 nor amx_bf16"):
        openvino.load(path, contract, CPU)


def test_gpus_are_not_for_it():
    assert openvino.cannot_build(find_target("a10"), Precision.FP16) == "builds for the CPU only"


def test_triton_gets_each_stage_with_its_weights_and_its_names(openvino_bundle, tmp_path, command):
    pytest.importorskip("tritonclient")
    from google.protobuf import text_format
    from openvino import Core
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    assert command("export", f"x={openvino_bundle.folder}", "--triton", tmp_path)[0] == 0
    for stage in openvino_bundle.manifest.stages:
        config = (tmp_path / f"x-{stage.contract.name}" / "config.pbtxt").read_text()
        own = text_format.Parse(config, ModelConfig())
        assert own.backend == "openvino"
        file = tmp_path / own.name / "1" / own.default_model_filename
        assert sorted(p.name for p in file.parent.iterdir()) == [file.with_suffix(".bin").name, file.name]
        model = Core().read_model(file)
        assert {t.name for t in own.input} == {i.any_name for i in model.inputs}
        assert {t.name for t in own.output} == {o.any_name for o in model.outputs}
