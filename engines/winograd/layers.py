"""Puts Winograd convolutions into an OpenVINO model, and the additions that follow a convolution into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcm_compile.engines.winograd.library import library, packed

DIRECT = "direct"
# The output tile of each form. F(4×4) needs 36 products for 16 pixels, F(2×2) 16 for 4, and direct
# convolution 9 for each.
TILES = {"F2": 2, "F4": 4}
ONES = [1, 1]


def replace_convolutions(model: Any, choices: Mapping[str, str], bf16: bool) -> int:
    """Replaces the 3×3 convolutions that `choices` has a faster form for, and returns their number.

    `choices` are those of `choice.choose`. With `bf16` the products are in bf16, and their sums in fp32.
    """
    from openvino.utils.node_factory import NodeFactory

    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    factory: Any = None
    count = 0
    for node in convolutions:
        weights = weights_of(node)
        if weights is None or (bf16 and weights.shape[1] % 2):
            continue
        height, width = list(node.get_output_shape(0))[2:]
        form = form_for(choices, weights.shape[0], weights.shape[1], height, width)
        if form == DIRECT:
            continue
        if factory is None:
            factory = NodeFactory()
            factory.add_extension(library())
        replace(node, weights, TILES[form], bf16, factory)
        count += 1
    return count


def form_for(choices: Mapping[str, str], outputs: int, inputs: int, height: int, width: int) -> str:
    """Returns the form of the size in `choices` that is nearest to a layer's, by the logarithms of both."""
    channels, side = math.log(outputs * inputs) / 2, math.log(height * width) / 2

    def distance(name: str) -> float:
        c, s = map(int, name.split("@"))
        return abs(math.log(c) - channels) + abs(math.log(s) - side)

    return choices[min(choices, key=distance)] if choices else DIRECT


def weights_of(node: Any) -> np.ndarray | None:
    """Returns the weights (outputs, inputs, 3, 3) of a convolution in fp32, or None if no kernel computes it.

    The kernels compute static shapes, 3×3 filters of constant weights, stride 1 and padding 1.
    """
    attributes = node.get_attributes()
    plain = attributes["strides"] == ONES and attributes["dilations"] == ONES
    same = attributes["pads_begin"] == ONES and attributes["pads_end"] == ONES
    if not plain or not same or node.get_output_partial_shape(0).is_dynamic:
        return None
    if list(node.get_input_shape(1))[2:] != [3, 3]:
        return None
    return constant(node.input_value(1))


def constant(value: Any) -> np.ndarray | None:
    """Returns a constant, or a converted or reshaped one, in fp32; None for any other value."""
    node, shape = value.get_node(), list(value.get_shape())
    while node.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    return np.asarray(node.get_data(dtype=np.float32)).reshape(shape)


def replace(node: Any, weights: np.ndarray, tile: int, bf16: bool, factory: Any) -> None:
    """Replaces one convolution, and what is added to its result.

    An addition of one number for each channel is part of the bias, and a map of the result's shape is the
    residual, of which there can be one.
    """
    from openvino import opset13 as op

    shape = list(node.get_output_shape(0))
    per_channel = [1, shape[1], 1, 1]
    bias: Any = np.zeros(per_channel, np.float32)
    residual = None
    last = node
    while (added := addition(last)) is not None:
        add, other = added
        dims = list(other.get_shape())
        known = constant(other)
        if dims == per_channel and known is not None:
            bias = bias + known if isinstance(bias, np.ndarray) else op.add(bias, op.constant(known))
        elif dims in (per_channel, [shape[0], shape[1], 1, 1]):
            number = op.convert(other, "f32") if other.get_element_type().to_string() != "f32" else other
            bias = op.add(number, op.constant(bias) if isinstance(bias, np.ndarray) else bias)
        elif dims == shape and residual is None:
            residual = other
        else:
            break
        last = add
    inputs = [node.input_value(0), op.constant(packed(weights, tile, bf16)).output(0)]
    inputs.append((op.constant(bias) if isinstance(bias, np.ndarray) else bias).output(0))
    if residual is not None:
        inputs.append(residual)
    attributes = {"tile": tile, "outputs": shape[1], "bf16": int(bf16)}
    convolution = factory.create("WinogradConvolution", inputs, attributes)
    convolution.set_friendly_name(last.get_friendly_name())
    for reader in last.output(0).get_target_inputs():
        reader.replace_source_output(convolution.output(0))


def addition(node: Any) -> tuple[Any, Any] | None:
    """Returns the Add that alone reads a node's result, and the other value that it adds, or None."""
    readers = list(node.output(0).get_target_inputs())
    if len(readers) != 1 or (add := readers[0].get_node()).get_type_name() != "Add":
        return None
    return add, add.input_value(1 - readers[0].get_index())
