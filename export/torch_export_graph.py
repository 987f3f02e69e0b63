"""Stage → torch.export's program: one .pt2 file of graph and weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from lcm_compile.export.signature import PlainSignature
from lcm_compile.graphs import ExportedGraph
from lcm_compile.precisions import Precision
from lcm_compile.stages.stage import Stage


def torch_export_from_stage(stage: Stage, precision: Precision, folder: Path) -> ExportedGraph:
    """`folder/<stage>.pt2`: opens with plain `torch.export.load`, arguments in the contract's order.

    The program is of the device that the stage is on, a CPU; a builder for another one moves it.
    """
    module = PlainSignature(stage.module, len(stage.contract.inputs)).eval()
    path = folder / f"{stage.name}.pt2"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, stage.example_inputs()), path)
    return ExportedGraph(path, precision, stage.contract)
