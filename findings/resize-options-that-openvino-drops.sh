#!/bin/sh
# openvino 2026.4.1: three options of ONNX's Resize (opset 18) are dropped without a warning when it reads a model:
# antialias, exclude_outside and keep_aspect_ratio_policy. The last one changes even the size of the result.
# onnxruntime 1.31.1 follows them.
#
# antialias does arrive in openvino's own graph, but its CPU device does not look at it in the modes that ONNX has.
#
# Seen, the first value or the size of a 4 × 4 picture made smaller, without the option and with it:
#   linear, antialias=1: onnxruntime 2.50 to 3.12, openvino 2.50 to 2.50
#   cubic, antialias=1: onnxruntime 2.03 to 2.45, openvino 2.03 to 2.03
#   cubic, exclude_outside=1: onnxruntime 2.03 to 1.86, openvino 2.03 to 2.03
#   nearest, keep_aspect_ratio_policy=not_larger: onnxruntime 2 × 3 to 2 × 2, openvino 2 × 3 to 2 × 3
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
from onnx import TensorProto, checker, helper, numpy_helper

picture, core = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4), openvino.Core()


def resized(size, **options):
    node = helper.make_node("Resize", ["x", "", "", "size"], ["y"], **options)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, None, None])
    size = numpy_helper.from_array(np.array([1, 1, *size], np.int64), "size")
    model = helper.make_model(
        helper.make_graph([node], "graph", [x], [y], [size]),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=8,
    )  # fmt: skip
    checker.check_model(model)
    data = model.SerializeToString()
    theirs = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": picture})[0]
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    return {
        "onnxruntime": theirs,
        "openvino": core.compile_model(core.read_model(data, b""), "CPU", precision)(picture)[0],
    }


def shown(result, size):
    return f"{result.shape[2]} × {result.shape[3]}" if size == (2, 3) else f"{result.flat[0]:.2f}"


CASES = [
    ("linear", "antialias", 1, (2, 2)), ("cubic", "antialias", 1, (2, 2)), ("cubic", "exclude_outside", 1, (2, 2)),
    ("nearest", "keep_aspect_ratio_policy", "not_larger", (2, 3)),
]  # fmt: skip
for mode, option, value, size in CASES:
    without, given = resized(size, mode=mode), resized(size, mode=mode, **{option: value})
    changes = [f"{name} {shown(without[name], size)} to {shown(given[name], size)}" for name in given]
    print(f"{mode}, {option}={value}: {', '.join(changes)}")
    assert not np.array_equal(without["onnxruntime"], given["onnxruntime"])
    assert np.array_equal(without["openvino"], given["openvino"]), given
PYTHON
