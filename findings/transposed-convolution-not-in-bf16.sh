#!/bin/sh
# tensorrt-rtx 1.7.1.116: the builder makes engines of a convolution in fp32, fp16 and bf16, and of a transposed
# convolution in fp32 and fp16 alone. That of bf16 it takes into the network, gives its output a type, and then fails to
# infer that type in the build ("Could not infer output types for operation"). So a decoder that doubles its maps by
# transposed convolutions can't be built in bf16 as it is.
#
# Seen, the bytes of the engines (they vary):
#   float32 convolution 528012, transposed 535012
#   float16 convolution 396980, transposed 396828
#   bfloat16 convolution 396980, transposed not built
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile tensorrt-rtx==1.7.1.116 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import tensorrt_rtx as trt


def build(dtype, transposed):
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    network = builder.create_network(0)
    array = network.add_input("x", dtype, (1, 64, 16, 16))
    numbers = np.zeros((64, 64, 4, 4), np.float32 if dtype == trt.float32 else np.uint16)
    weights = trt.Weights(dtype, numbers.ctypes.data, numbers.size)
    add = network.add_deconvolution_nd if transposed else network.add_convolution_nd
    layer = add(array, 64, (4, 4), weights)
    layer.stride_nd, layer.padding_nd = (2, 2), (1, 1)
    assert layer.get_output(0).dtype == dtype
    network.mark_output(layer.get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    engine = builder.build_serialized_network(network, config)
    return None if engine is None else engine.nbytes


built = {}
for name in ("float32", "float16", "bfloat16"):
    one, other = (build(getattr(trt, name), transposed) for transposed in (False, True))
    print(f"{name} convolution {one or 'not built'}, transposed {other or 'not built'}")
    built[name] = one is not None, other is not None
assert built == {"float32": (True, True), "float16": (True, True), "bfloat16": (True, False)}, built
PYTHON
