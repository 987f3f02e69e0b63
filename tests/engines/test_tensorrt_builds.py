"""What TensorRT for RTX's own builder is asked for, and what it builds, by its own log: no GPU is needed."""

from __future__ import annotations

import re

import factories
import pytest
import torch

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.engines import tensorrt, tensorrt_rtx
from lcm_compile.errors import BackendError
from lcm_compile.export import export_stage
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.spec import REWRITES, Shape
from lcm_compile.stages.half_precision import to_precision
from lcm_compile.stages.quantize import choose_scales, install_layers, quantize_layers
from lcm_compile.stages.stage import Stage, make_stages, rewrite_modules
from lcm_compile.targets import TARGETS, find_target

trt = pytest.importorskip("tensorrt_rtx")


def built(graph, target, folder):
    """The file of an engine for one GPU."""
    return tensorrt_rtx.build(graph, target, folder, tensorrt_rtx.options(target))


class Small(torch.nn.Module):
    """A convolution, whose weights are random."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype)).float()


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Exports that convolution in a precision."""

    def exported(precision):
        precision = Precision(precision)
        spec = TensorSpec("x", (1, 8, 16, 16), "float32", "input")
        contract = StageContract("small", (spec,), (TensorSpec("y", (1, 8, 16, 16), "float32", "output"),))
        stage = Stage(contract, to_precision(Small().eval().requires_grad_(False), precision.floats))
        return export_stage(stage, tensorrt.GRAPH_FORMAT, precision, tmp_path_factory.mktemp("graph"))

    return exported


@pytest.fixture
def configs(monkeypatch):
    """The configs of all builds."""
    made, create = [], trt.Builder.create_builder_config
    monkeypatch.setattr(
        trt.Builder, "create_builder_config", lambda self: made.append(create(self)) or made[-1]
    )
    return made


def test_products_in_fp32_are_not_built_for_turing(graph, tmp_path):
    """The builder refuses them, but only after the export."""
    t4 = find_target("t4")
    assert "fp16" in (tensorrt_rtx.cannot_build(t4, Precision.FP32) or "")
    assert tensorrt_rtx.cannot_build(t4, Precision.FP16) is None
    module = Attention(64).eval().requires_grad_(False)
    with pytest.raises(BackendError, match="FP32 GEMM is not supported"):
        built(export_module(module, (1, 64, 128), Precision.FP32, tmp_path / "x"), t4, tmp_path)


def test_an_engine_allocates_nothing_while_it_runs(graph, configs, tmp_path):
    """Otherwise its calls can't be captured."""
    assert built(graph("fp16"), find_target("a10"), tmp_path).stat().st_size > 0
    assert configs[0].get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert tensorrt_rtx.options(find_target("a10"))["user_allocation"]


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("fp16", True), ("bf16", True)])
def test_a_stage_in_fp32_does_not_round_to_tf32(graph, configs, tmp_path, precision, allowed):
    """The builder allows it unless it is told otherwise; 10 bits of mantissa are no fp32."""
    built(graph(precision), find_target("a10"), tmp_path)
    [config] = configs
    assert config.get_flag(trt.BuilderFlag.TF32) == allowed


@pytest.fixture
def log(monkeypatch):
    """All that the builder says."""
    said = []

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, message):
            said.append(message)

    monkeypatch.setattr(tensorrt, "make_logger", lambda package: (Logger(), said))
    return said


def for_all(precision):
    """What sets every compute capability that TensorRT for RTX builds a precision for."""
    targets = {t.compute_capability: t for t in TARGETS.values() if not t.is_cpu}
    able = [targets[c] for c in tensorrt_rtx.CAPABILITIES]
    able = [t for t in able if tensorrt_rtx.cannot_build(t, precision) is None]

    def configure(config):
        config.num_compute_capabilities = len(able)
        for i, target in enumerate(able):
            name = f"SM{target.compute_capability.replace('.', '')}"
            assert config.set_compute_capability(getattr(trt.ComputeCapability, name), i)

    return configure


def most_bytes(log, what):
    """The largest number of bytes that the builder's log gives for something."""
    return max(int(size) for line in log for size in re.findall(rf"{what} Memory: (\d+) bytes", line))


