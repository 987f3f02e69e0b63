#!/bin/sh
# onnx 1.23.2: its version converter, asked to bring a model with a linear Upsample (opset 9) or Resize (opset 10)
# to opset 13, gives a valid model that draws a shifted picture. From opset 11 on Resize counts positions from the
# middles of pixels unless told otherwise, and the converter does not tell it otherwise. Hardmax comes through as
# it was too, and now looks for the largest value of each row instead of the whole picture. Softmax, whose rule
# changed in the same way and at the same opset as Hardmax's, is rewritten correctly.
#
# Seen with onnxruntime 1.31.1, for rows of four values: the first row before and after
#   Upsample: [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0] to [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
#   Resize: [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0] to [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
#   Hardmax: [0.0, 0.0, 0.0, 0.0] to [0.0, 0.0, 0.0, 1.0]
#   Softmax: [0.0, 0.0, 0.0, 0.01] to [0.0, 0.0, 0.0, 0.01]
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
from onnx import TensorProto, checker, helper, numpy_helper, version_converter

picture = np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4)
twice = numpy_helper.from_array(np.array([1, 1, 1, 2], np.float32), "scales")
CASES = {
    "Upsample": (9, ["x", "scales"], [twice], {"mode": "linear"}),
    "Resize": (10, ["x", "scales"], [twice], {"mode": "linear"}),
    "Hardmax": (12, ["x"], [], {}),
    "Softmax": (12, ["x"], [], {}),
}


def run(model):
    checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": picture})[0]


changed = {}
for kind, (opset, inputs, constants, options) in CASES.items():
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, picture.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, None])
    graph = helper.make_graph([helper.make_node(kind, inputs, ["y"], **options)], "graph", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    before, after = run(model), run(version_converter.convert_version(model, 13))
    rows = [[round(float(value), 2) for value in result[0, 0, 0]] for result in (before, after)]
    print(f"{kind}: {rows[0]} to {rows[1]}")
    changed[kind] = not np.allclose(before, after, atol=1e-5)
assert changed == {"Upsample": True, "Resize": True, "Hardmax": True, "Softmax": False}, changed
PYTHON
