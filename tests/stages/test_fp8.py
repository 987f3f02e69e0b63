"""The UNet's Linear layers in fp8: the arithmetic, the graph, the scales, the engines, and who refuses."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from factories import build_from
from onnx.reference import ReferenceEvaluator
from torch import nn

from lcm_compile import BuildSpec, build
from lcm_compile.builder.export import export
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.demo import judge
from lcm_compile.demo.world import held_out_prompts
from lcm_compile.engines import onnxruntime as onnxruntime_backend
from lcm_compile.export import export_stage
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.pipeline.load import load_tokenizers
from lcm_compile.pipeline.pipeline import LcmPipeline
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import snr_db
from lcm_compile.stages.half_precision import DTYPES
from lcm_compile.stages.quantize import (
    TYPES,
    QuantizedLinear,
    ScaledLinear,
    choose_scales,
    install_layers,
    quantize_layers,
)
from lcm_compile.stages.stage import Stage
from lcm_compile.targets import find_target

FP8 = onnx.TensorProto.FLOAT8E4M3FN


def on_grid(x, scale):
    """TensorRT's formula, s · castToFp8(clip(x / s, −448, 448)), with the rounding of ml_dtypes."""
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


@pytest.mark.parametrize("kind", [QuantizedLinear, ScaledLinear])
def test_a_linear_layer_is_the_formula(kind):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 16), 3 * torch.randn(7, 48)
    scale = np.float32(0.02)
    # Clipped; halfway between two values, of which the even one counts; and less than the least of all.
    x[0, :4] = float(scale) * torch.tensor([1000.0, 17.0, 19.0, 0.0009])
    weight = layer.weight.detach().numpy()
    weights = on_grid(weight, np.abs(weight).max() / np.float32(448))
    expected = on_grid(x.numpy(), scale) @ weights.T + layer.bias.detach().numpy()
    found = kind(layer, float(scale), torch.float32, TYPES["fp8"])(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


class Network(nn.Module):
    """A convolution and two Linear layers, between float32 edges."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 16, bias=False)

    def forward(self, x):
        x = self.conv(x.to(self.conv.weight.dtype)).flatten(2).transpose(1, 2)
        return self.narrow(nn.functional.silu(self.wide(x))).float()


X, Y = (2, 16, 12, 12), (2, 144, 16)
SMALL = StageContract("small", (TensorSpec("x", X, "float32", ""),), (TensorSpec("y", Y, "float32", ""),))


def quantized(precision, scaled_mm=False, network=None):
    """A network whose Linear layers are in fp8, an input for it, and what it gave for that in fp32."""
    torch.manual_seed(0)
    network, x = (network or Network()).eval(), torch.randn(X)
    with torch.inference_mode():
        plain = network(x).numpy()
        scales = choose_scales(network, precision, *[lambda: network(x)] * 2)
        layers = quantize_layers(network, scales, precision, scaled_mm)
        install_layers(network.to(DTYPES[precision.floats]), layers)
    return network, x, plain


@pytest.mark.parametrize("floats", ["fp32", "fp16", "bf16"])
def test_the_graph_holds_fp8_weights_and_computes_the_same(tmp_path, floats):
    precision = Precision(f"fp8+{floats}")
    network, x, plain = quantized(precision)
    with torch.inference_mode():
        expected = network(x).numpy()
        graph = export_stage(Stage(SMALL, network), "onnx", precision, tmp_path)
    assert 20 < snr_db(plain, expected) < 30  # lossy, and not broken
    model = onnx.load(graph.path)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (2, 4)
    tensors = {t.name: t for t in model.graph.initializer}
    assert {tuple(t.dims) for t in tensors.values() if t.data_type == FP8} == {(32, 64), (64, 16)}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not tensors[node.input[1]].dims  # TensorRT has one scale for a tensor on every GPU
    if floats == "fp32":
        assert snr_db(expected, ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]) > 80
    if floats == "fp16":  # the evaluator adds up in fp16 as well; what rounds to another fp8 value is seldom
        session = onnxruntime.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
        assert snr_db(expected, session.run(None, {"x": x.numpy()})[0]) > 35


@pytest.mark.parametrize("floats", ["fp16", "bf16"])
def test_torchs_program_multiplies_the_fp8_arrays_themselves(tmp_path, floats):
    """It needs nothing of this package to be opened, and its products are ones that cuBLAS computes."""
    precision = Precision(f"fp8+{floats}")
    network, x, plain = quantized(precision, scaled_mm=True)
    with torch.inference_mode():
        graph = export_stage(Stage(SMALL, network), "torch_export", precision, tmp_path)
        by_scaling = quantized(Precision.FP8_FP32)[0](x).numpy()
    code = "import sys, torch; y = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2])); "
    code += "torch.save(y.detach(), sys.argv[3])"
    torch.save(x, tmp_path / "x.pt")
    paths = [graph.path, tmp_path / "x.pt", tmp_path / "y.pt"]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    found = torch.load(tmp_path / "y.pt").numpy()
    assert snr_db(plain, found) == pytest.approx(snr_db(plain, by_scaling), abs=0.5)
    assert snr_db(by_scaling, found) > 30  # values that half precision rounds to another one of fp8's
    exported = torch.export.load(graph.path)
    products = [node for node in exported.graph.nodes if node.target is torch.ops.aten._scaled_mm.default]
    assert len(products) == 2
    for node in products:
        first, second, *scales = (one.meta["val"] for one in node.args[:4])
        assert first.dtype == second.dtype == torch.float8_e4m3fn
        # meta_scaled_mm in torch/_meta_registrations.py asks for these, as cuBLAS does.
        assert first.is_contiguous() and second.t().is_contiguous()
        assert all(scale.dtype == torch.float32 and scale.numel() == 1 for scale in scales)
    stored = {n: w.dtype for n, w in exported.state_dict.items() if n.endswith("weight") and "conv" not in n}
    assert set(stored.values()) == {torch.float8_e4m3fn} and len(stored) == 2


def test_products_that_cublas_can_not_compute_stay_as_they_are():
    class Odd(Network):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(32, 72), nn.Linear(72, 16, bias=False)

    network = quantized(Precision.FP8_FP16, scaled_mm=True, network=Odd())[0]
    assert type(network.wide) is nn.Linear and type(network.narrow) is nn.Linear
    assert type(quantized(Precision.FP8_FP16, network=Odd())[0].wide) is QuantizedLinear


def test_the_demos_program_of_torch_is_checked_as_what_was_exported(tmp_path):
    manifest = export(BuildSpec("demo", precision="fp8"), tmp_path / "graphs", "torch_export")
    step = next(stage for stage in manifest.stages if stage.contract.name == "step")
    program = torch.export.load(tmp_path / "graphs" / step.file)
    products = [n for n in program.graph.nodes if n.target is torch.ops.aten._scaled_mm.default]
    assert len(products) == len(step.quantized_layers) > 20
    assert manifest.parity["step"].checked.startswith("torch module")
    assert manifest.parity["step"].db > 30 and manifest.parity["picture"].db > 35


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The demo's export in fp8 and fp16."""
    folder = tmp_path_factory.mktemp("fp8") / "graphs"
    return folder, export(BuildSpec("demo", precision="fp8"), folder)


def test_scales_are_those_of_the_pictures_that_diffusers_draws(graphs):
    """The largest input that a layer had in any step of any calibration picture, over 448."""
    demo = FAMILIES["demo"]
    pipe = DiffusionPipeline.from_pretrained(demo.base)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(demo.lcm_lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    largest: dict[str, float] = {}

    def see(name):
        def hook(layer, inputs, output):
            largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    for name, layer in pipe.unet.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(see(name))
    for seed, prompt in enumerate(demo.calibration_prompts, 1):
        generator = torch.Generator("cpu").manual_seed(seed)
        pipe(prompt, num_inference_steps=4, guidance_scale=1.0, generator=generator, output_type="latent")

    model = onnx.load(graphs[0] / "graphs" / "step.onnx")
    compared = 0
    for tensor in model.graph.initializer:
        name = tensor.name.removesuffix(".input_scale")
        known = [layer for layer in largest if name != tensor.name and name.endswith(f".{layer}")]
        if known:  # projections that were fused are of other names
            scale = float(onnx.numpy_helper.to_array(tensor))
            assert scale == pytest.approx(largest[known[0]] / 448, rel=2e-3), name
            compared += 1
    assert compared > 10


def test_linear_layers_of_the_step_alone_are_in_fp8_and_it_says_so(graphs):
    _, manifest = graphs
    stages = {stage.contract.name: stage for stage in manifest.stages}
    assert {name: stage.precision for name, stage in stages.items()} == {
        "encode": "fp16",
        "context": "fp16",
        "step": "fp8+fp16",
        "decode": "fp16",
    }
    quantized = stages["step"].quantized_layers
    assert len(quantized) > 20 and not any("conv" in name for name in quantized)
    assert "fp8" in manifest.lossy["step"]
    assert manifest.parity["step"].checked.startswith("graph")
    assert manifest.parity["picture"].floor == 25 and manifest.parity["picture"].db >= 25


def test_rtx_builds_products_of_fp8(graphs, tmp_path):
    """Its engines tell the types of what they multiply, in a text that they hold."""
    pytest.importorskip("tensorrt_rtx")
    plan, bundle = build_from(graphs[0], "l4", out=tmp_path / "b")
    assert plan.backend_name == "tensorrt-rtx" and "fp8" in bundle.manifest.lossy["step"]
    assert b"type=fp8_e4m3" in bundle.path("engines/step.engine").read_bytes()
    assert b"type=fp8_e4m3" not in bundle.path("engines/encode.engine").read_bytes()


def test_rtx_builds_it_beside_bf16(sdxl_checkpoint, tmp_path):
    """What nothing here computes is checked as the module that was exported."""
    pytest.importorskip("tensorrt_rtx")
    spec = BuildSpec(str(sdxl_checkpoint), gpu="4090", no_lcm=True, few_step="lcm", precision="fp8+bf16")
    manifest = build(spec, tmp_path / "b").manifest
    step = next(stage for stage in manifest.stages if stage.contract.name == "step")
    assert step.precision == "fp8+bf16" and step.quantized_layers
    assert manifest.parity["step"].checked.startswith("torch module")
    assert manifest.parity["picture"].db >= 25


@pytest.mark.slow
def test_it_draws_what_it_is_asked_for(graphs, tmp_path):
    """By the rule-based judge, as well as in fp16: both are graphs on ONNX Runtime's CPU provider."""
    export(BuildSpec("demo", precision="fp16"), tmp_path / "fp16")
    prompts, figures = held_out_prompts(100, seed=1), []
    for folder in (tmp_path / "fp16", graphs[0]):
        settings, runners = graphs[1].pipeline, {}
        for stage in graphs[1].stages:
            path = folder / stage.file
            runners[stage.contract.name] = onnxruntime_backend.load(path, stage.contract, find_target("cpu"))
        pipeline = LcmPipeline(settings, runners, load_tokenizers(folder, settings))
        pictures = [np.asarray(pipeline(prompt, seed=i)[0]) for i, prompt in enumerate(prompts)]
        figures.append(judge.score(pictures, prompts))
    sixteen, eight = figures
    assert all(eight[column] >= sixteen[column] - 0.03 for column in sixteen), figures


@pytest.mark.parametrize("gpu", ["a10", "a100", "t4", "cpu"])
@pytest.mark.parametrize("precision", ["fp8", "fp8+bf16"])
def test_devices_without_it_are_told_what_they_have(refused, gpu, precision):
    told = refused(
        1, ["fp8", "int8", "fp16"], "build", "--base", "demo", "--gpu", gpu, "--precision", precision
    )
    assert len(told.splitlines()) == 2  # what is wrong, and what to try
    assert find_target(gpu).description in told


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-tensorrt"])
def test_backends_without_it_are_told_what_they_have(refused, backend):
    words = ("--base", "demo", "--gpu", "l4", "--backend", backend, "--precision", "fp8")
    refused(1, [backend, "fp8", "fp16"], "build", *words)


@pytest.mark.parametrize("backend", ["torchscript", "openvino"])
def test_backends_for_the_cpu_have_none(refused, backend):
    words = ("--base", "demo", "--gpu", "l4", "--backend", backend, "--precision", "fp8")
    refused(1, [backend, "fp8", "CPU only"], "build", *words)


@pytest.mark.parametrize(("format", "precision"), [("torchscript", "fp8"), ("torch_export", "int8")])
def test_graphs_of_other_formats_have_none(refused, tmp_path, format, precision):
    words = ("--base", "demo", "--precision", precision, "--format", format)
    refused(2, [format, precision, "--format onnx"], "export", *words, "--out", tmp_path / "g")


def test_an_export_in_fp8_is_refused_for_other_gpus(graphs, refused, tmp_path):
    refused(1, ["A10", "fp8"], "build", "--from", graphs[0], "--gpu", "a10", "--out", tmp_path / "b")
