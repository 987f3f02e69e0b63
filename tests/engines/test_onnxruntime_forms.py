"""The forms that graphs have for ONNX Runtime's CPU provider: equal to the standard's, and cheaper."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

from lcm_compile import BuildSpec, build
from lcm_compile.builder.export import export
from lcm_compile.bundles.export_manifest import open_export
from lcm_compile.engines import onnxruntime
from lcm_compile.engines.onnxruntime_forms import CUDA_FORMS, with_forms
from lcm_compile.export import export_stage, onnx_graph
from lcm_compile.graphs import OUTPUT_SCALES, StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import snr_db
from lcm_compile.proof.recording import read_calls
from lcm_compile.stages.half_precision import to_precision
from lcm_compile.stages.quantize import choose_scales, install_layers, quantize_layers
from lcm_compile.stages.stage import Stage
from lcm_compile.system.processor import instruction_set
from lcm_compile.targets import find_target

CPU = find_target("cpu")
FP32 = Precision.FP32


def operators(path):
    """How often each operator is in a graph, those of functions included."""
    model = onnx.load(path, load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


def exported(module, arrays, folder, precision=FP32):
    """The stage of a module with these inputs, and its graph. The one output is `y`."""
    with torch.inference_mode():
        y = module(*map(torch.from_numpy, arrays))
    specs = tuple(TensorSpec(f"x{i}", a.shape, "float32", "") for i, a in enumerate(arrays))
    contract = StageContract("small", specs, (TensorSpec("y", tuple(y.shape), "float32", ""),))
    stage = Stage(contract, module.eval())
    return stage, export_stage(stage, "onnx", precision, folder)


def built(graph, folder):
    """A graph's engine, in a new folder."""
    (folder / "engine").mkdir()
    return onnxruntime.build(graph, CPU, folder / "engine")


def run(path, contract, arrays):
    with onnxruntime.load(path, contract, CPU) as runner:
        named = {spec.name: array for spec, array in zip(contract.inputs, arrays, strict=True)}
        return runner(named)[contract.outputs[0].name]


# Without VNNI, ONNX Runtime adds 8-bit products up in pairs of 16 bits on x86, which may be too few:
# https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
adds_up_in_32_bits = pytest.mark.skipif(
    "x86_64" in instruction_set() and not {"avx512_vnni", "avx_vnni"} & set(instruction_set()),
    reason="this processor has no VNNI",
)


class Attend(nn.Module):
    """Attention of tokens that a product gave, as the UNet has it, or of tensors that are given by heads."""

    def __init__(self, heads, scale=None, causal=False, masked=False):
        super().__init__()
        self.heads, self.scale, self.causal, self.masked = heads, scale, causal, masked

    def forward(self, query, key, value):
        def by_heads(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2) if x.ndim == 3 else x

        query, key, value = map(by_heads, (query, key, value))
        # Of the query's type, as torch asks: in fp64 it reads another one wrongly where there is AVX2 alone.
        mask = torch.arange(key.shape[2], dtype=query.dtype) * -0.1 if self.masked else None
        mask = None if mask is None else mask.expand(query.shape[2], -1)
        attended = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.causal, scale=self.scale
        )
        return attended.transpose(1, 2).flatten(2)


