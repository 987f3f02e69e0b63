"""Rewrites programs of torch.export for GPUs: where torch's own kernel is slow, the same by other operations.

The results are equal up to rounding.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from lcm_compile.errors import BackendError
from lcm_compile.targets import GpuTarget

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

# The widest heads that FlashAttention computes. For wider ones torch takes its memory-efficient
# kernel, which is several times slower.
WIDEST = 256
# The widest heads that cuDNN computes, and the compute capabilities for which torch prefers cuDNN's kernel.
WIDEST_OF_CUDNN = 128
PREFER_CUDNN = ("9.0", "10.0")
# The most memory that scores and their softmax may take, as a share of the GPU's.
MOST_MEMORY = 1 / 8
# The least bytes of a map that no longer fits into most GPUs' L2 cache.
LARGE = 32 << 20


def split_wide_attention(program: ExportedProgram, target: GpuTarget) -> int:
    """Replaces attention with wide heads by two products and a softmax, in place. Returns how many there are.

    The heads of the VAE are 512 wide. The scores (heads, queries, keys) take memory: where the target has too
    little for so many, attention is left as it is. In bf16 it is so too, because scores would be too coarse:
    they took attention from 55 to 36 dB, and in fp16 from 73 to 54.
    """
    import torch

    attention = torch.ops.aten.scaled_dot_product_attention.default
    found = [node for node in nodes_of(program, attention) if is_wide(node, target)]
    for node in found:
        replace(node, wide_attention(program.graph_module.graph, node))
    return len(found)


def is_wide(node: Node, target: GpuTarget) -> bool:
    """Returns whether wide_attention is for attention of this kind and width, and has room for its scores."""
    import torch

    query, key, value = (array.meta["val"] for array in node.args[:3])  # type: ignore[union-attr]
    if query.dtype == torch.bfloat16:
        return False
    # A mask, dropout, causal attention and grouped heads are what the other arguments ask for.
    if len(node.args) > 3 or set(node.kwargs) - {"scale"} or query.shape[:-2] != key.shape[:-2]:
        return False
    scores = math.prod(query.shape[:-1]) * key.shape[-2] * query.element_size()
    room = scores * 2 <= MOST_MEMORY * (target.memory_bytes or 0)
    return room and max(query.shape[-1], value.shape[-1]) > WIDEST


def wide_attention(graph: Any, node: Node) -> Node:
    """Adds products before a node of attention, whose arrays are (…, tokens, width), and returns the last.

    The scale is a factor of the transposed key. So scores stay within fp16. If it were the query's, torch's
    compiler would make one attention of the products again (_sfdp_pattern_13 in torch/_inductor).
    """
    import torch

    aten, add = torch.ops.aten, Adding(graph, node)
    query, key, value = (
        add(aten.reshape.default, array, [-1, *value_of(array).shape[-2:]]) for array in node.args[:3]
    )
    scale = node.kwargs.get("scale") or value_of(query).shape[-1] ** -0.5
    scaled = add(aten.mul.Tensor, add(aten.transpose.int, key, 1, 2), scale)
    weights = add(aten.softmax.int, add(aten.bmm.default, query, scaled), -1)
    return add(aten.reshape.default, add(aten.bmm.default, weights, value), list(value_of(node).shape))


def split_group_norm(program: ExportedProgram) -> int:
    """Replaces group normalisation of large maps by one that starts with each channel, in place.

    Returns how many there are. Torch's compiler adds up a group channel by channel, but on a GPU the channels
    of a pixel are neighbours in memory: it reads a few of each 32 bytes that come, several times. The mean
    and variance of each channel read them as they lie, and those of a group follow from them.
    """
    import torch

    found = [node for node in nodes_of(program, torch.ops.aten.group_norm.default) if is_large(node)]
    for node in found:
        replace(node, group_norm_by_channel(program.graph_module.graph, node))
    return len(found)


def is_large(node: Node) -> bool:
    """Returns whether a group normalisation is one of large maps (b, c, h, w), with a weight and a bias."""
    value = value_of(node)
    affine = len(node.args) > 3 and node.args[2] is not None and node.args[3] is not None
    return affine and value.dim() == 4 and math.prod(value.shape) * value.element_size() >= LARGE


def group_norm_by_channel(graph: Any, node: Node) -> Node:
    """Adds the operations before a node of group normalisation, and returns the last. They compute in fp32.

    A group's variance is the mean of its channels' variances and of the squares of their means' distances
    from the group's.
    """
    import torch

    aten, add = torch.ops.aten, Adding(graph, node)
    x, groups, weight, bias, *rest = node.args
    eps = rest[0] if rest else 1e-5
    batch, channels = value_of(node).shape[:2]

    def floats(array: Any) -> Any:
        return add(aten.to.dtype, array, torch.float32)

    def by_group(array: Any) -> Any:
        return add(aten.reshape.default, array, [batch, groups, -1])

    def by_channel(array: Any) -> Any:
        spread = add(aten.expand.default, array, [batch, groups, channels // groups])
        return add(aten.reshape.default, spread, [batch, channels])

    both = add(aten.var_mean.correction, floats(x), [2, 3], correction=0)
    variances, means = (by_group(add.item(both, i)) for i in range(2))
    mean = add(aten.mean.dim, means, [2], True)
    distance = add(aten.sub.Tensor, means, mean)
    spread = add(aten.add.Tensor, variances, add(aten.mul.Tensor, distance, distance))
    deviation = add(aten.rsqrt.default, add(aten.add.Tensor, add(aten.mean.dim, spread, [2], True), eps))
    factor = add(aten.mul.Tensor, by_channel(deviation), floats(weight))
    shift = add(aten.sub.Tensor, floats(bias), add(aten.mul.Tensor, by_channel(mean), factor))
    factor, shift = (add(aten.reshape.default, array, [batch, channels, 1, 1]) for array in (factor, shift))
    result = add(aten.add.Tensor, add(aten.mul.Tensor, x, factor), shift)
    return add(aten.to.dtype, result, value_of(node).dtype)


def join_upsampling(program: ExportedProgram) -> int:
    """Replaces the four convolutions that double a map by one transposed convolution, in place.

    Returns how many there are. Upsampling in stages/rewrites.py is the four. Their weights are those of the
    one, in another order: no number changes. A GPU then writes neither four padded maps nor four parts of the
    result: SDXL's decoder moves 15.7 GB instead of 19.2.
    """
    import torch

    shuffles = nodes_of(program, torch.ops.aten.pixel_shuffle.default)
    found = [(node, four) for node in shuffles if (four := corners(node))]
    for node, four in found:
        replace(node, doubling(program.graph_module.graph, node, four))
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return len(found)


def corners(node: Any) -> list[Any] | None:
    """Returns the four 2×2 convolutions of one map whose results a pixel_shuffle interleaves, or None."""
    import torch

    aten = torch.ops.aten
    joined = node.args[0]
    stacked: Any = joined.args[0] if called(joined, aten.reshape.default, aten.view.default) else None
    if node.args[1] != 2 or not called(stacked, aten.stack.default) or stacked.args[1:] != (2,):
        return None
    four = list(stacked.args[0])
    pads = [four_th.args[0] for four_th in four if called(four_th, aten.conv2d.default)]
    if len(pads) != 4 or not all(called(pad, aten.pad.default) for pad in pads):
        return None
    # Of the left, the right, the top and the bottom of the map: see Upsampling.
    expected = [[1 - i % 2, i % 2, 1 - i // 2, i // 2] for i in range(4)]
    same = len({pad.args[0] for pad in pads}) == 1 and len({one.args[2:] for one in four}) == 1
    plain = all(len(one.args) <= 3 and not one.kwargs for one in four)
    zeros = all(len(pad.args) == 2 and not pad.kwargs for pad in pads)
    kernels = all(value_of(one.args[1]).shape[2:] == (2, 2) for one in four)
    return four if same and plain and zeros and kernels and [p.args[1] for p in pads] == expected else None


def called(node: Any, *functions: Any) -> bool:
    """Returns whether a node is a call of one of these functions."""
    return getattr(node, "target", None) in functions


def doubling(graph: Any, node: Node, four: list[Any]) -> Node:
    """Adds a transposed convolution of stride 2 before a node, and returns it.

    Row 2i of its result is K₃·x(i−1) + K₁·x(i), and row 2i + 1 is K₂·x(i) + K₀·x(i+1), for the rows K of its
    4×4 weights (c, c', 4, 4). So are its columns.
    """
    import torch

    aten, add = torch.ops.aten, Adding(graph, node)
    x = four[0].args[0].args[0]
    bias = four[0].args[2] if len(four[0].args) > 2 else None
    outputs, inputs = value_of(four[0].args[1]).shape[:2]
    weights = add(aten.stack.default, [one.args[1] for one in four])
    weights = add(aten.reshape.default, weights, [2, 2, outputs, inputs, 2, 2])
    weights = add(aten.permute.default, weights, [3, 2, 4, 0, 5, 1])
    weights = add(aten.reshape.default, weights, [inputs, outputs, 4, 4])
    weights = add(aten.flip.default, weights, [2, 3])
    return add(aten.conv_transpose2d.input, x, weights, bias, [2, 2], [1, 1])


def choose_attention(program: ExportedProgram, target: GpuTarget) -> None:
    """Replaces each attention by the kernel that torch would take on the target, in place.

    torch chooses by asking the GPU, so where there is none it must be told. Raises BackendError for attention
    of a kind that our models have not.
    """
    import torch

    for node in nodes_of(program, torch.ops.aten.scaled_dot_product_attention.default):
        replace(node, chosen_attention(program.graph_module.graph, node, target))


def chosen_attention(graph: Any, node: Node, target: GpuTarget) -> Node:
    """Adds attention by a certain kernel before a node of attention (…, tokens, width), and returns the last.

    cuDNN's and FlashAttention's kernels are for half precision, and no mask. Masks are those of the text
    encoders: their scores are few, so they are computed by products, in fp32 as the kernels do inside. The
    other kernels take widths that are multiples of 8, to which zeros are added.
    """
    import torch

    aten, add = torch.ops.aten, Adding(graph, node)
    if set(node.kwargs) - {"scale"} or len(node.args) > 4:
        raise BackendError(f"torch's attention with {', '.join(node.kwargs)} is for a GPU that is here")
    query, key, value = node.args[:3]
    dtype, width = value_of(query).dtype, value_of(query).shape[-1]
    scale = node.kwargs.get("scale") or width**-0.5
    if len(node.args) == 4:
        query, key, value = (add(aten.to.dtype, array, torch.float32) for array in (query, key, value))
        transposed = add(aten.transpose.int, add(aten.mul.Tensor, key, scale), -2, -1)
        scores = add(aten.matmul.default, query, transposed)
        if value_of(mask := node.args[3]).dtype == torch.bool:
            scores = add(aten.masked_fill.Scalar, scores, add(aten.logical_not.default, mask), float("-inf"))
        else:
            scores = add(aten.add.Tensor, scores, mask)
        result = add(aten.matmul.default, add(aten.softmax.int, scores, -1), value)
        return add(aten.to.dtype, result, dtype)
    padding = -width % 8
    if padding:
        query, key, value = (add(aten.constant_pad_nd.default, a, [0, padding]) for a in (query, key, value))
    half = dtype in (torch.float16, torch.bfloat16)
    if half and width + padding <= WIDEST_OF_CUDNN and target.compute_capability in PREFER_CUDNN:
        kernel = aten._scaled_dot_product_cudnn_attention.default
        several = add(kernel, query, key, value, None, False, scale=scale)
    elif half and width + padding <= WIDEST:
        several = add(aten._scaled_dot_product_flash_attention.default, query, key, value, scale=scale)
    else:
        kernel = aten._scaled_dot_product_efficient_attention.default
        several = add(kernel, query, key, value, None, False, scale=scale)
    result = add.item(several, 0)
    return add(aten.slice.Tensor, result, -1, 0, width) if padding else result


def lay_out_convolutions(program: ExportedProgram) -> None:
    """Stores the weights of convolutions with their channels last, in place.

    On a GPU torch's compiler computes convolutions in this layout, and would convert weights at every call.
    """
    import torch

    for name, weight in program.state_dict.items():
        if weight.dim() == 4:
            laid_out = weight.detach().to(memory_format=torch.channels_last)
            program.state_dict[name] = torch.nn.Parameter(laid_out, requires_grad=False)


class Adding:
    """Adds calls to a graph before a node, with what they give for the program's fake arrays."""

    def __init__(self, graph: Any, node: Node) -> None:
        self._graph, self._node = graph, node

    def __call__(self, function: Any, *arguments: Any, **options: Any) -> Any:
        with self._graph.inserting_before(self._node):
            new = self._graph.call_function(function, arguments, options)
        new.meta["val"] = function(*map(value_of, arguments), **options)
        return new

    def item(self, several: Node, index: int) -> Any:
        """Returns one of the arrays that a call gives."""
        return self(operator.getitem, several, index)


def value_of(argument: Any) -> Any:
    """Returns the fake array of a node, those of a list of nodes, and any other argument as it is."""
    if isinstance(argument, list):
        return [value_of(one) for one in argument]
    return argument.meta["val"] if hasattr(argument, "meta") else argument


def nodes_of(program: ExportedProgram, function: Any) -> list[Node]:
    """Returns the calls of a function in a program."""
    return [node for node in program.graph_module.graph.nodes if node.target is function]


def replace(node: Node, result: Node) -> None:
    """Puts the result of other calls in a node's place."""
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    assert node.graph.owning_module is not None
    node.graph.owning_module.recompile()
