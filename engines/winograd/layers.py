"""Puts Winograd convolutions into an OpenVINO model, and the additions that follow a convolution into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcm_compile.engines.winograd.library import library, packed

DIRECT = "direct"
# The output tile of each form. F(4×4) needs 36 products for 16 pixels, F(2×2) 16 for 4, and direct
# convolution 9 for each.
TILES = {"F2": 2, "F4": 4}
DOUBLED = 3  # the tile of F(3×3, 2×2), which computes a doubled map: 64 products for 36 of its pixels
ONES = [1, 1]
# Of the rewrite `upsampling` (see stages.rewrites), the pads of the four convolutions: before, and after.
PADS = (([1, 1], [0, 0]), ([1, 0], [0, 1]), ([0, 1], [1, 0]), ([0, 0], [1, 1]))


@dataclass(frozen=True)
class Layer:
    """A convolution of `x` that a kernel computes, and nodes after it that it computes as well.

    `weights` are (outputs, inputs, 3, 3), or with the tile DOUBLED (4·outputs, inputs, 2, 2). `bias` is a
    node (1, outputs, 1, 1) or (pictures, outputs, 1, 1) in fp32, and `residual` has at most one value of the
    result's shape. The readers of `last` are given the kernel's result.
    """

    x: Any
    weights: np.ndarray
    tile: int
    outputs: int
    bias: Any
    residual: Sequence[Any]
    last: Any


def replace_convolutions(model: Any, choices: Mapping[str, str], bf16: bool) -> int:
    """Replaces the 3×3 convolutions that `choices` has a faster form for, and returns their number.

    `choices` are those of `choice.choose`. With `bf16` the products are in bf16, and their sums in fp32.
    """
    if set(choices.values()) <= {DIRECT}:
        return 0
    from openvino import opset13 as op
    from openvino.utils.node_factory import NodeFactory

    kernels, factory = library(), NodeFactory()
    factory.add_extension(kernels)
    count = 0
    for node in model.get_ordered_ops():
        layer = layer_of(node, choices)
        if layer is None or (bf16 and layer.weights.shape[1] % 2):
            continue
        words = op.constant(packed(kernels, layer.weights, layer.tile, bf16))
        inputs = [layer.x, words.output(0), layer.bias.output(0), *layer.residual]
        attributes = {"tile": layer.tile, "outputs": layer.outputs, "bf16": int(bf16)}
        kernel = factory.create("WinogradConvolution", inputs, attributes)
        kernel.set_friendly_name(layer.last.get_friendly_name())
        for reader in layer.last.output(0).get_target_inputs():
            reader.replace_source_output(kernel.output(0))
        count += 1
    return count


def form_for(choices: Mapping[str, str], outputs: int, inputs: int, height: float, width: float) -> str:
    """Returns the form of the size in `choices` that is nearest to a layer's, by the logarithms of both."""
    channels, side = math.log(outputs * inputs) / 2, math.log(height * width) / 2

    def distance(name: str) -> float:
        c, s = map(int, name.split("@"))
        return abs(math.log(c) - channels) + abs(math.log(s) - side)

    return choices[min(choices, key=distance)] if choices else DIRECT


def layer_of(node: Any, choices: Mapping[str, str]) -> Layer | None:
    """Returns the layer that begins with a Convolution or ends with a DepthToSpace, or None if that stays."""
    if node.get_type_name() == "Convolution":
        return convolution(node, choices)
    return doubled(node, choices) if node.get_type_name() == "DepthToSpace" else None


