"""Exports a stage to TorchScript, by tracing and freezing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import torch

from lcm_compile.export.quiet import quiet_exporter
from lcm_compile.graphs import ExportedGraph
from lcm_compile.precisions import Precision
from lcm_compile.stages.stage import Stage

# Bytes: more than the code and constants of any traced stage take in addition to its weights.
CODE_SIZE = 16 << 20


def torchscript_from_stage(stage: Stage, precision: Precision, folder: Path) -> ExportedGraph:
    """Writes `folder/<stage>.pt`, which plain `torch.jit.load` opens.

    The module takes the contract's inputs in order. Raises OSError if the disk has no room for the file.
    """
    size = sum(p.numel() * p.element_size() for p in stage.module.parameters())
    # torch.jit.save ends the process when the disk is full, so the free space is checked first.
    if shutil.disk_usage(folder).free < size + CODE_SIZE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with quiet_exporter(), torch.no_grad():
        traced = torch.jit.trace(stage.module, stage.example_inputs(), check_trace=False)
        frozen = torch.jit.freeze(traced.eval())
        path = folder / f"{stage.name}.pt"
        torch.jit.save(frozen, str(path))
    return ExportedGraph(path, precision, stage.contract)
