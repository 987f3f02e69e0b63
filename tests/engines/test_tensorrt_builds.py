"""What TensorRT for RTX's own builder is asked for, and what it builds, by its own log: no GPU is needed."""

from __future__ import annotations

import re

import factories
import pytest
import torch

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.engines import tensorrt, tensorrt_network, tensorrt_rtx
from lcm_compile.errors import BackendError
from lcm_compile.export import export_stage
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.spec import REWRITES, Shape
from lcm_compile.stages.half_precision import to_precision
from lcm_compile.stages.quantize import choose_scales, install_layers, quantize_layers
from lcm_compile.stages.rewrites import Upsampling
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


class Doubling(torch.nn.Module):
    """A map of 32 channels is doubled, between two convolutions, in the type of these."""

    def __init__(self, doubling):
        super().__init__()
        self.first, self.last = (torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))
        self.doubling = doubling

    def forward(self, x):
        return self.last(self.doubling(self.first(x.to(self.first.weight.dtype)))).float()


def export_doubling(doubling, precision, folder, side=64):
    """Exports a map's doubling in a precision."""
    specs = [TensorSpec(n, (1, 32, s, s), "float32", "") for n, s in (("x", side), ("y", 2 * side))]
    contract = StageContract("small", tuple(specs[:1]), tuple(specs[1:]))
    module = to_precision(Doubling(doubling).eval().requires_grad_(False), precision)
    folder.mkdir()
    return export_stage(Stage(contract, module), tensorrt.GRAPH_FORMAT, Precision(precision), folder)


def doublings_of(graph):
    """The transposed convolutions of a network, once those that can be joined are."""
    logger, _ = tensorrt.make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graph.path))
    weights = tensorrt_network.join_upsampling(trt, network)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    found = [layer for layer in layers if layer.type == trt.LayerType.DECONVOLUTION]
    for layer in found:
        layer.__class__ = trt.IDeconvolutionLayer
    keep = logger, builder, network, parser, weights
    return found, keep


def told(layer):
    """All that says what a transposed convolution computes."""
    sizes = (layer.kernel_size_nd, layer.stride_nd, layer.pre_padding, layer.post_padding)
    return [*map(tuple, sizes), layer.num_groups, layer.num_output_maps]


def test_a_map_is_doubled_by_one_transposed_convolution(tmp_path):
    """Which computes what upsampling and a 3×3 convolution do, as NVIDIA's own parser reads it."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(32, 32, 3, padding=1)
    [mine], keep = doublings_of(export_doubling(Upsampling(conv), "fp32", tmp_path / "a"))
    transposed = torch.nn.ConvTranspose2d(32, 32, 4, 2, 1)
    transposed.weight.data = torch.from_numpy(mine.kernel.reshape(32, 32, 4, 4).copy())
    transposed.bias.data = torch.from_numpy(mine.bias.copy())
    [read], kept = doublings_of(export_doubling(transposed, "fp32", tmp_path / "b"))
    assert told(mine) == told(read)
    assert (mine.kernel == read.kernel).all() and (mine.bias == read.bias).all()
    x = torch.randn(1, 32, 8, 8, dtype=torch.float64)
    exact = conv.double()(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert (transposed.double()(x) - exact).abs().max() < 1e-6
    del keep, kept


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_and_needs_no_memory_for_its_four_parts(log, tmp_path, precision):
    """On every GPU that it builds for."""
    sizes = []
    ways = [Upsampling(torch.nn.Conv2d(32, 32, 3, padding=1)), torch.nn.ConvTranspose2d(32, 32, 4, 2, 1)]
    for way in ways:
        graph = export_doubling(way, precision, tmp_path / type(way).__name__)
        log.clear()
        tensorrt.build_with(trt, graph, tmp_path, for_all(graph.precision))
        sizes.append(most_bytes(log, "Max Scratch"))
    assert sizes[0] <= 1.05 * sizes[1]


def test_in_bf16_the_four_stay(tmp_path):
    """TensorRT for RTX has no transposed convolution in bf16."""
    conv = torch.nn.Conv2d(32, 32, 3, padding=1)
    graph = export_doubling(Upsampling(conv), "bf16", tmp_path / "a")
    found, keep = doublings_of(graph)
    assert not found and built(graph, find_target("a10"), tmp_path).stat().st_size > 0
    del keep


def test_convolutions_of_several_maps_are_not_joined(tmp_path):
    class OfTwoMaps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = Upsampling(torch.nn.Conv2d(32, 32, 3, padding=1))

        def forward(self, x):
            pads = [(1 - i % 2, i % 2, 1 - i // 2, i // 2) for i in range(4)]
            maps = [x, x, x, x * 2]
            parts = zip(self.up.corners, maps, pads, strict=True)
            four = [conv(torch.nn.functional.pad(one, pad)) for conv, one, pad in parts]
            stacked = torch.stack(four, 2).reshape(1, -1, *x.shape[2:])
            return torch.nn.functional.pixel_shuffle(stacked, 2)

    found, keep = doublings_of(export_doubling(OfTwoMaps(), "fp16", tmp_path / "a"))
    assert not found
    del keep
