"""Exports stages to graphs on disk. Each module writes one format: `<format>_from_stage`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lcm_compile.graphs import ExportedGraph
from lcm_compile.precisions import Precision

if TYPE_CHECKING:
    from lcm_compile.stages.stage import Stage

# The packages whose versions a graph's bytes depend on, for each format. These versions are part of the key.
EXPORTERS = {
    "onnx": ("torch", "diffusers", "transformers", "onnx", "onnxscript"),
    "torchscript": ("torch", "diffusers", "transformers"),
    "torch_export": ("torch", "diffusers", "transformers"),
}

# The 8-bit products that a graph of each format can hold.
EIGHT_BIT_PRODUCTS = {"onnx": ("int8", "fp8"), "torchscript": (), "torch_export": ("fp8",)}


def export_stage(stage: Stage, graph_format: str, precision: Precision, folder: Path) -> ExportedGraph:
    """Writes a stage's graph to `folder/<stage>.<suffix>`. Raises ValueError for an unknown format."""
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
    """Exports the twin of `graph`: an ONNX graph of the same module and the same weights, for other shapes.

    `stage` is the stage for these shapes. The twin is in a folder next to `graph`, and shares its weights
    file if it has one.
    """
    from lcm_compile.export.onnx_graph import onnx_twin

    return onnx_twin(stage, graph)
