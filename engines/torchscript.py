"""TorchScript on the CPU: the engine is the graph's own file, which plain `torch.jit.load` opens."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_compile.engines.runner import Array, Runner, as_numpy
from lcm_compile.engines.tensors import prepare_torch
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.targets import GpuTarget

GRAPH_FORMAT = "torchscript"
PACKAGES = ("torch",)


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    """Returns why this machine can't build an engine for the target in that precision, or None."""
    return cannot_run(target) or ("it has no 8-bit products" if precision.is_quantized else None)


def cannot_run(target: GpuTarget) -> str | None:
    """Returns why this machine can't run engines for the target, or None."""
    if not target.is_cpu:
        return "builds for the CPU only"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install torch"
    return None


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Returns None: any version that knows the file's operators opens it, and `load` raises otherwise."""
    return None


def options(target: GpuTarget, *_: object) -> Mapping[str, Any]:
    """Returns how the graph was made: frozen, with its weights as constants."""
    return {"frozen": True}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path, *_: object) -> Path:
    """Copies the graph's file into `folder`, and returns the path of the copy."""
    path = folder / graph.path.name
    shutil.copyfile(graph.path, path)
    return path


def load(
    path: Path, contract: StageContract, target: GpuTarget, precision: Precision = Precision.FP32
) -> Runner:
    """Loads an engine. Raises BackendError if torch can't open the file, or as prepare_torch does."""
    import torch

    prepare_torch()
    try:
        return TorchScriptRunner(torch.jit.load(str(path), map_location="cpu"), contract)
    except RuntimeError as error:
        raise BackendError(
            f"torch {torch.__version__} can't open {path}: {str(error).splitlines()[0]}",
            REBUILD,
        ) from error


class TorchScriptRunner(Runner):
    """A TorchScript module on the CPU. Each call returns new NumPy arrays."""

    def __init__(self, module: Any, contract: StageContract) -> None:
        super().__init__(contract)
        self._module = module

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        arguments = [torch.from_dlpack(as_numpy(inputs[spec.name])) for spec in self.contract.inputs]
        with torch.inference_mode():
            outputs = self.opened(self._module)(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {s.name: o.numpy() for s, o in zip(self.contract.outputs, outputs, strict=True)}

    def close(self) -> None:
        """Frees the module."""
        self._module = None
