#!/bin/sh
# onnx 1.23.2: in its reference evaluator the result of LRN (local response normalization) for a picture depends on
# how many other pictures are in the batch. It normalizes as many channels as there are pictures, and leaves the
# others divided by a constant: its loop over the channels has the length of the batch. onnxruntime 1.31.1 gives
# each picture the same result in any batch.
#
# Seen, channels of the first of 1, 2 and 4 pictures (of 4 channels each) that agree with the formula:
#   onnx reference: 1 of 4, 2 of 4, 4 of 4
#   onnxruntime: 4 of 4, 4 of 4, 4 of 4
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export ORT_DISABLE_TELEMETRY=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

node = helper.make_node("LRN", ["x"], ["y"], size=3, alpha=1.0, beta=0.75, bias=1.0)
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 4, 2, 2]) for name in "xy")
graph = helper.make_graph([node], "graph", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
checker.check_model(model, full_check=True)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
runs = {"onnx reference": ReferenceEvaluator(model).run, "onnxruntime": session.run}

pictures = np.random.default_rng(0).normal(size=(4, 4, 2, 2)).astype(np.float32)
first, formula = pictures[0], np.empty((4, 2, 2))
for channel in range(4):
    near = first[max(0, channel - 1) : channel + 2]
    formula[channel] = first[channel] / (1 + (near**2).sum(axis=0) / 3) ** 0.75
seen = {}
for name, run in runs.items():
    results = [run(None, {"x": pictures[:count]})[0][0] for count in (1, 2, 4)]
    seen[name] = [sum(np.allclose(r[c], formula[c], rtol=1e-4) for c in range(4)) for r in results]
    print(f"{name}: {', '.join(f'{agree} of 4' for agree in seen[name])}")
assert seen == {"onnx reference": [1, 2, 4], "onnxruntime": [4, 4, 4]}, seen
PYTHON
