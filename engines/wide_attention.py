"""Attention with heads so wide that torch has no fast kernel for it on a GPU: that of the VAE, 512 wide."""

from __future__ import annotations

import math
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


def split_wide_attention(program: ExportedProgram, target: GpuTarget) -> int:
    """Replaces attention with wide heads by two products and a softmax, in place. Returns how many there are.

    The result is the same up to rounding. The scores (heads, queries, keys) take memory. Where the target has
    too little for so many, attention is left as it is.
    """
    import torch

    attention = torch.ops.aten.scaled_dot_product_attention.default
    graph = program.graph_module.graph
    found = [node for node in graph.nodes if node.target is attention and fits(node, target)]
    for node in found:
        split(graph, node)
    program.graph_module.recompile()
    return len(found)


def fits(node: Node, target: GpuTarget) -> bool:
    """Returns whether attention is of a kind that `split` computes, its heads are wide, and there is room."""
    query, key, value = (array.meta["val"] for array in node.args[:3])  # type: ignore[union-attr]
    # A mask, dropout, causal attention and grouped heads are what the other arguments ask for.
    if len(node.args) > 3 or set(node.kwargs) - {"scale"} or query.shape[:-2] != key.shape[:-2]:
        return False
    scores = math.prod(query.shape[:-1]) * key.shape[-2] * query.element_size()
    room = scores * 2 <= MOST_MEMORY * (target.memory_bytes or 0)
    return room and max(query.shape[-1], value.shape[-1]) > WIDEST


def split(graph: Any, node: Node) -> None:
    """Replaces one node, whose arrays are (…, tokens, width).

    The scale is a factor of the transposed key. So scores stay within fp16. If it were the query's, torch's
    compiler would make one attention of the products again (_sfdp_pattern_13 in torch/_inductor).
    """
    import torch

    aten = torch.ops.aten
    query, key, value = node.args[:3]

    def add(target: Any, *arguments: Any) -> Any:
        new = graph.call_function(target, arguments)
        given = [a.meta["val"] if hasattr(a, "meta") else a for a in arguments]
        new.meta["val"] = target(*given)  # on the fake arrays of the program
        return new

    def joined(array: Any) -> Any:
        shape = array.meta["val"].shape
        return add(aten.reshape.default, array, [math.prod(shape[:-2]), *shape[-2:]])

    width, shape = query.meta["val"].shape[-1], node.meta["val"].shape  # type: ignore[union-attr]
    with graph.inserting_before(node):
        transposed = add(aten.transpose.int, joined(key), 1, 2)
        scaled = add(aten.mul.Tensor, transposed, node.kwargs.get("scale") or width**-0.5)
        scores = add(aten.bmm.default, joined(query), scaled)
        weights = add(aten.softmax.int, scores, -1)
        result = add(aten.reshape.default, add(aten.bmm.default, weights, joined(value)), list(shape))
    node.replace_all_uses_with(result)
    graph.erase_node(node)
