"""TorchScript on the CPU: the engine is the graph itself, and plain `torch.jit.load` opens it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_compile.engines.runner import Array, Runner, as_numpy
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.targets import GpuTarget

GRAPH_FORMAT = "torchscript"
PACKAGES = ("torch",)


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    return cannot_run(target) or ("it has no 8-bit products" if precision.is_quantized else None)


def cannot_run(target: GpuTarget) -> str | None:
    if not target.is_cpu:
        return "builds for the CPU only"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install torch"
    return None


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Its files open in any version that knows their operators; opening them tells."""
    return None


def options(target: GpuTarget) -> Mapping[str, Any]:
    return {"frozen": True}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path) -> Path:
    path = folder / graph.path.name
    shutil.copyfile(graph.path, path)
    return path


def load(path: Path, contract: StageContract, target: GpuTarget) -> Runner:
    import torch

    try:
        return TorchScriptRunner(torch.jit.load(str(path), map_location="cpu"), contract)
    except RuntimeError as error:
        raise BackendError(
            f"torch {torch.__version__} can't open {path}: {str(error).splitlines()[0]}",
            REBUILD,
        ) from error


class TorchScriptRunner(Runner):
    def __init__(self, module: Any, contract: StageContract) -> None:
        super().__init__(contract)
        self._module = module

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        arguments = [torch.from_dlpack(as_numpy(inputs[spec.name])) for spec in self.contract.inputs]
        with torch.inference_mode():
            outputs = self._module(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {s.name: o.numpy() for s, o in zip(self.contract.outputs, outputs, strict=True)}

    def close(self) -> None:
        self._module = None