def attention_arrays(batch, heads, tokens, others, width, value_width, given):
    random = np.random.default_rng(tokens)
    shapes = [(batch, heads, others, width), (batch, heads, others, value_width)]
    if not given:
        shapes = [(b, n, h * d) for b, h, n, d in shapes]
    shapes.insert(0, (batch, tokens, heads * width))
    return [2 * random.standard_normal(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("shape", "given", "scale"),
    [
        ((1, 8, 289, 289, 40, 40), False, None),  # self-attention
        ((2, 4, 65, 77, 24, 24), True, None),  # keys and values of the context
        ((1, 1, 400, 400, 96, 96), False, None),  # the VAE's
        ((2, 3, 20, 300, 8, 12), True, None),
        ((3, 5, 1, 7, 3, 11), True, 0.3),
        ((1, 2, 300, 5, 8, 4), False, 1.7),
    ],
    ids=str,
)
def test_attention_keeps_no_scores(tmp_path, shape, given, scale):
    arrays = attention_arrays(*shape, given)
    stage, graph = exported(Attend(shape[1], scale), arrays, tmp_path)
    assert operators(graph.path)["Attention"] == 1
    engine = built(graph, tmp_path)
    kinds = operators(engine)
    assert kinds["MultiHeadAttention"] == 1 and not kinds.keys() & {"Attention", "Softmax", "MatMul"}
    # Few keys are read by heads, many not; what splits or merges heads in vain is gone.
    by_heads = shape[3] <= 256 and shape[4] == shape[5]
    assert kinds["Transpose"] == (0 if given == by_heads else 2)
    expected = stage.module(*(torch.from_numpy(array).double() for array in arrays)).numpy()
    assert snr_db(expected, run(engine, stage.contract, arrays)) > 115


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_attention_with_a_mask_stays(tmp_path, kind):
    """MultiHeadAttention would keep the scores too."""
    arrays = attention_arrays(1, 2, 9, 9, 8, 8, False)
    stage, graph = exported(Attend(2, **{kind: True}), arrays, tmp_path)
    engine = built(graph, tmp_path)
    assert operators(engine)["MultiHeadAttention"] == 0
    expected = stage.module(*(torch.from_numpy(array).double() for array in arrays)).numpy()
    assert snr_db(expected, run(engine, stage.contract, arrays)) > 115


def test_attention_takes_no_memory_for_scores(tmp_path):
    """Those of 8 heads and 2048 tokens are 134 MB."""
    arrays = attention_arrays(1, 8, 2048, 2048, 8, 8, False)
    _, graph = exported(Attend(8), arrays, tmp_path)
    script = """
import sys
import numpy as np
import onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
feeds = {x.name: np.ones(x.shape, np.float32) for x in session.get_inputs()}
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
session.run(None, feeds)
print(peak() - before)
"""
    standard, own = (
        int(subprocess.run([sys.executable, "-c", script, path], capture_output=True, check=True).stdout)
        for path in (graph.path, built(graph, tmp_path))
    )
    assert own < 40e6 and standard > 134e6


@pytest.mark.parametrize(
    ("shape", "groups", "epsilon"),
    [((1, 320, 8, 8), 32, 1e-5), ((2, 12, 7, 5), 3, 1e-6), ((3, 8, 19), 8, 1e-5), ((1, 6, 2, 3, 4), 1, 1e-3)],
    ids=str,
)
def test_group_normalization_is_exact(tmp_path, shape, groups, epsilon):
    random = np.random.default_rng(len(shape))
    x = 3 * random.standard_normal(shape, np.float32) + 20
    norm = nn.GroupNorm(groups, shape[1], epsilon).requires_grad_(False)
    norm.weight.normal_(), norm.bias.normal_()
    stage, graph = exported(norm, [x], tmp_path)
    assert operators(graph.path) == {"GroupNormalization": 1}
    engine = built(graph, tmp_path)
    kinds = operators(engine)
    assert kinds == {"Reshape": 2, "InstanceNormalization": 1, "BatchNormalization": 1}
    expected = norm.double()(torch.from_numpy(x).double()).numpy()
    assert snr_db(expected, run(engine, stage.contract, [x])) > 110


class Convolutions(nn.Module):
    """Two convolutions in 8 bits; channels of the first are of very different sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 72, 3, padding=1)
        self.second = nn.Conv2d(72, 16, 1, bias=False)
        self.requires_grad_(False)
        self.first.weight *= torch.logspace(-3, 0, 72)[:, None, None, None]
        self.first.bias *= torch.logspace(-2, 1, 72)

    def forward(self, x):
        return self.second(F.silu(self.first(x)) * torch.logspace(3, 0, 72)[:, None, None])


def in_8_bits(module, x):
    """The module in 8 bits, and its layers' scales."""
    scales = choose_scales(module, Precision.INT8_FP32, *[lambda: module(torch.from_numpy(x))] * 2)
    layers = quantize_layers(module, scales, Precision.INT8_FP32)
    install_layers(module, layers)
    return scales


@pytest.fixture
def quantized(tmp_path):
    """A stage of Convolutions in 8 bits, its graph, the scales, and an input."""
    torch.manual_seed(0)
    module, x = Convolutions(), np.random.default_rng(0).standard_normal((2, 8, 12, 10), np.float32)
    with torch.inference_mode():
        scales = in_8_bits(module, x)
        return (*exported(module, [x], tmp_path, Precision.INT8_FP32), scales, x)


def rounded(y, scales):
    """What is left of an output (b, c, h, w) that is rounded to 8 bits, ONNX's formula."""
    steps = torch.tensor(scales, dtype=torch.float64)[:, None, None]
    return (y.double() / steps).round().clamp(-128, 127) * steps


@adds_up_in_32_bits
def test_convolutions_in_8_bits_are_single_kernels(quantized, tmp_path):
    stage, graph, scales, x = quantized
    assert operators(graph.path)["QLinearConv"] == 0
    engine = built(graph, tmp_path)
    kinds = operators(engine)
    assert kinds["QLinearConv"] == 2 and kinds["Conv"] == 0
    plain = stage.module
    with torch.inference_mode():
        hidden = rounded(plain.first(torch.from_numpy(x)), scales["first"].outputs).float()
        hidden = F.silu(hidden) * torch.logspace(3, 0, 72)[:, None, None]
        expected = rounded(plain.second(hidden), scales["second"].outputs).numpy()
        unrounded = plain(torch.from_numpy(x)).numpy()
    actual = run(engine, stage.contract, [x])
    steps = np.abs(actual - expected) / np.array(scales["second"].outputs)[:, None, None]
    # Where a sum lies halfway, float rounding decides, and the second layer may pass it on.
    assert steps.max() < 2.01 and (steps > 0.01).mean() < 0.01
    assert snr_db(unrounded, actual) > 35


def test_each_channel_of_an_output_has_its_own_scale(quantized, tmp_path):
    """With a single one, the small channels would be rounded to nothing."""
    stage, graph, scales, x = quantized
    y = stage.module.first(torch.from_numpy(x))
    assert max(scales["first"].outputs) > 50 * min(scales["first"].outputs)
    noise = (rounded(y, scales["first"].outputs) - y).square().mean((0, 2, 3))
    assert (10 * torch.log10(y.square().mean((0, 2, 3)) / noise)).min() > 30
    note = next(node.metadata_props for node in onnx.load(graph.path).graph.node if node.op_type == "Conv")
    assert note[0].key == OUTPUT_SCALES and json.loads(note[0].value) == scales["first"].outputs


class Products(nn.Module):
    """Matrix products with a bias and without, as the UNet's feed-forward and attention have them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 20, bias=False)

    def forward(self, x):
        return self.second(F.gelu(self.first(x))) + x[..., :20]


@adds_up_in_32_bits
@pytest.mark.parametrize("shape", [(2, 33, 48), (7, 48)], ids=str)
def test_products_in_8_bits_are_single_kernels(tmp_path, shape):
    torch.manual_seed(0)
    module, x = Products(), 3 * np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.inference_mode():
        scales = in_8_bits(module, x)
        x.flat[0] = 1000.0  # clipped
        stage, graph = exported(module, [x], tmp_path, Precision.INT8_FP32)
        expected = stage.module(torch.from_numpy(x)).numpy()
    assert len(scales) == 2
    engine = built(graph, tmp_path)
    kinds = operators(engine)
    assert kinds["MatMulIntegerToFloat"] == 2 and kinds["Add"] == 1
    assert not kinds.keys() & {"MatMul", "Gemm", "DequantizeLinear"}
    assert snr_db(expected, run(engine, stage.contract, [x])) > 100


def test_a_bias_that_no_integer_holds_stays(tmp_path):
    """A channel without weights: its products have the smallest scale, and in it the bias is 5 billion."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((1, 8, 9, 9), np.float32) * 0.01
    module = nn.ModuleDict({"first": nn.Conv2d(8, 4, 3)}).requires_grad_(False)
    module.forward = lambda x: module["first"](x)
    module["first"].weight[2] = 0.0
    module["first"].bias[2] = 1.0
    with torch.inference_mode():
        in_8_bits(module, x)
        stage, graph = exported(module, [x], tmp_path, Precision.INT8_FP32)
        expected = stage.module(torch.from_numpy(x)).numpy()
    engine = built(graph, tmp_path)
    assert operators(engine)["Conv"] == 1
    assert snr_db(expected, run(engine, stage.contract, [x])) > 100


def test_the_exported_graph_is_of_the_standard_alone(quantized):
    model = onnx.load(quantized[1].path)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)


