#!/bin/sh
# onnx 1.23.2, onnxruntime 1.31.1 and openvino 2026.4.1: a valid model with one Softmax of opset 11 and no axis, on
# an input of four dimensions, has three different results, without a warning. Up to opset 12 Softmax flattens all
# dimensions after the first and normalizes over them; onnxruntime does. onnx's own reference evaluator takes the
# rule of opset 13 (the last dimension), and openvino normalizes over the second dimension alone.
#
# Seen, the smallest group of values that adds up to 1 in the result for an input of shape 1 × 2 × 2 × 3:
#   onnxruntime: all 12
#   onnx reference: 3, along the last dimension
#   openvino: 2, along the second dimension
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export ORT_DISABLE_TELEMETRY=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile onnx==1.23.2 onnxruntime==1.31.1 openvino==2026.4.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime, openvino
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 2, 3]) for name in "xy")
graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"])], "graph", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
checker.check_model(model, full_check=True)
data, values = model.SerializeToString(), np.random.default_rng(0).normal(size=(1, 2, 2, 3)).astype(np.float32)
core = openvino.Core()
results = {
    "onnxruntime": onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": values})[0],
    "onnx reference": ReferenceEvaluator(model).run(None, {"x": values})[0],
    "openvino": core.compile_model(core.read_model(data, b""), "CPU")(values)[0],
}
groups = {(1, 2, 3): "all 12", 3: "3, along the last dimension", 1: "2, along the second dimension"}
seen = {}
for name, result in results.items():
    seen[name] = next(axes for axes in reversed(groups) if np.allclose(result.sum(axis=axes), 1, atol=1e-3))
    print(f"{name}: {groups[seen[name]]}")
    own = np.exp(values) / np.exp(values).sum(axis=seen[name], keepdims=True)
    assert np.allclose(result, own, atol=1e-3), result
assert seen == {"onnxruntime": (1, 2, 3), "onnx reference": 3, "openvino": 1}, seen
PYTHON
