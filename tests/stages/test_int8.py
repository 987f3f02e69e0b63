"""The UNet in 8 bits: the arithmetic, what it is scaled to, what stays as it is, and the gate."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lcm_compile import BuildSpec, build, load
from lcm_compile.builder import plan
from lcm_compile.checkpoint.families import CALIBRATION_PROMPTS, FAMILIES, SAMPLE_PROMPT
from lcm_compile.demo import judge
from lcm_compile.demo.world import held_out_prompts, is_held_out
from lcm_compile.engines import find_backend, openvino
from lcm_compile.export import export_stage
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import snr_db
from lcm_compile.proof.recording import PROOF_SEED
from lcm_compile.stages.quantize import (
    TYPES,
    QuantizedConv2d,
    QuantizedLinear,
    Seen,
    choose_scales,
    install_layers,
    quantize_layers,
)
from lcm_compile.stages.stage import Stage
from lcm_compile.targets import find_target

CPU = find_target("cpu")
INT8 = TYPES["int8"]
HAS_OPENVINO = openvino.cannot_build(CPU, Precision.INT8_FP32) is None
needs_openvino = pytest.mark.skipif(not HAS_OPENVINO, reason="no OpenVINO, or no VNNI")


def on_grid(x, scale):
    """ONNX's formula, in NumPy, whose rint rounds halves to even as well."""
    return np.clip(np.rint(x / scale), -128, 127) * scale


def weights_on_grid(weight):
    scales = np.abs(weight).reshape(len(weight), -1).max(1) / 127
    return on_grid(weight, scales.reshape(-1, *[1] * (weight.ndim - 1)))


def test_a_linear_layer_is_onnx_formula():
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 20), 3 * torch.randn(7, 48)
    x[0, 0] = 1000.0  # clipped
    weight = layer.weight.detach().numpy()
    expected = on_grid(x.numpy(), 0.05) @ weights_on_grid(weight).T + layer.bias.detach().numpy()
    np.testing.assert_allclose(
        QuantizedLinear(layer, 0.05, torch.float32, INT8)(x), expected, rtol=1e-4, atol=1e-4
    )


def test_a_convolution_is_onnx_formula():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 10, 3, stride=2, padding=1), torch.randn(2, 6, 9, 9)
    rounded = torch.from_numpy(on_grid(x.numpy(), 0.02)).float()
    weight = torch.from_numpy(weights_on_grid(layer.weight.detach().numpy())).float()
    expected = nn.functional.conv2d(rounded, weight, layer.bias, 2, 1).detach()
    found = QuantizedConv2d(layer, 0.02, torch.float32, INT8)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def exported(network, x, floats, folder):
    scales = choose_scales(network, Precision(f"int8+{floats}"), *[lambda: network(x)] * 2)
    layers = quantize_layers(network, scales, Precision(f"int8+{floats}"))
    network.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[floats])
    install_layers(network, layers)

    class Edges(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x):
            return self.inner(x.to({"fp32": x.dtype, "fp16": torch.half}.get(floats, torch.bfloat16))).float()

    y = tuple(Edges()(x).shape)
    contract = StageContract(
        "small", (TensorSpec("x", tuple(x.shape), "float32", ""),), (TensorSpec("y", y, "float32", ""),)
    )
    stage = Stage(contract, Edges().eval())
    return stage, export_stage(stage, "onnx", Precision(f"int8+{floats}"), folder)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 16, 1, bias=False)).eval()


@pytest.mark.parametrize("floats", ["fp32", "fp16"])
def test_the_graph_holds_int8_weights_and_computes_the_same(network, tmp_path, floats):
    x = torch.randn(1, 8, 12, 12)
    with torch.inference_mode():
        plain = network(x).numpy()
        stage, graph = exported(network, x, floats, tmp_path)
        expected = stage.module(x).numpy()
    assert 20 < snr_db(plain, expected) < 60  # lossy, and not broken
    model = onnx.load(graph.path)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (2, 4)
    sizes = {int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8}
    assert sizes == {8 * 24 * 9, 24 * 16}
    session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
    assert snr_db(expected, session.run(None, {"x": x.numpy()})[0]) > (45 if floats == "fp16" else 100)


@needs_openvino
@pytest.mark.parametrize("floats", ["fp32", "bf16"])
def test_openvino_multiplies_in_8_bits(network, tmp_path, floats):
    if reason := openvino.cannot_compute(Precision(floats)):
        pytest.skip(reason)
    x = torch.randn(1, 8, 12, 12)
    with torch.inference_mode():
        stage, graph = exported(network, x, floats, tmp_path)
        expected = stage.module(x).numpy()
    (tmp_path / "engine").mkdir()
    path = find_backend("openvino").build(graph, CPU, tmp_path / "engine")
    with openvino.load(path, stage.contract, CPU) as runner:
        assert snr_db(expected, runner({"x": x.numpy()})["y"]) > (80 if floats == "fp32" else 25)
        kernels = [
            node.get_rt_info()["runtimePrecision"].astype(str)
            for node in runner._model.get_runtime_model().get_ops()
            if node.get_rt_info()["layerType"].astype(str) in ("Convolution", "FullyConnected")
        ]
    assert len(kernels) == 2 and set(kernels) <= {"u8", "i8"}


