"""Rewrites a graph in the forms that ONNX Runtime's CPU provider or its CUDA provider computes well.

On a CPU, ONNX Runtime 1.31 computes the standard's Attention by storing the scores of all heads,
GroupNormalization as 29 nodes of other operators, a convolution in 8 bits only if its output is rounded to 8
bits as well, and a matrix product with a bias not in 8 bits at all. Each form here replaces one node, where
shapes and types allow it. The CUDA provider has no kernel of GroupNormalization either. Exported graphs keep
the standard's operators: other backends have kernels for these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from lcm_compile.graphs import OUTPUT_SCALES

# The domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"
# Swaps the tokens and the heads of a tensor (b, tokens, heads, width).
SWAP = (0, 2, 1, 3)
# Attributes with which Attention computes something else than softmax(scale · query · keysᵀ) · values.
OTHER_ATTENTION = ("is_causal", "softcap", "q_num_heads", "kv_num_heads")
# To so many keys, as a text has, all scores at once take little memory, and less time than blocks of them.
FEW_KEYS = 256
# The value that stands for 0 in 8 bits. ONNX Runtime's kernels for x86 want activations without a sign.
ZERO_POINT = 128
# A bias that is larger than this in units of its scale is not rounded to an integer of 32 bits.
LARGEST_BIAS = 1 << 30

# What CUDA's kernel of GroupNorm takes (contrib_ops/cuda/diffusion/group_norm_impl.cu in ONNX Runtime): its
# numbers of groups and of pictures, and numbers of channels that its blocks divide into whole groups.
CUDA_GROUPS = 32
CUDA_BATCH = 32
CUDA_CHANNELS = (128, 256, 320, 512, 640, 960, 1280, 1920, 2560)

# A function that returns what a node gives, made of other nodes, or None where the node must stay as it is.
Form = Callable[[ir.Node, "Builder"], ir.Value | None]


class Builder:
    """Makes the nodes that replace one node of a graph, and the constants that they read."""

    def __init__(self, replaced: ir.Node, folder: Path) -> None:
        self.name = replaced.outputs[0].name
        self.folder = folder
        self.tape = Tape()
        self.op = self.tape.op

    def constant(self, array: np.ndarray) -> ir.Value:
        """Returns a new constant."""
        return self.tape.initializer(ir.tensor(array), f"{self.name}/{len(self.tape.initializers)}")

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Returns a value in another shape."""
        return self.op("Reshape", [value, self.constant(np.array(shape, np.int64))])

    def swap(self, value: ir.Value) -> ir.Value:
        """Returns a value (b, tokens, heads, width) as (b, heads, tokens, width), or the other way round."""
        return self.op("Transpose", [value], {"perm": SWAP})

    def array(self, value: ir.Value) -> np.ndarray:
        """Returns the values of a constant. If they are in a file of weights, only they are read from it."""
        tensor = value.const_value
        assert tensor is not None
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy()
        # onnx_ir itself refuses files with several hard links, and a twin's weights are such a link.
        path, offset = self.folder / tensor.location, tensor.offset or 0
        return np.fromfile(path, tensor.dtype.numpy(), tensor.size, offset=offset).reshape(value_shape(value))


def with_forms(path: Path, forms: Mapping[str, Form]) -> bytes:
    """Returns the model in an ONNX file with each node in its form, as the content of an ONNX file.

    `forms` is CPU_FORMS or CUDA_FORMS. Weights that the model keeps in a file of their own stay there.
    """
    model = ir.load(path)
    graph = model.graph
    graph.opset_imports.setdefault(MICROSOFT, 1)
    for node in list(graph):
        form = forms.get(node.op_type)
        if form is None or node.domain:
            continue
        builder = Builder(node, path.parent)
        value = form(node, builder)
        if value is not None:
            for constant in builder.tape.initializers:
                graph.register_initializer(constant)
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], builder.tape.nodes, node.outputs[:1], [value]
            )
    RemoveUnusedNodesPass()(model)
    return ir.to_proto(model).SerializeToString()


