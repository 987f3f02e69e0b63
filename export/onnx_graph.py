"""Exports a stage to ONNX, by torch.export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import opset23

from lcm_compile.export.quiet import quiet_exporter
from lcm_compile.export.signature import PlainSignature
from lcm_compile.graphs import OUTPUT_SCALES, ExportedGraph
from lcm_compile.precisions import Precision
from lcm_compile.stages.quantize import QuantizedConv2d
from lcm_compile.stages.stage import Stage

# Opset 23 has Attention and GroupNormalization as single nodes. Its graphs are half as large as opset 20's,
# and TensorRT fuses such nodes best.
OPSET = 23
# Bytes of weights above which they are kept in a file next to the graph, which is read in place, and shared
# by a twin. A protobuf of 2 GB could not be written at all.
INLINE_LIMIT = 1 << 28
TRANSPOSED = ".T"  # after the name of a weight that is stored transposed


def quantize_linear(x: Any, scale: Any, dtype: int) -> Any:
    """Translates lcm_compile::quantize to ONNX; `dtype` is ONNX's number of the 8-bit type."""
    return opset23.QuantizeLinear(x, scale, output_dtype=dtype)


def dequantize_linear(q: Any, scale: Any, axis: int) -> Any:
    """Translates lcm_compile::dequantize to ONNX; a vector `scale` has one scale for each index of `axis`."""
    return opset23.DequantizeLinear(q, scale, axis=axis)


# The translations to ONNX of the operators that quantized layers use.
QUANTIZING: dict[Any, Any] = {
    torch.ops.lcm_compile.quantize.default: quantize_linear,
    torch.ops.lcm_compile.dequantize.default: dequantize_linear,
}


def onnx_from_stage(stage: Stage, precision: Precision, folder: Path) -> ExportedGraph:
    """Writes `folder/<stage>.onnx` with static shapes; inputs and outputs have the contract's names.

    An output whose name is also an input's gets the suffix `_out`. Weights of more than INLINE_LIMIT bytes
    are written to `<stage>.onnx.data`.
    """
    model = onnx_model(stage)
    path = folder / f"{stage.name}.onnx"
    weights = [*stage.module.parameters(), *stage.module.buffers()]
    size = sum(w.numel() * w.element_size() for w in weights)
    model.save(path, external_data=size > INLINE_LIMIT)
    return ExportedGraph(path, precision, stage.contract)


def onnx_twin(stage: Stage, graph: ExportedGraph) -> ExportedGraph:
    """Writes `twin/<stage>.onnx` next to `graph`, for the shapes of `stage`; see export_twin.

    If `graph` keeps its weights in a file of their own, the twin reads the weights that both have from there.
    """

    folder = graph.path.parent / "twin"
    folder.mkdir(exist_ok=True)
    model = onnx_model(stage).model
    path = folder / graph.path.name
    if graph.weights.exists():
        stored = onnx_ir.load(graph.path).graph.initializers
        weights = {f"module.{name}" for name, _ in stage.module.named_parameters()}
        for name, value in model.graph.initializers.items():
            tensor = stored[name].const_value if name in stored else None
            is_weight = name.removesuffix(TRANSPOSED) in weights
            # Constants that were folded from the shape differ between the two graphs.
            if isinstance(tensor, onnx_ir.ExternalTensor) and (
                is_weight or equal_tensors(tensor, value.const_value)
            ):
                value.const_value = onnx_ir.ExternalTensor(
                    tensor.location,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=name,
                    base_dir=folder,
                )
        # The link is made only after the weights are compared, because onnx_ir refuses to read a file that
        # has several hard links.
        (folder / graph.weights.name).hardlink_to(graph.weights)
    onnx_ir.save(model, path)
    return replace(graph, path=path, contract=stage.contract)


def equal_tensors(one: Any, other: Any) -> bool:
    """Returns whether two tensors have the same type, shape and values."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and np.array_equal(one.numpy(), other.numpy())


def onnx_model(stage: Stage) -> torch.onnx.ONNXProgram:
    """Exports a stage to a graph in memory, without metadata of this machine (paths in stack traces)."""
    contract = stage.contract
    module = PlainSignature(stage.module, len(contract.inputs))
    with quiet_exporter():
        program = torch.onnx.export(
            module,
            stage.example_inputs(),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in contract.inputs],
            output_names=output_names(stage),
            optimize=False,
            verbose=False,
            custom_translation_table=QUANTIZING,
        )
        assert program is not None
        # This comes before constants are folded: folding would give each use of a weight a transposed copy.
        CommonSubexpressionEliminationPass()(program.model)
        transpose_weights(program.model.graph)
        program.optimize()
    for node in program.model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    program.model.metadata_props.clear()
    note_output_scales(program.model.graph, module)
    return program


def transpose_weights(graph: Any) -> None:
    """Puts weights that are stored transposed in place of nodes that transpose weights.

    Each is transposed when it is written, so that memory does not hold both of all weights.
    """
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.shape) != 2:
            continue
        stored = onnx_ir.val(f"{weight.name}{TRANSPOSED}", const_value=transposed(weight.const_value))
        graph.register_initializer(stored)
        node.outputs[0].replace_all_uses_with(stored)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]


def transposed(weight: Any) -> onnx_ir.LazyTensor:
    """Returns the transposed matrix of a weight that torch holds, which is made when it is read."""
    raw = weight.raw
    return onnx_ir.LazyTensor(
        lambda: TorchTensor(raw.T.contiguous()),
        dtype=weight.dtype,
        shape=onnx_ir.Shape(raw.T.shape),
        name=f"{weight.name}{TRANSPOSED}",
    )


def note_output_scales(graph: Any, module: torch.nn.Module) -> None:
    """Notes at each convolution in 8 bits the scales of its output, as JSON; see QuantizedConv2d.

    These notes are no part of what the graph computes.
    """
    layers = {
        f"{name}.weight": layer.output_scales
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedConv2d) and layer.output_scales
    }
    for node in graph:
        made_from = node.inputs[1].producer() if node.op_type == "Conv" else None
        if made_from is not None and (scales := layers.get(made_from.inputs[0].name)):
            node.metadata_props[OUTPUT_SCALES] = json.dumps(scales)


def output_names(stage: Stage) -> list[str]:
    """Returns the outputs' names: the contract's, with `_out` added if an input (a latent) has the same."""
    inputs = {spec.name for spec in stage.contract.inputs}
    return [f"{s.name}_out" if s.name in inputs else s.name for s in stage.contract.outputs]
