"""Stage → ONNX, by torch.export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxscript import opset23

import lcm_compile.stages.quantize  # noqa: F401 - its operators
from lcm_compile.export.quiet import quiet_exporter
from lcm_compile.export.signature import PlainSignature
from lcm_compile.graphs import ExportedGraph
from lcm_compile.precisions import Precision
from lcm_compile.stages.stage import Stage

# Opset 23 has Attention and GroupNormalization as single nodes: half the graph of opset 20, and what
# TensorRT fuses best.
OPSET = 23
# A protobuf ends at 2 GB; graphs near that keep their weights in a file beside them.
INLINE_LIMIT = 1_500_000_000


def quantize_linear(x: Any, scale: Any, dtype: int) -> Any:
    return opset23.QuantizeLinear(x, scale, output_dtype=dtype)


def dequantize_linear(q: Any, scale: Any, axis: int) -> Any:
    return opset23.DequantizeLinear(q, scale, axis=axis)


# What the operators of quantized layers are in ONNX.
QUANTIZING: dict[Any, Any] = {
    torch.ops.lcm_compile.quantize.default: quantize_linear,
    torch.ops.lcm_compile.dequantize.default: dequantize_linear,
}


def onnx_from_stage(stage: Stage, precision: Precision, folder: Path) -> ExportedGraph:
    """`folder/<stage>.onnx`, with inputs and outputs named as in the contract and static shapes."""
    model = onnx_model(stage)
    path = folder / f"{stage.name}.onnx"
    weights = [*stage.module.parameters(), *stage.module.buffers()]
    size = sum(w.numel() * w.element_size() for w in weights)
    model.save(path, external_data=size > INLINE_LIMIT)
    return ExportedGraph(path, precision, stage.contract)


def onnx_twin(stage: Stage, graph: ExportedGraph) -> ExportedGraph:
    """`twin/<stage>.onnx` beside `graph`, for other shapes; what both hold is read from that graph's file."""
    import onnx_ir

    folder = graph.path.parent / "twin"
    folder.mkdir(exist_ok=True)
    model = onnx_model(stage).model
    path = folder / graph.path.name
    if graph.weights.exists():
        stored = onnx_ir.load(graph.path).graph.initializers
        for name, value in model.graph.initializers.items():
            tensor = stored[name].const_value if name in stored else None
            # Not everything is alike: constants that were folded from the shape are not.
            if isinstance(tensor, onnx_ir.ExternalTensor) and same(tensor, value.const_value):
                value.const_value = onnx_ir.ExternalTensor(
                    tensor.location,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=name,
                    base_dir=folder,
                )
        # Not before the weights were compared: onnx_ir reads no file of two names.
        (folder / graph.weights.name).hardlink_to(graph.weights)
    onnx_ir.save(model, path)
    return replace(graph, path=path, contract=stage.contract)


def same(one: Any, other: Any) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and np.array_equal(one.numpy(), other.numpy())


def onnx_model(stage: Stage) -> torch.onnx.ONNXProgram:
    """The graph in memory. Traces of the machine it was made on (paths in stack traces) are taken out."""
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
        # Before constants are folded, which would give each use of a weight a transposed copy of its own.
        CommonSubexpressionEliminationPass()(program.model)
        program.optimize()
    for node in program.model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    program.model.metadata_props.clear()
    return program


def output_names(stage: Stage) -> list[str]:
    """The contract's names; an output named as an input (a latent in, a latent out) gets `_out`."""
    inputs = {spec.name for spec in stage.contract.inputs}
    return [f"{s.name}_out" if s.name in inputs else s.name for s in stage.contract.outputs]
