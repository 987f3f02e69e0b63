#!/bin/sh
# onnxscript 0.7.2: its version converter, given an onnx.ModelProto, rewrites the graph to the new opset and leaves
# the old opset's number on the model. The result is a graph of opset 20 that says it is of opset 18, and
# onnxruntime 1.31.1 refuses it where a name or an input has changed between the two, as with GridSample and DFT.
# Nothing is raised or logged by the conversion. Given the same model as onnxscript's own ir.Model, the number is
# set too.
#
# Seen, after convert_version(model, 20) from opset 18:
#   ModelProto, GridSample: opset 18, mode linear, onnxruntime: Fail
#   ModelProto, DFT: opset 18, 3 inputs, onnxruntime: InvalidGraph
#   ir.Model, GridSample: opset 20, mode linear, onnxruntime: the same result as before
#   ir.Model, DFT: opset 20, 3 inputs, onnxruntime: the same result as before
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
from onnx import ModelProto, TensorProto, checker, helper
from onnxscript import ir, version_converter

onnxruntime.set_default_logger_severity(4)
random = np.random.default_rng(0)
CASES = {
    "GridSample": ({"x": (1, 1, 4, 4), "grid": (1, 3, 3, 2)}, {"mode": "bilinear"}, (1, 1, 3, 3)),
    "DFT": ({"x": (1, 8, 2)}, {"axis": 1}, (1, 8, 2)),
}


def run(model, values):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, values)[0]


def as_proto(model):
    version_converter.convert_version(model, 20)
    return model


def as_ir(model):
    model = ir.from_proto(model)
    version_converter.convert_version(model, 20)
    return ir.to_proto(model)


seen = []
for way, convert in (("ModelProto", as_proto), ("ir.Model", as_ir)):
    for kind, (shapes, options, shape) in CASES.items():
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in shapes]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
        node = helper.make_node(kind, list(shapes), ["y"], **options)
        graph = helper.make_graph([node], "graph", inputs, [output])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        checker.check_model(model)
        values = {name: random.uniform(-1, 1, shape).astype(np.float32) for name, shape in shapes.items()}
        before = run(model, values)
        converted = convert(ModelProto.FromString(model.SerializeToString()))
        opset, node = converted.opset_import[0].version, converted.graph.node[-1]
        what = f"{len(node.input)} inputs"
        if kind == "GridSample":
            what = f"mode {helper.get_node_attr_value(node, 'mode').decode()}"
        try:
            same = np.allclose(run(converted, values), before, atol=1e-5)
            result = "the same result as before" if same else "another result"
        except Exception as error:
            result = type(error).__name__
        print(f"{way}, {kind}: opset {opset}, {what}, onnxruntime: {result}")
        seen.append((opset, result))
same = (20, "the same result as before")
assert seen == [(18, "Fail"), (18, "InvalidGraph"), same, same], seen
PYTHON