class Products(torch.nn.Module):
    """Two Linear layers between float32 edges. `one` has the type of what has no 8 bits."""

    def __init__(self, width):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))
        self.first, self.second = (torch.nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x.to(self.one.dtype) * self.one))).float()


class Attention(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(2 * width, 6 * width)

    def forward(self, x):
        arrays = self.layer(x.to(self.layer.weight.dtype)).chunk(3, -1)
        query, key, value = (array.unflatten(-1, (2, -1)).transpose(1, 2) for array in arrays)
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).flatten(2).float()


def export_module(module, shape, precision, folder):
    """Exports a module whose input and output have one shape."""
    specs = [TensorSpec(name, shape, "float32", "") for name in "xy"]
    contract = StageContract("small", tuple(specs[:1]), tuple(specs[1:]))
    folder.mkdir()
    return export_stage(Stage(contract, module), tensorrt.GRAPH_FORMAT, precision, folder)


def keeps_scores(log, graphs, folder):
    """Whether engines of a graph and of one with four times as many tokens have attention's scores in memory.

    These are as many as tokens squared. All else that is computed on the way grows with the tokens.
    """
    sizes = []
    for graph in graphs:
        log.clear()
        tensorrt.build_with(trt, graph, folder, for_all(graph.precision))
        sizes.append(most_bytes(log, "Max Scratch"))
    return sizes[1] > 4.1 * sizes[0]


@pytest.mark.parametrize(
    ("precision", "width", "fused"),
    [("fp16", 64, True), ("bf16", 40, True), ("fp16", 8, False), ("fp16", 512, False), ("fp32", 64, False)],
)
def test_which_attention_is_one_kernel(log, tmp_path, precision, width, fused):
    """512 is the VAE's width, and 8 that of these tests' other models."""
    module = to_precision(Attention(width).eval().requires_grad_(False), precision)
    graphs = [
        export_module(module, (1, tokens, 2 * width), Precision(precision), tmp_path / str(tokens))
        for tokens in (2048, 8192)
    ]
    assert keeps_scores(log, graphs, tmp_path) == (not fused)


def test_every_attention_of_a_unet_is_one_kernel_on_every_gpu(log, tmp_path):
    """Of one of SDXL's architecture, with heads as wide as its own: 64."""
    config = {"block_out_channels": (64, 128), "attention_head_dim": (4, 2)}
    checkpoint = open_checkpoint(str(factories.write_sdxl(tmp_path / "base", **config)))
    graphs = []
    for side in (256, 512):
        shape, folder = Shape(1, side, side), tmp_path / str(side)
        folder.mkdir()
        modules = factories.load_modules(checkpoint).named()
        modules = rewrite_modules(modules, REWRITES, [shape], checkpoint.vae_factor)
        [step] = [s for s in make_stages(checkpoint, modules, shape, REWRITES) if s.name == "step"]
        to_precision(step.module, "fp16")
        graphs.append(export_stage(step, tensorrt.GRAPH_FORMAT, Precision.FP16, folder))
    assert not keeps_scores(log, graphs, tmp_path)


@pytest.mark.parametrize("product", ["int8", "fp8"])
def test_eight_bit_weights_stay_eight_bits_in_the_engine(log, tmp_path, product):
    """The builder could as well multiply them out to fp16."""
    width, x = 512, torch.randn(1, 64, 512)
    sizes = {}
    for precision in (Precision.FP16, Precision(f"{product}+fp16")):
        network = Products(width).eval().requires_grad_(False)
        layers = {}
        if precision.is_quantized:
            scales = choose_scales(network, precision, *[lambda n=network: n(x)] * 2)
            layers = quantize_layers(network, scales, precision)
        to_precision(network, precision.floats)
        install_layers(network, layers)
        folder = tmp_path / precision.product
        graph = export_module(network, tuple(x.shape), precision, folder)
        log.clear()
        built(graph, find_target("l4"), folder)
        sizes[precision.product] = most_bytes(log, "Total Weights")
    assert sizes["fp16"] >= 2 * 2 * width * width
    assert sizes[product] < 0.55 * sizes["fp16"]
