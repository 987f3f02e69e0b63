"""What is changed in a network that TensorRT has read from a graph, before it builds the engine."""

from __future__ import annotations

from typing import Any

import numpy as np

# (before, after) of the rows and columns that are added to a map for each of the four convolutions that
# double it: see Upsampling in lcm_compile/stages/rewrites.py.
PADDINGS = [((1 - i // 2, 1 - i % 2), (i // 2, i % 2)) for i in range(4)]


def allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Lets attention run as plain matrix products if no fused kernel covers it (small heads, fp32).

    Without this such a network may not build. TensorRT still uses a fused kernel if there is one.
    """
    for layer in layers_of(trt, network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.attention.decomposable = True


def join_upsampling(trt: Any, network: Any) -> list[np.ndarray]:
    """Replaces the four convolutions that double a map by one transposed convolution, in place.

    Returns the weights of those that were added, which must last until the engine is built. No number
    changes: their weights are those of the four, in another order. The four results, and what is put together
    from them, would take half of the memory that a decoder computes in. Convolutions in 8 bits stay as they
    are, and those in bf16: NumPy has no such numbers, and TensorRT for RTX no such transposed convolution.
    """
    layers = layers_of(trt, network)
    maker = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    weights: list[np.ndarray] = []
    for layer in layers:
        if layer.type == trt.LayerType.CONCATENATION and (four := corners(trt, layer, maker)):
            result = doubled(trt, layers, layer)
            if result is not None:
                weights.append(transposed_weights(four))
                put_in_place(network, layers, result, doubling(trt, network, four, weights[-1]))
    return weights


def layers_of(trt: Any, network: Any) -> list[Any]:
    """Returns a network's layers, each as an object of its own class."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = {
        trt.LayerType.ATTENTION_INPUT: trt.IAttentionInputLayer,
        trt.LayerType.CONCATENATION: trt.IConcatenationLayer,
        trt.LayerType.CONVOLUTION: trt.IConvolutionLayer,
        trt.LayerType.SHUFFLE: trt.IShuffleLayer,
    }
    for layer in layers:
        layer.__class__ = kinds.get(layer.type, layer.__class__)
    return layers


def inputs_of(layer: Any) -> list[str]:
    """Returns the names of a layer's inputs; one that is not given has the name ""."""
    arrays = [layer.get_input(i) for i in range(layer.num_inputs)]
    return [array.name if array else "" for array in arrays]


def corners(trt: Any, stacked: Any, maker: Any) -> list[Any] | None:
    """Returns the four 2×2 convolutions of one map whose results are stacked (b, c, 4, h, w), or None."""
    if stacked.axis != 2 or len(stacked.get_output(0).shape) != 5:
        return None
    spread = [maker.get(name) for name in inputs_of(stacked)]
    four: list[Any] = [maker.get(inputs_of(one)[0]) if one else None for one in spread]
    if not all(one and one.type == trt.LayerType.CONVOLUTION and one.num_inputs == 1 for one in four):
        return None
    kernels = {(*one.kernel_size_nd, *one.stride_nd, *one.dilation_nd, one.num_groups) for one in four}
    paddings = [(tuple(one.pre_padding), tuple(one.post_padding)) for one in four]
    plain = all(isinstance(one.kernel, np.ndarray) for one in four)
    same = len({inputs_of(one)[0] for one in four}) == 1
    return four if plain and same and kernels == {(2, 2, 1, 1, 1, 1, 1)} and paddings == PADDINGS else None


def doubled(trt: Any, layers: list[Any], stacked: Any) -> Any:
    """Returns the array (b, c, 2h, 2w) that pixel_shuffle makes of a stack (b, c, 4, h, w), or None."""
    batch, channels, _, height, width = stacked.get_output(0).shape
    # The shapes of what the layers that follow give, and in what order they put the dimensions.
    expected = [
        ((batch, 4 * channels, height, width), (0, 1, 2, 3)),
        ((batch, channels, height, 2, width, 2), (0, 1, 4, 2, 5, 3)),
        ((batch, channels, 2 * height, 2 * width), (0, 1, 2, 3)),
    ]
    array = stacked.get_output(0)
    for shape, order in expected:
        readers = [layer for layer in layers if array.name in inputs_of(layer)]
        if len(readers) != 1 or readers[0].type != trt.LayerType.SHUFFLE or readers[0].num_inputs != 1:
            return None
        [layer] = readers
        before = tuple(layer.first_transpose)
        array = layer.get_output(0)
        moved = tuple(layer.second_transpose)[: len(shape)]
        if tuple(array.shape) != shape or moved != order or before != tuple(range(len(before))):
            return None
    return array


def transposed_weights(four: list[Any]) -> np.ndarray:
    """Returns the weights (c, c', 4, 4) of a transposed convolution, from those of the four (c', c, 2, 2).

    Row 2i of its result is K₃·x(i−1) + K₁·x(i), and row 2i + 1 is K₂·x(i) + K₀·x(i+1), for the rows K of its
    weights. So are its columns.
    """
    kernels = np.stack([one.kernel.reshape(one.num_output_maps, -1, 2, 2) for one in four])
    _, outputs, inputs, _, _ = kernels.shape
    ordered = kernels.reshape(2, 2, outputs, inputs, 2, 2).transpose(3, 2, 4, 0, 5, 1)
    return np.ascontiguousarray(ordered.reshape(inputs, outputs, 4, 4)[:, :, ::-1, ::-1])


def doubling(trt: Any, network: Any, four: list[Any], weights: np.ndarray) -> Any:
    """Adds a transposed convolution of stride 2, and returns its result."""
    bias = four[0].bias
    layer = network.add_deconvolution_nd(
        four[0].get_input(0),
        weights.shape[1],
        (4, 4),
        trt.Weights(weights),
        trt.Weights(bias) if bias.size else trt.Weights(),
    )
    layer.stride_nd, layer.padding_nd, layer.name = (2, 2), (1, 1), f"doubling of {four[0].name}"
    return layer.get_output(0)


def put_in_place(network: Any, layers: list[Any], before: Any, after: Any) -> None:
    """Lets the layers that read one array read another. TensorRT then leaves out what made the first."""
    for layer in layers:
        for i, name in enumerate(inputs_of(layer)):
            if name == before.name:
                layer.set_input(i, after)