def test_a_scale_is_better_than_that_of_the_largest_value():
    torch.manual_seed(0)
    values = torch.randn(200_000)
    values[1] = largest = 60.0  # not among those that are kept
    seen = Seen()
    seen.add(values)
    errors = [
        float(((on_grid(values.numpy(), scale) - values.numpy()) ** 2).mean())
        for scale in (seen.scale(INT8), largest / 127)
    ]
    assert errors[0] < 0.75 * errors[1]


def test_a_layer_that_8_bits_would_spoil_stays():
    """One channel so loud that all others are rounded to nothing, though the output is made of them."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"quiet": nn.Linear(32, 32), "loud": nn.Linear(32, 32)})
    with torch.no_grad():
        layers["loud"].weight[:, 0] = 0.0
    x = torch.randn(64, 32)
    loud = x.clone()
    loud[:, 0] = 3000.0

    def run():
        layers["quiet"](x), layers["loud"](loud)

    with torch.no_grad():
        assert list(choose_scales(layers, Precision.INT8_FP32, run, run)) == ["quiet"]


def test_the_proof_is_no_part_of_what_is_seen():
    settled = plan.make_plan(BuildSpec("demo", backend="onnxruntime", precision="int8")).export
    assert settled is not None and len(settled.calibration) >= 6
    seen = {request.prompt for request in settled.calibration}
    assert FAMILIES["demo"].sample_prompt not in seen and not any(map(is_held_out, seen))
    assert PROOF_SEED not in {request.seed for request in settled.calibration}
    assert SAMPLE_PROMPT not in CALIBRATION_PROMPTS


BACKEND = "openvino" if HAS_OPENVINO else "onnxruntime"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return build(BuildSpec("demo", backend=BACKEND, precision="int8"), tmp_path_factory.mktemp("int8") / "b")


def test_the_step_alone_is_in_8_bits_and_says_so(demo):
    stages = {stage.contract.name: stage for stage in demo.manifest.stages}
    floats = stages["encode"].precision
    assert floats in ("fp32", "bf16")
    assert stages["step"].precision == Precision(f"int8+{floats}")
    assert {stage.precision for name, stage in stages.items() if name != "step"} == {floats}
    quantized = stages["step"].quantized_layers
    assert len(quantized) > 40 and not any("conv_in" in name or "conv_out" in name for name in quantized)
    assert not any(stage.quantized_layers for name, stage in stages.items() if name != "step")
    assert "8 bits" in demo.manifest.lossy["step"]
    assert demo.manifest.parity["picture"].floor == 25 and demo.manifest.parity["picture"].db >= 25


def judged(bundles, count):
    prompts = held_out_prompts(count, seed=1)
    found = []
    for bundle in bundles:
        with load(bundle) as pipeline:
            pictures = [np.asarray(pipeline(prompt, seed=i)[0]) for i, prompt in enumerate(prompts)]
        found.append(judge.score(pictures, prompts))
    return found


@pytest.mark.parametrize(("count", "points"), [(8, 0.13), pytest.param(100, 0.03, marks=pytest.mark.slow)])
def test_it_draws_what_it_is_asked_for(demo, count, points):
    """By the rule-based judge, as well as fp32: one picture of 8 may be another."""
    plain, eight = judged([build(BuildSpec("demo", backend="torchscript")), demo], count)
    assert all(eight[column] >= plain[column] - points for column in plain), (plain, eight)


def in_8_bits(base, backend):
    return ("--base", base, "--no-lcm", "--gpu", "cpu", "--backend", backend, "--precision", "int8")


def test_a_bad_scale_is_refused(sdxl_checkpoint, tmp_path, monkeypatch, refused):
    """Nothing is left behind."""
    monkeypatch.setattr(Seen, "scale", lambda self, bits: self.largest / 3)
    monkeypatch.setattr("lcm_compile.stages.quantize.LEAST_SNR", -100.0)
    words = in_8_bits(sdxl_checkpoint, "onnxruntime")
    refused(3, ["step", "picture", "--precision fp32"], "build", *words, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_rtx_builds_it_for_an_a10(sdxl_checkpoint, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    spec = BuildSpec(str(sdxl_checkpoint), gpu="a10", no_lcm=True, few_step="lcm", precision="int8")
    manifest = build(spec, tmp_path / "b").manifest
    step = next(stage for stage in manifest.stages if stage.contract.name == "step")
    assert step.precision == "int8+fp16" and step.quantized_layers
    assert manifest.parity["step"].checked.startswith("graph") and manifest.parity["picture"].db >= 25


@pytest.mark.parametrize("backend", ["torchscript", "aotinductor"])
def test_backends_without_it_say_so(sdxl_checkpoint, refused, backend):
    words = in_8_bits(sdxl_checkpoint, backend)
    refused(1, [backend, "8-bit"], "build", *words)


def test_graphs_of_another_format_have_none(sdxl_checkpoint, refused, tmp_path):
    words = ("--base", sdxl_checkpoint, "--no-lcm", "--precision", "int8", "--format", "torchscript")
    refused(2, "8-bit", "export", *words, "--out", tmp_path / "g")


@pytest.mark.parametrize(
    ("flags", "able"), [("avx2 avx512f", False), ("avx_vnni", True), ("avx512_vnni", True)]
)
def test_openvino_needs_vnni(monkeypatch, flags, able):
    monkeypatch.setattr(openvino, "instruction_set", lambda: ["x86_64", *flags.split()])
    assert (openvino.cannot_compute(Precision.INT8_FP32) is None) is able
    assert openvino.cannot_compute(Precision.INT8_BF16) is not None