def convolution(node: Any, choices: Mapping[str, str]) -> Layer | None:
    """Returns a 3×3 convolution of constant weights, and what is added to its result, or None.

    An addition of one number for each channel is part of the bias, and a map of the result's shape is the
    residual, of which there can be one.
    """
    from openvino import opset13 as op

    if not is_plain(node, (ONES, ONES)) or list(node.get_input_shape(1))[2:] != [3, 3]:
        return None
    shape = list(node.get_output_shape(0))
    form = form_for(choices, *list(node.get_input_shape(1))[:2], *shape[2:])
    if form == DIRECT or (weights := constant(node.input_value(1))) is None:
        return None
    bias, last = np.zeros((1, shape[1], 1, 1), np.float32), node
    added: list[Any] = []
    residual: list[Any] = []
    while (addition := addition_to(last)) is not None:
        add, other = addition
        dims, known = list(other.get_shape()), constant(other)
        if dims == [1, shape[1], 1, 1] and known is not None:
            bias = bias + known
        elif dims in ([1, shape[1], 1, 1], [shape[0], shape[1], 1, 1]):
            added.append(other)
        elif dims == shape and not residual:
            residual.append(other)
        else:
            break
        last = add
    total = op.constant(bias)
    for numbers in added:
        total = op.add(op.convert(numbers, "f32"), total)
    return Layer(node.input_value(0), weights, TILES[form], shape[1], total, residual, last)


def doubled(node: Any, choices: Mapping[str, str]) -> Layer | None:
    """Returns the convolution of a doubled map that a DepthToSpace ends, or None.

    The rewrite `upsampling` makes four 2×2 convolutions with the same bias of it.
    """
    from openvino import opset13 as op

    attributes = node.get_attributes()
    if attributes["block_size"] != 2 or attributes["mode"] != "depth_first":
        return None
    stacked = through(node.input_value(0), ("Reshape",))
    if stacked.get_type_name() != "Concat" or stacked.get_input_size() != len(PADS):
        return None
    weights, biases, sources = [], [], []
    for value, pads in zip(stacked.input_values(), PADS, strict=True):
        add = through(value, ("Unsqueeze",))
        corner = add.input_value(0).get_node() if add.get_type_name() == "Add" else None
        if corner is None or corner.get_type_name() != "Convolution" or not is_plain(corner, pads):
            return None
        weight, bias = constant(corner.input_value(1)), constant(add.input_value(1))
        if weight is None or bias is None or weight.shape[2:] != (2, 2):
            return None
        weights.append(weight)
        biases.append(bias)
        sources.append(corner.input_value(0))
    if any(source != sources[0] for source in sources) or any((bias != biases[0]).any() for bias in biases):
        return None
    corners = np.stack(weights, 1).reshape(-1, *weights[0].shape[1:])
    # F(3×3, 2×2) has as many tiles as F(2×2, 3×3) has on a map of two thirds the side.
    sides = (2 * side / 3 for side in list(node.get_input_shape(0))[2:])
    if form_for(choices, *corners.shape[:2], *sides) == DIRECT:
        return None
    return Layer(sources[0], corners, DOUBLED, len(corners) // 4, op.constant(biases[0]), (), node)


def is_plain(node: Any, pads: tuple[list[int], list[int]]) -> bool:
    """Returns whether a convolution has stride 1, these pads before and after, and static shapes."""
    attributes = node.get_attributes()
    plain = attributes["strides"] == ONES and attributes["dilations"] == ONES
    same = (attributes["pads_begin"], attributes["pads_end"]) == pads
    return plain and same and not node.get_output_partial_shape(0).is_dynamic


def addition_to(node: Any) -> tuple[Any, Any] | None:
    """Returns the Add that alone reads a node's result, and the other value that it adds, or None."""
    readers = list(node.output(0).get_target_inputs())
    if len(readers) != 1 or (add := readers[0].get_node()).get_type_name() != "Add":
        return None
    return add, add.input_value(1 - readers[0].get_index())


def constant(value: Any) -> np.ndarray | None:
    """Returns a constant, or a converted or reshaped one, in fp32; None for any other value."""
    node = through(value, ("Convert", "Reshape", "Unsqueeze"))
    if node.get_type_name() != "Constant":
        return None
    return np.asarray(node.get_data(dtype=np.float32)).reshape(list(value.get_shape()))


def through(value: Any, kinds: Sequence[str]) -> Any:
    """Returns the node that gives a value, before any nodes of these kinds."""
    node = value.get_node()
    while node.get_type_name() in kinds:
        node = node.input_value(0).get_node()
    return node
