"""Exports a stage to a program of torch.export: one .pt2 file with graph and weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from lcm_compile.export.signature import PlainSignature
from lcm_compile.graphs import ExportedGraph
from lcm_compile.precisions import Precision
from lcm_compile.stages.stage import Stage


def torch_export_from_stage(stage: Stage, precision: Precision, folder: Path) -> ExportedGraph:
    """Writes `folder/<stage>.pt2`, which plain `torch.export.load` opens.

    The program takes the contract's inputs in order. It is for the CPU, which is the stage's device; a
    backend that builds for a GPU moves it there.
    """
    module = PlainSignature(stage.module, len(stage.contract.inputs)).eval()
    path = folder / f"{stage.name}.pt2"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, stage.example_inputs()), path)
    return ExportedGraph(path, precision, stage.contract)
