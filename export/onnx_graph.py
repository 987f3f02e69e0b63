"""Stage → ONNX, by torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lcm_compile.spec import ExportedGraph
from lcm_compile.stages import Stage

# Opset 23 has Attention and GroupNormalization as single nodes: half the graph of opset 20, and what
# TensorRT fuses best.
OPSET = 23
# A protobuf ends at 2 GB; graphs near that keep their weights in a file beside them.
INLINE_LIMIT = 1_500_000_000


def onnx_from_stage(stage: Stage, precision: str, folder: Path) -> ExportedGraph:
    """`folder/<stage>.onnx`, with inputs and outputs named as in the contract and static shapes."""
    model = onnx_model(stage)
    path = folder / f"{stage.name}.onnx"
    size = sum(p.numel() * p.element_size() for p in stage.module.parameters())
    model.save(path, external_data=size > INLINE_LIMIT)
    return ExportedGraph(path, precision, stage.contract)


def onnx_twin(stage: Stage, graph: ExportedGraph) -> ExportedGraph:
    """`twin/<stage>.onnx` beside `graph`, for other shapes; large weights are read from that graph's file.

    ValueError where the two do not have the same weights.
    """
    import onnx_ir

    folder = graph.path.parent / "twin"
    folder.mkdir()
    model = onnx_model(stage)
    path = folder / graph.path.name
    if graph.weights.exists():
        (folder / graph.weights.name).hardlink_to(graph.weights)
        shared = onnx_ir.load(graph.path).graph.initializers
        for name, value in model.model.graph.initializers.items():
            stored = shared[name].const_value if name in shared else None
            if not isinstance(stored, onnx_ir.ExternalTensor):
                continue
            assert value.const_value is not None
            if (stored.dtype, stored.shape) != (value.const_value.dtype, value.const_value.shape):
                raise ValueError(f"{name} differs between {graph.path} and its twin")
            value.const_value = onnx_ir.ExternalTensor(
                stored.location,
                stored.offset,
                stored.length,
                stored.dtype,
                shape=stored.shape,
                name=name,
                base_dir=folder,
            )
    onnx_ir.save(model.model, path)
    return replace(graph, path=path, contract=stage.contract)


def onnx_model(stage: Stage) -> torch.onnx.ONNXProgram:
    """The graph in memory. Traces of the machine it was made on (paths in stack traces) are taken out."""
    contract = stage.contract
    # *args of a forward are one argument to torch.export: a plain signature gives one input each.
    module = PlainSignature(stage.module, len(contract.inputs))
    with quiet_exporter():
        program = torch.onnx.export(
            module,
            stage.example_inputs(),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in contract.inputs],
            output_names=output_names(stage),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    program.model.metadata_props.clear()
    return program


def output_names(stage: Stage) -> list[str]:
    """The contract's names; an output named as an input (a latent in, a latent out) gets `_out`."""
    inputs = {spec.name for spec in stage.contract.inputs}
    return [f"{s.name}_out" if s.name in inputs else s.name for s in stage.contract.outputs]


class PlainSignature(torch.nn.Module):
    """A module whose forward has exactly `count` positional parameters."""

    def __init__(self, module: torch.nn.Module, count: int) -> None:
        super().__init__()
        self.module = module
        names = ", ".join(f"x{i}" for i in range(count))
        scope: dict[str, object] = {}
        exec(f"def forward(self, {names}): return self.module({names})", scope)
        self.forward = scope["forward"].__get__(self)  # type: ignore[attr-defined,method-assign]


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter's progress prints and notices are not for stdout, which is data."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