def test_weights_in_a_file_of_their_own(quantized, tmp_path, monkeypatch):
    """The scales are read from that file, which may be a link to that of another graph."""
    stage, graph, _, x = quantized
    monkeypatch.setattr(onnx_graph, "INLINE_LIMIT", 0)
    (tmp_path / "large").mkdir()
    large = export_stage(stage, "onnx", Precision.INT8_FP32, tmp_path / "large")
    constants = onnx.load(large.path, load_external_data=False).graph.initializer
    assert any("scale" in tensor.name and tensor.external_data for tensor in constants)
    (tmp_path / "link").hardlink_to(large.weights)
    paths = [built(graph, tmp_path), built(large, tmp_path / "large")]
    assert (tmp_path / "large/engine/small.onnx.data").is_file()
    first, second = (run(path, stage.contract, [x]) for path in paths)
    np.testing.assert_array_equal(first, second)


def test_other_forms_are_other_engines(tmp_path, monkeypatch):
    """Of the same graphs: an export may be older than the forms."""
    targets = CPU, find_target("a10")
    before = [onnxruntime.options(target) for target in targets]
    monkeypatch.setattr(onnxruntime, "FORMS", tmp_path / "forms.py")
    onnxruntime.FORMS.write_text("FORMS = {}\n")
    after = [onnxruntime.options(target) for target in targets]
    assert all(one != other for one, other in zip(before, after, strict=True))