def multi_head_attention(node: ir.Node, builder: Builder) -> ir.Value | None:
    """Returns the output of Attention as MultiHeadAttention computes it, or None if that can't.

    MultiHeadAttention goes through queries and keys in blocks that fit into the processor's cache, unless it
    has a mask, or gets the keys by heads. It takes and returns (b, tokens, heads · width) instead of (b,
    heads, tokens, width); ONNX Runtime removes the transpositions that undo those around them.
    """
    inputs = [value for value in node.inputs if value is not None]
    others = [name for name in OTHER_ATTENTION if attribute(node, name, 0)]
    if len(inputs) != 3 or others or any(value.uses() for value in node.outputs[1:]):
        return None
    shapes = [value_shape(value) for value in inputs]
    if not all(map(is_fp32, inputs)) or {len(shape) for shape in shapes} != {4}:
        return None
    (batch, heads, tokens, _), (_, key_heads, keys, _), (*_, width) = shapes
    if heads != key_heads:
        return None
    by_heads = keys <= FEW_KEYS and shapes[1] == shapes[2]  # which the operator wants of these
    inputs = [
        value if i and by_heads else builder.reshape(builder.swap(value), (b, n, h * d))
        for i, (value, (b, h, n, d)) in enumerate(zip(inputs, shapes, strict=True))
    ]
    # A scale of 0 stands for 1/√width, as no scale does in the standard.
    attributes = {"num_heads": heads, "scale": float(attribute(node, "scale", 0.0))}
    attended = builder.op("MultiHeadAttention", inputs, attributes, domain=MICROSOFT)
    return builder.swap(builder.reshape(attended, (batch, tokens, heads, width)))


