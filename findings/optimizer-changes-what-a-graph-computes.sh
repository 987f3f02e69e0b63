#!/bin/sh
# onnxscript 0.7.2: optimize() changes the result of valid models, without a warning. Two Clips one after the other,
# or a Clip and a Relu, become one Clip with the larger minimum and the smaller maximum: if the ranges do not
# overlap the minimum is above the maximum, and the value comes from the wrong one of the two. And a MaxPool of
# constants with auto_pad SAME_LOWER is computed ahead, by onnx 1.23.2's reference evaluator, which returns a
# smaller picture than the operator has by its own formula.
#
# Seen with onnxruntime 1.31.1, before and after optimize():
#   Clip to -0.5…0.5, then Clip to 0.7…1: 0.7 to 0.5
#   Clip to -1…-0.5, then Relu: 0.0 to -0.5
#   MaxPool of a constant 7 × 9, 3 × 3 at every second place: 4 × 5 to 3 × 4
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export ORT_DISABLE_TELEMETRY=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile onnxscript==0.7.2 onnx-ir==1.1.0 onnx==1.23.2 \
    onnxruntime==1.31.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper
from onnxscript import optimizer

NODE = helper.make_node
onnxruntime.set_default_logger_severity(3)
values = {"a": -0.5, "b": 0.5, "c": 0.7, "d": 1, "e": -1, "f": -0.5, "picture": np.arange(63).reshape(1, 1, 7, 9)}
pool = NODE("MaxPool", ["picture"], ["t"], kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER")
CASES = {
    "Clip to -0.5…0.5, then Clip to 0.7…1": [
        NODE("Clip", ["x", "a", "b"], ["t"]), NODE("Clip", ["t", "c", "d"], ["y"]),
    ],
    "Clip to -1…-0.5, then Relu": [NODE("Clip", ["x", "e", "f"], ["t"]), NODE("Relu", ["t"], ["y"])],
    "MaxPool of a constant 7 × 9, 3 × 3 at every second place": [pool, NODE("Add", ["t", "x"], ["y"])],
}  # fmt: skip


def run(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros((1, 1, 1, 1), np.float32)})[0]


seen = []
for name, nodes in CASES.items():
    used = {read for node in nodes for read in node.input}
    constants = [numpy_helper.from_array(np.float32(values[key]), key) for key in values if key in used]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 1, 1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, None, None])
    graph = helper.make_graph(nodes, "graph", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model, full_check=True)
    before, after = run(model), run(optimizer.optimize(ModelProto.FromString(model.SerializeToString())))
    pooled = nodes[0].op_type == "MaxPool"
    shown = [f"{r.shape[2]} × {r.shape[3]}" if pooled else f"{r.item():.1f}" for r in (before, after)]
    print(f"{name}: {shown[0]} to {shown[1]}")
    seen.append(shown)
assert seen == [["0.7", "0.5"], ["0.0", "-0.5"], ["4 × 5", "3 × 4"]], seen
PYTHON
