"""Puts Winograd convolutions into an OpenVINO model, and the additions that follow a convolution into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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


def replace_convolutions(model: Any, choices: Mapping[str, str], bf16: bool) -> int:
    """Replaces the 3×3 convolutions that `choices` has a faster form for, and returns their number.

    `choices` are those of `choice.choose`. With `bf16` the products are in bf16, and their sums in fp32.
    """
    from openvino.utils.node_factory import NodeFactory

    replacements: list[Callable[[Any], None]] = []  # each gets the factory of nodes
    for node in model.get_ordered_ops():
        if node.get_type_name() == "DepthToSpace":
            doubled = doubled_of(node)
            if doubled is None or (bf16 and doubled.weights.shape[1] % 2):
                continue
            # F(3×3, 2×2) has as many tiles as F(2×2, 3×3) has on a map of two thirds the side.
            sides = (2 * side / 3 for side in list(node.get_input_shape(0))[2:])
            if form_for(choices, *doubled.weights.shape[:2], *sides) != DIRECT:
                replacements.append(partial(replace_doubled, node, doubled, bf16))
        elif node.get_type_name() == "Convolution":
            weights = weights_of(node)
            if weights is None or (bf16 and weights.shape[1] % 2):
                continue
            form = form_for(choices, *weights.shape[:2], *list(node.get_output_shape(0))[2:])
            if form != DIRECT:
                replacements.append(partial(replace, node, weights, TILES[form], bf16))
    if replacements:
        factory = NodeFactory()
        factory.add_extension(library())
        for replacement in replacements:
            replacement(factory)
    return len(replacements)


def form_for(choices: Mapping[str, str], outputs: int, inputs: int, height: float, width: float) -> str:
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


@dataclass(frozen=True)
class Doubled:
    """A convolution of a doubled map `x`, as the rewrite `upsampling` makes four 2×2 convolutions of it.

    `weights` are theirs (4·outputs, inputs, 2, 2), and `bias` (1, outputs, 1, 1) is that of each.
    """

    x: Any
    weights: np.ndarray
    bias: np.ndarray


def doubled_of(node: Any) -> Doubled | None:
    """Returns the convolution of a doubled map that a DepthToSpace ends, or None if there is none."""
    attributes = node.get_attributes()
    if attributes["block_size"] != 2 or attributes["mode"] != "depth_first":
        return None
    stacked = through(node.input_value(0), ("Reshape",))
    if stacked.get_type_name() != "Concat" or stacked.get_input_size() != len(PADS):
        return None
    weights, biases, sources = [], [], []
    for value, pads in zip(stacked.input_values(), PADS, strict=True):
        add = through(value, ("Unsqueeze",))
        if add.get_type_name() != "Add":
            return None
        corner = add.input_value(0).get_node()
        if corner.get_type_name() != "Convolution" or corner.get_output_partial_shape(0).is_dynamic:
            return None
        attributes = corner.get_attributes()
        plain = attributes["strides"] == ONES and attributes["dilations"] == ONES
        if not plain or (attributes["pads_begin"], attributes["pads_end"]) != pads:
            return None
        weight, bias = constant(corner.input_value(1)), constant(add.input_value(1))
        if weight is None or bias is None or weight.shape[2:] != (2, 2):
            return None
        weights.append(weight)
        biases.append(bias)
        sources.append(corner.input_value(0))
    if any(source != sources[0] for source in sources) or any((bias != biases[0]).any() for bias in biases):
        return None
    return Doubled(sources[0], np.stack(weights, 1).reshape(-1, *weights[0].shape[1:]), biases[0])


def through(value: Any, kinds: Sequence[str]) -> Any:
    """Returns the node that gives a value, before any nodes of these kinds."""
    node = value.get_node()
    while node.get_type_name() in kinds:
        node = node.input_value(0).get_node()
    return node


def replace_doubled(node: Any, layer: Doubled, bf16: bool, factory: Any) -> None:
    """Replaces four 2×2 convolutions, their bias, and the DepthToSpace that joins them."""
    from openvino import opset13 as op

    weights = op.constant(packed(layer.weights, DOUBLED, bf16))
    inputs = [layer.x, weights.output(0), op.constant(layer.bias).output(0)]
    attributes = {"tile": DOUBLED, "outputs": len(layer.weights) // 4, "bf16": int(bf16)}
    put_in_place(factory.create("WinogradConvolution", inputs, attributes), node)


def put_in_place(new: Any, old: Any) -> None:
    """Gives a node the name and the readers of another."""
    new.set_friendly_name(old.get_friendly_name())
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))


def constant(value: Any) -> np.ndarray | None:
    """Returns a constant, or a converted or reshaped one, in fp32; None for any other value."""
    node = through(value, ("Convert", "Reshape", "Unsqueeze"))
    if node.get_type_name() != "Constant":
        return None
    return np.asarray(node.get_data(dtype=np.float32)).reshape(list(value.get_shape()))


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
    put_in_place(convolution, last)


def addition(node: Any) -> tuple[Any, Any] | None:
    """Returns the Add that alone reads a node's result, and the other value that it adds, or None."""
    readers = list(node.output(0).get_target_inputs())
    if len(readers) != 1 or (add := readers[0].get_node()).get_type_name() != "Add":
        return None
    return add, add.input_value(1 - readers[0].get_index())
