"""ONNX Runtime's TensorRT provider: a TensorRT 10 engine in an ONNX file, built on the GPU that runs it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_compile.engines import onnxruntime as shared
from lcm_compile.engines import other_version
from lcm_compile.engines.gpu import cannot_run_on_gpu
from lcm_compile.engines.runner import Runner
from lcm_compile.errors import BackendError
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.targets import GpuTarget

GRAPH_FORMAT = "onnx"
PACKAGES = shared.PACKAGES
PROVIDER = "TensorrtExecutionProvider"
LIBRARIES = (*shared.CUDA_LIBRARIES, "libnvinfer.so.10", "libnvonnxparser.so.10")
INSTALL = f"{shared.INSTALL_CUDA} 'tensorrt<11'"


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    if precision.product == "fp8":
        return shared.NO_FP8
    if reason := cannot_run(target):
        return reason if target.is_cpu else f"{reason}. It builds only on the GPU that will run the engine"
    if not target.computes(precision):
        return f"{target.description} does not compute in {precision}"
    return None


def cannot_run(target: GpuTarget) -> str | None:
    if target.is_cpu:
        return "runs on NVIDIA GPUs only"
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; pip install onnxruntime-gpu"
    if reason := cannot_run_on_gpu(target, shared.linked_cuda()):
        return reason
    preload()
    return shared.cannot_open(PROVIDER, LIBRARIES, INSTALL)


def preload() -> None:
    """Loads TensorRT's libraries from where pip put them; in each process anew."""
    if importlib.util.find_spec("tensorrt") is not None:
        importlib.import_module("tensorrt")


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    return other_version(built_with, PACKAGES)


def options(target: GpuTarget) -> Mapping[str, Any]:
    return {"provider": PROVIDER, "embedded": True}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path) -> Path:
    """Writes the ONNX file with the engine in it that the provider leaves when a session is opened.

    BackendError for a graph whose weights lie beside it: no ONNX file can hold its engine.
    """
    if graph.path.with_name(graph.path.name + ".data").exists():
        raise BackendError(
            f"the {graph.contract.name} stage is too large for one ONNX file, which ends at 2 GB",
            "--backend tensorrt",
        )
    path = folder / f"{graph.contract.name}.onnx"
    settings = {
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_embed_mode": "1",
        "trt_ep_context_file_path": str(path),
        # TensorRT 10 takes the graph's types as hints: what is less than fp32 must be allowed as well.
        "trt_fp16_enable": str(int(graph.precision.floats == "fp16")),
        "trt_bf16_enable": str(int(graph.precision.floats == "bf16")),
        "trt_int8_enable": str(int(graph.precision.is_quantized)),
    }
    preload()
    shared.open_session(graph.path, shared.quiet_options(), [(PROVIDER, settings), shared.CUDA])
    if not path.is_file():
        raise BackendError(f"TensorRT can't build the whole {graph.contract.name} stage as one engine")
    return path


def load(path: Path, contract: StageContract, target: GpuTarget) -> Runner:
    preload()
    session = shared.open_checked(path, contract, [PROVIDER, shared.CUDA])
    return shared.BoundRunner(session, contract, "cuda")
