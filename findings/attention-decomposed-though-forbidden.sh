#!/bin/sh
# tensorrt-rtx 1.7.1.116: `IAttention.decomposable = False` forbids attention without a kernel of its own. The builder
# refuses such attention if its inputs are the network's. If they are projections of one input, as in every
# transformer, it builds the engine and decomposes the attention all the same: the memory that the engine computes in
# has the scores, which are as many as the tokens squared. So a build that succeeds does not show that attention is
# fused; the memory, for two numbers of tokens, does.
#
# Seen, the memory for 1024 and 2048 tokens with 2 heads in fp32, whose scores are 8 and 34 MB:
#   inputs of the network: not built, not built
#   projections of one input: 18 MB, 70 MB
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile tensorrt-rtx==1.7.1.116 onnx==1.23.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import re

import numpy as np
import tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper

HEADS, WIDTH = 2, 64


class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []

    def log(self, severity, message):
        self.lines.append(message)


def array(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def network(tokens, projected):
    by_head = (1, HEADS, tokens, WIDTH)
    inputs, constants, nodes, names = [array(n, *by_head) for n in "qkv"], [], [], list("qkv")
    if projected:
        inputs, wide = [array("x", 1, tokens, HEADS * WIDTH)], HEADS * WIDTH
        constants = [numpy_helper.from_array(np.asarray([1, tokens, HEADS, WIDTH]), "shape")]
        for name in "qkv":
            weight = np.random.default_rng(0).standard_normal((wide, wide)).astype(np.float32)
            constants.append(numpy_helper.from_array(weight, f"{name}_weight"))
            nodes.append(helper.make_node("MatMul", ["x", f"{name}_weight"], [f"{name}_flat"]))
            nodes.append(helper.make_node("Reshape", [f"{name}_flat", "shape"], [f"{name}_split"]))
            nodes.append(helper.make_node("Transpose", [f"{name}_split"], [name], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Attention", names, ["y"]))
    graph = helper.make_graph(nodes, "graph", inputs, [array("y", *by_head)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]).SerializeToString()


def scratch(model):
    """The bytes of memory that the engine computes in, or None if it is not built."""
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse(model)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    [attention] = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    attention.__class__ = trt.IAttentionInputLayer
    attention.attention.decomposable = False
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if builder.build_serialized_network(network, config) is None:
        return None
    return max(int(size) for line in logger.lines for size in re.findall(r"Max Scratch Memory: (\d+)", line))


seen = {}
for name, projected in (("inputs of the network", False), ("projections of one input", True)):
    seen[name] = [scratch(network(tokens, projected)) for tokens in (1024, 2048)]
    told = ("not built" if size is None else f"{size / 1e6:.0f} MB" for size in seen[name])
    print(f"{name}: {', '.join(told)}")
assert seen["inputs of the network"] == [None, None], seen
few, many = seen["projections of one input"]
assert many > 3 * few, seen
PYTHON
