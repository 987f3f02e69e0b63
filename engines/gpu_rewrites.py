"""Rewrites programs of torch.export for GPUs: where torch's own kernel is slow, the same by other operations.

The results are equal up to rounding.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from lcm_compile.targets import GpuTarget

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

# The widest heads that FlashAttention and cuDNN compute. For wider ones torch takes its memory-efficient
# kernel, which is several times slower.
WIDEST = 256
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
    """Returns the fake array of a node, and any other argument as it is."""
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
