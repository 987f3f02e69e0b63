"""ONNX Runtime's TensorRT provider: a TensorRT 10 engine in an ONNX file, built on the GPU that runs it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
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
TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
# Bytes of weights of an engine that fits with them into one ONNX file, which can hold 2 GB.
MOST_WEIGHTS = 1_500_000_000
INSTALL = f"{shared.INSTALL_CUDA} 'tensorrt<11'"


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    """Returns why this machine can't build an engine for the target in that precision, or None."""
    if precision.product == "fp8":
        return shared.NO_FP8
    if reason := cannot_run(target):
        return reason if target.is_cpu else f"{reason}. It builds only on the GPU that will run the engine"
    if not target.computes(precision):
        return f"{target.description} does not compute in {precision}"
    return None


def cannot_run(target: GpuTarget) -> str | None:
    """Returns why this machine can't run engines for the target, or None."""
    if target.is_cpu:
        return "runs on NVIDIA GPUs only"
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; pip install onnxruntime-gpu"
    if reason := cannot_run_on_gpu(target, shared.linked_cuda()):
        return reason
    preload()
    return shared.cannot_open(PROVIDER, LIBRARIES, INSTALL)


def preload() -> None:
    """Loads the TensorRT libraries that pip installed outside the library path. Every process needs this."""
    if importlib.util.find_spec("tensorrt") is not None:
        importlib.import_module("tensorrt")


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Returns why an engine can't be loaded here, or None. Only the version that built it can load it."""
    return other_version(built_with, PACKAGES)


def options(target: GpuTarget, *_: object) -> Mapping[str, Any]:
    """Returns the provider, and that `build` embeds the engine in the ONNX file."""
    return {"provider": PROVIDER, "embedded": True}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path, *_: object) -> Path:
    """Writes an ONNX file that contains the engine. The provider builds both when a session is opened.

    Raises BackendError in two cases: the weights are so large that the engine would be too large for one ONNX
    file; or TensorRT can't build the complete stage as one engine.
    """
    if graph.weights.exists() and graph.weights.stat().st_size > MOST_WEIGHTS:
        raise BackendError(
            f"the {graph.contract.name} stage is too large for one ONNX file, which can hold 2 GB",
            "--backend tensorrt",
        )
    path = folder / f"{graph.contract.name}.onnx"
    settings = {
        "trt_dump_ep_context_model": "1",
        "trt_ep_context_embed_mode": "1",
        "trt_ep_context_file_path": str(path),
        # TensorRT 10 treats the graph's types as hints, so a type smaller than fp32 must be enabled as well.
        "trt_fp16_enable": str(int(graph.precision.floats == "fp16")),
        "trt_bf16_enable": str(int(graph.precision.floats == "bf16")),
        "trt_int8_enable": str(int(graph.precision.is_quantized)),
    }
    preload()
    with tf32_forbidden() if graph.precision.floats == "fp32" else contextlib.nullcontext():
        shared.open_session(graph.path, shared.quiet_options(), [(PROVIDER, settings), shared.CUDA])
    if not path.is_file():
        raise BackendError(f"TensorRT can't build the complete {graph.contract.name} stage as one engine")
    return path


@contextlib.contextmanager
def tf32_forbidden() -> Iterator[None]:
    """Keeps TensorRT from building kernels that round fp32 to TF32 during a block.

    ONNX Runtime has no option of this provider for it, so this is NVIDIA's variable for all its libraries.
    """
    before = os.environ.get(TF32_OVERRIDE)
    os.environ[TF32_OVERRIDE] = "0"
    try:
        yield
    finally:
        del os.environ[TF32_OVERRIDE]
        if before is not None:
            os.environ[TF32_OVERRIDE] = before


def load(
    path: Path, contract: StageContract, target: GpuTarget, precision: Precision = Precision.FP32
) -> Runner:
    """Loads an engine. Raises BackendError as onnxruntime.load does."""
    preload()
    session = shared.open_checked(path, contract, [PROVIDER, shared.CUDA])
    return shared.BoundRunner(session, contract, "cuda")
