"""Stages as graphs on disk. Each module turns one stage into one format: `<format>_from_stage`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lcm_compile.graphs import ExportedGraph
from lcm_compile.precisions import Precision

if TYPE_CHECKING:
    from lcm_compile.stages.stage import Stage

# What the graph's bytes depend on besides the stage, by format: it goes into the key.
EXPORTERS = {
    "onnx": ("torch", "diffusers", "transformers", "onnx", "onnxscript"),
    "torchscript": ("torch", "diffusers", "transformers"),
    "torch_export": ("torch", "diffusers", "transformers"),
}


def export_stage(stage: Stage, graph_format: str, precision: Precision, folder: Path) -> ExportedGraph:
    """Writes `folder/<stage>.<suffix>`. ValueError for a format that has no exporter."""
    if graph_format == "onnx":
        from lcm_compile.export.onnx_graph import onnx_from_stage

        return onnx_from_stage(stage, precision, folder)
    if graph_format == "torchscript":
        from lcm_compile.export.torchscript_graph import torchscript_from_stage

        return torchscript_from_stage(stage, precision, folder)
    if graph_format == "torch_export":
        from lcm_compile.export.torch_export_graph import torch_export_from_stage

        return torch_export_from_stage(stage, precision, folder)
    raise ValueError(f"no exporter for {graph_format!r}")


def export_twin(stage: Stage, graph: ExportedGraph) -> ExportedGraph:
    """The graph of the same module for other shapes, in a folder beside `graph` and on its very weights."""
    from lcm_compile.export.onnx_graph import onnx_twin

    return onnx_twin(stage, graph)