def instance_normalization(node: ir.Node, builder: Builder) -> ir.Value | None:
    """Returns the output of GroupNormalization by InstanceNormalization of the groups, or None.

    The channels are scaled and shifted by BatchNormalization with a mean of 0 and a variance of 1, which
    reads and writes them once. Mul and Add would do so twice.
    """
    x, scale, bias = node.inputs
    assert x is not None and scale is not None and bias is not None
    shape = value_shape(x)
    if not is_fp32(x) or len(shape) < 3 or value_shape(scale) != shape[1:2]:
        return None
    batch, channels, *_ = shape
    groups = attribute(node, "num_groups", 0)
    grouped = [builder.reshape(x, (batch, groups, math.prod(shape[1:]) // groups))]
    grouped += [builder.constant(np.full(groups, value, np.float32)) for value in (1, 0)]
    epsilon = attribute(node, "epsilon", 1e-5)
    normalized = builder.reshape(builder.op("InstanceNormalization", grouped, {"epsilon": epsilon}), shape)
    mean, variance = (builder.constant(np.full(channels, value, np.float32)) for value in (0, 1))
    return builder.op("BatchNormalization", [normalized, scale, bias, mean, variance], {"epsilon": 0.0})


@dataclass(frozen=True)
class InEightBits:
    """What a product in 8 bits is made of: its input before rounding, the weights, and their scales."""

    x: ir.Value
    scale: ir.Value
    weight: ir.Value
    weight_scales: ir.Value

    def rounded(self, builder: Builder) -> list[ir.Value]:
        """Returns the input rounded to 8 bits without a sign, its scale, and the value that stands for 0."""
        zero = builder.constant(np.array(ZERO_POINT, np.uint8))
        return [builder.op("QuantizeLinear", [self.x, self.scale, zero]), self.scale, zero]


def in_eight_bits(node: ir.Node) -> InEightBits | None:
    """Returns what a product is made of whose input and weights were rounded to 8 bits, or None."""
    x, weights = (dequantized(value) for value in node.inputs[:2])
    rounding = None if x is None else x[0].producer()
    if x is None or weights is None or rounding is None or rounding.op_type != "QuantizeLinear":
        return None
    before, dtype = rounding.inputs[0], attribute(rounding, "output_dtype", 0)
    if before is None or dtype != ir.DataType.INT8 or weights[0].const_value is None:
        return None
    return InEightBits(before, x[1], *weights) if weights[0].dtype == dtype else None


def dequantized(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Returns the small value and the constant scale in fp32 that a value is made from, or None."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) > 2:
        return None
    small, scale = node.inputs
    if small is None or scale is None or scale.const_value is None or not is_fp32(scale):
        return None
    return small, scale


def quantized_product(node: ir.Node, builder: Builder) -> ir.Value | None:
    """Returns the output of a matrix product in 8 bits as MatMulIntegerToFloat computes it, or None."""
    parts = in_eight_bits(node)
    if parts is None:
        return None
    small, scale, zero = parts.rounded(builder)
    inputs = [small, parts.weight, scale, parts.weight_scales, zero]
    return builder.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT)


def bias_of_product(node: ir.Node, builder: Builder) -> ir.Value | None:
    """Returns the sum of what quantized_product made and a bias, by that one node, or None."""
    summands = [value for value in node.inputs if value is not None]
    for product, bias in (summands, summands[::-1]):
        made_by = product.producer()
        if made_by is None or made_by.op_type != "MatMulIntegerToFloat" or len(product.uses()) > 1:
            continue
        if len(value_shape(bias)) == 1 and bias.const_value is not None:
            return builder.op("MatMulIntegerToFloat", [*made_by.inputs, None, bias], domain=MICROSOFT)
    return None


def quantized_convolution(node: ir.Node, builder: Builder) -> ir.Value | None:
    """Returns the output of a convolution in 8 bits, rounded to 8 bits, or None if its scales are not known.

    Each channel of the output has a scale of its own, which the exporter noted. QLinearConv, as which ONNX
    Runtime computes the nodes made here, has a single one. So the channels are divided by their scales
    before, by dividing the scales of the weights and the bias.
    """
    parts = in_eight_bits(node)
    if parts is None or OUTPUT_SCALES not in node.metadata_props:
        return None
    output_scales = np.array(json.loads(node.metadata_props[OUTPUT_SCALES]), np.float32)
    weight_scales = builder.array(parts.weight_scales)
    unit = weight_scales * builder.array(parts.scale)  # what 1 stands for in a channel's sums
    biases = [np.rint(builder.array(bias) / unit) for bias in node.inputs[2:] if bias is not None]
    if any(np.abs(bias).max() > LARGEST_BIAS for bias in biases):
        return None
    x = parts.rounded(builder)
    inputs = [builder.op("DequantizeLinear", x)]
    constants = [(parts.weight, weight_scales)]
    constants += [(builder.constant(bias.astype(np.int32)), unit) for bias in biases]
    for integers, scales in constants:
        divided = builder.constant(scales / output_scales)
        inputs.append(builder.op("DequantizeLinear", [integers, divided], {"axis": 0}))
    product = builder.op("Conv", inputs, node.attributes)
    one = builder.constant(np.array(1, np.float32))
    small = builder.op("QuantizeLinear", [product, one, x[2]])
    zeros = builder.constant(np.full(len(output_scales), ZERO_POINT, np.uint8))
    return builder.op("DequantizeLinear", [small, builder.constant(output_scales), zeros], {"axis": 1})


def group_norm(node: ir.Node, builder: Builder) -> ir.Value | None:
    """Returns the output of GroupNormalization by the one kernel of it that CUDA has, or None.

    That is com.microsoft's GroupNorm. It wants channels last and the scales and shifts in fp32, and takes two
    channels at a time. ONNX Runtime removes the transpositions between it and convolutions, if these have
    their channels last too.
    """
    x, *affine = node.inputs
    assert x is not None
    shape, groups = value_shape(x), attribute(node, "num_groups", 0)
    types = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    if len(shape) != 4 or x.dtype not in types or groups != CUDA_GROUPS or shape[0] > CUDA_BATCH:
        return None
    if shape[1] not in CUDA_CHANNELS or any(one is None or one.const_value is None for one in affine):
        return None
    numbers = [builder.constant(builder.array(one).astype(np.float32)) for one in affine if one is not None]
    settings = {"groups": groups, "epsilon": attribute(node, "epsilon", 1e-5), "activation": 0}
    last = builder.op("Transpose", [x], {"perm": (0, 2, 3, 1)})
    normal = builder.op("GroupNorm", [last, *numbers], settings, domain=MICROSOFT)
    return builder.op("Transpose", [normal], {"perm": (0, 3, 1, 2)})


def silu_of_group_norm(node: ir.Node, builder: Builder) -> ir.Value | None:
    """Returns x · sigmoid(x) of what group_norm made, by that one node, or None."""
    x = next(
        (v for v in node.inputs if v is not None and (p := v.producer()) and p.op_type != "Sigmoid"), None
    )
    others = [value.producer() for value in node.inputs if value is not None and value is not x]
    if (
        x is None
        or len(x.uses()) != 2
        or [o and (o.op_type, o.inputs[0]) for o in others] != [("Sigmoid", x)]
    ):
        return None
    back = x.producer()
    normal = None if back is None or back.op_type != "Transpose" else back.inputs[0]
    made_by = None if normal is None else normal.producer()
    if made_by is None or (made_by.op_type, made_by.domain) != ("GroupNorm", MICROSOFT):
        return None
    settings = {name: attribute(made_by, name, 0) for name in ("groups", "epsilon")}
    result = builder.op("GroupNorm", made_by.inputs, {**settings, "activation": 1}, domain=MICROSOFT)
    return builder.op("Transpose", [result], {"perm": (0, 3, 1, 2)})


# The forms of operators for a processor, and for CUDA.
CPU_FORMS: dict[str, Form] = {
    "Add": bias_of_product,
    "Attention": multi_head_attention,
    "Conv": quantized_convolution,
    "GroupNormalization": instance_normalization,
    "MatMul": quantized_product,
}
CUDA_FORMS: dict[str, Form] = {"GroupNormalization": group_norm, "Mul": silu_of_group_norm}


def attribute(node: ir.Node, name: str, default: float) -> Any:
    """Returns a number among a node's attributes, or the default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def value_shape(value: ir.Value) -> tuple[int, ...]:
    """Returns the shape of a value; () if it is not known completely."""
    if value.shape is None or not value.shape.is_static():
        return ()
    return value.shape.numpy()


def is_fp32(value: ir.Value) -> bool:
    """Returns whether a value's type is known to be fp32."""
    return value.dtype == ir.DataType.FLOAT