# ---- complete stages ----


@pytest.fixture(scope="module", params=["demo", "sd15"])
def graphs(request, tmp_path_factory):
    """An export to ONNX in fp32."""
    if request.param == "demo":
        spec = BuildSpec("demo", precision="fp32")
    else:
        base = str(request.getfixturevalue("sd15_checkpoint"))
        spec = BuildSpec(base, no_lcm=True, few_step="lcm", precision="fp32")
    folder = tmp_path_factory.mktemp(request.param) / "graphs"
    export(spec, folder)
    return open_export(folder)


def test_every_stage_has_the_forms_and_computes_the_same(graphs, tmp_path):
    """Against ONNX Runtime's own result for the graph before, on the calls of the proof."""
    seen = Counter()
    for stage in graphs.manifest.stages:
        graph = graphs.graph(stage)
        before = operators(graph.path)
        engine = onnxruntime.build(graph, CPU, tmp_path)
        after = operators(engine)
        masked = [
            node
            for node in onnx.load(graph.path, load_external_data=False).graph.node
            if node.op_type == "Attention" and (len(node.input) > 3 or has_mask(node))
        ]
        assert after["MultiHeadAttention"] == before["Attention"] - len(masked)
        assert after["Attention"] + after["Softmax"] <= len(masked)
        assert after["InstanceNormalization"] == before["GroupNormalization"]
        seen.update(before)
        name = stage.contract.name
        inputs, _ = read_calls(graphs.folder / f"proof/{name}.npz", stage.contract)[0]
        plain = ort.InferenceSession(graph.path, providers=["CPUExecutionProvider"])
        expected = plain.run(None, inputs)
        with onnxruntime.load(engine, stage.contract, CPU) as runner:
            actual = runner(inputs)
        for one, other in zip(expected, actual.values(), strict=True):
            assert snr_db(one, other) > (60 if one.dtype == np.uint8 else 100), name
    assert seen["Attention"] > 5 and seen["GroupNormalization"] > 10


def has_mask(node):
    return any(a.name == "is_causal" and a.i for a in node.attribute)


