"""ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_compile.engines.runner import Array, Runner, as_numpy
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.spec import ExportedGraph, StageContract, TensorSpec
from lcm_compile.targets import GpuTarget

GRAPH_FORMAT = "onnx"
PACKAGES = ("onnxruntime-gpu", "onnxruntime")
PROVIDER = "CPUExecutionProvider"


def cannot_build(target: GpuTarget, precision: str) -> str | None:
    if reason := cannot_run(target):
        return reason
    if precision == "bf16":
        return "its CPU provider has no bf16 kernels; use fp32, or --backend torchscript"
    return None


def cannot_run(target: GpuTarget) -> str | None:
    if not target.is_cpu:
        return "builds for the CPU only"
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; pip install onnxruntime"
    return None


def options(target: GpuTarget) -> Mapping[str, Any]:
    return {"provider": PROVIDER, "offline_optimisation": "extended"}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path) -> Path:
    """Writes the graph as ONNX Runtime's own optimiser leaves it, so that loading need not do that again.

    "Extended" fusions hold for any CPU; the layouts of one instruction set are chosen when it is loaded.
    """
    import onnxruntime as ort

    path = folder / f"{graph.contract.name}.onnx"
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session_options.optimized_model_filepath = str(path)
    if graph.weights.exists():
        session_options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", path.name + ".data"
        )
    open_session(graph.path, session_options)
    return path


def load(path: Path, contract: StageContract) -> Runner:
    import onnxruntime as ort

    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session = open_session(path, session_options)
    check_contract(path, "inputs", session.get_inputs(), contract.inputs)
    check_contract(path, "outputs", session.get_outputs(), contract.outputs)
    return OnnxRuntimeRunner(session, contract)


def check_contract(path: Path, side: str, found: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """BackendError unless the engine takes and gives arrays of the contract's shapes and types."""
    types = {"float32": "tensor(float)", "int64": "tensor(int64)"}
    has = [(list(x.shape), x.type) for x in found]
    needs = [(list(spec.shape), types.get(spec.dtype)) for spec in specs]
    if has != needs:
        raise BackendError(f"{path} has the {side} {has}; its contract says {needs}", REBUILD)


def open_session(path: Path, session_options: Any) -> Any:
    import onnxruntime as ort

    try:
        session = ort.InferenceSession(str(path), session_options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime's own exceptions share no base class but this
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't open {path}: {str(error).splitlines()[0]}",
            REBUILD,
        ) from error
    if session.get_providers()[0] != PROVIDER:
        raise BackendError(f"asked ONNX Runtime for {PROVIDER}, got {session.get_providers()[0]}")
    return session


class OnnxRuntimeRunner(Runner):
    def __init__(self, session: Any, contract: StageContract) -> None:
        super().__init__(contract)
        self._session = session

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {spec.name: as_numpy(inputs[spec.name]) for spec in self.contract.inputs}
        arrays = self._session.run(None, feeds)
        return {spec.name: array for spec, array in zip(self.contract.outputs, arrays, strict=True)}

    def close(self) -> None:
        self._session = None
