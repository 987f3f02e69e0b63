"""Stage → TorchScript, by tracing and freezing."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from lcm_compile.spec import ExportedGraph
from lcm_compile.stages import Stage


def torchscript_from_stage(stage: Stage, precision: str, folder: Path) -> ExportedGraph:
    """`folder/<stage>.pt`: loads with plain `torch.jit.load`, arguments in the contract's order."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(stage.module, stage.example_inputs(), check_trace=False)
        frozen = torch.jit.freeze(traced.eval())
        path = folder / f"{stage.name}.pt"
        torch.jit.save(frozen, str(path))
    return ExportedGraph(path, "torchscript", precision, stage.contract)