@adds_up_in_32_bits
def test_no_layer_of_a_unet_in_8_bits_turns_its_weights_into_floats(sd15_checkpoint, tmp_path):
    spec = BuildSpec(
        str(sd15_checkpoint), no_lcm=True, few_step="lcm", backend="onnxruntime", precision="int8"
    )
    bundle = build(spec, tmp_path / "bundle")
    step = next(stage for stage in bundle.manifest.stages if stage.contract.name == "step")
    graph = onnx.load(bundle.path(step.file)).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    plain = [node for node in graph.node if node.op_type in ("Conv", "FusedConv", "Gemm", "MatMul")]
    assert not [node.name for node in plain if node.input[1] in made_by]
    kinds = operators(bundle.path(step.file))
    assert kinds["QLinearConv"] + kinds["MatMulIntegerToFloat"] == len(step.quantized_layers)
    assert bundle.manifest.parity["picture"].passed


class GroupNorm(OpRun):
    """ONNX Runtime's operator, by the formula in its schema. There is a kernel for CUDA alone."""

    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, activation=None, groups=None, epsilon=1e-5, channels_last=1):
        assert channels_last == 1 and gamma.dtype == beta.dtype == np.float32  # what CUDA's kernel wants
        b, h, w, c = x.shape
        grouped = x.astype(np.float64).reshape(b, h * w, groups, c // groups)
        mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
        return ((y / (1 + np.exp(-y)) if activation else y).astype(x.dtype),)


class Normalized(nn.Module):
    """A convolution, its normalization and SiLU; then what has no SiLU, and what CUDA's kernel can't take."""

    def __init__(self, channels=128, groups=32):
        super().__init__()
        self.conv = nn.Conv2d(8, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels, eps=1e-2) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.conv(x.to(self.conv.weight.dtype))
        return self.norms[1](F.silu(self.norms[0](x))).float()


def with_cuda_forms(module, precision, folder):
    """The graph of a module as CUDA's provider gets it, and its input."""
    x = 3 * np.random.default_rng(5).standard_normal((2, 8, 6, 4), np.float32)
    module = to_precision(module.requires_grad_(False), precision.floats)
    _, graph = exported(module, [x], folder, precision)
    return onnx.load_from_string(with_forms(graph.path, CUDA_FORMS)), x


@pytest.mark.parametrize(("precision", "floor"), [("fp32", 120), ("fp16", 60)])
def test_cuda_normalizes_groups_in_one_node_each(tmp_path, precision, floor):
    torch.manual_seed(3)
    module = Normalized()
    exact = copy.deepcopy(module).double()
    model, x = with_cuda_forms(module, Precision(precision), tmp_path)
    with torch.inference_mode():
        expected = exact(torch.from_numpy(x)).numpy()
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["GroupNorm"] == 2 and not kinds.keys() & {"GroupNormalization", "Sigmoid", "Mul"}
    found = [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in model.graph.node]
    assert [one["activation"] for one in found if "activation" in one] == [1, 0]
    [found] = ReferenceEvaluator(model, new_ops=[GroupNorm]).run(None, {"x0": x})
    assert snr_db(expected, found) > floor


@pytest.mark.parametrize(("channels", "groups"), [(128, 16), (96, 32)])
def test_what_cudas_kernel_can_not_normalize_stays(tmp_path, channels, groups):
    model, _ = with_cuda_forms(Normalized(channels, groups), FP32, tmp_path)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["GroupNorm"] == 0 and kinds["GroupNormalization"] == 2


def test_every_attribute_is_one_of_the_operators_schema(tmp_path):
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    [schema] = [s for s in get_all_operator_schema() if (s.domain, s.name) == ("com.microsoft", "GroupNorm")]
    model, _ = with_cuda_forms(Normalized(), FP32, tmp_path)
    for node in model.graph.node:
        if node.op_type == "GroupNorm":
            given = {attribute.name for attribute in node.attribute}
            assert {name for name, one in schema.attributes.items() if one.required} <= given
            assert given <= set(schema.attributes) and len(node.input) == len(schema.inputs)
