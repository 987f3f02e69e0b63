"""TensorRT for RTX: engines for a named GPU, built on any machine, even one without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_compile.engines import other_version
from lcm_compile.engines import tensorrt as shared
from lcm_compile.engines.gpu import gpu_here
from lcm_compile.engines.runner import Runner
from lcm_compile.engines.tensorrt_caches import KernelCache, kernels_path
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.targets import RTX, GpuTarget

GRAPH_FORMAT = "onnx"
PACKAGES = ("tensorrt-rtx",)
INSTALL = "pip install 'lcm-compile[rtx]'"
# The compute capabilities that it builds for.
CAPABILITIES = RTX.capabilities
WITHOUT_FP32 = ("7.5",)  # its builder refuses fp32 products there: "FP32 GEMM is not supported"


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    """Returns why this machine can't build an engine for the target in that precision, or None."""
    if target.is_cpu:
        return "builds for NVIDIA GPUs only"
    if not set(target.capabilities) <= set(CAPABILITIES):
        return (
            f"it builds for compute capabilities {', '.join(CAPABILITIES)}; "
            f"{target.description} is {', '.join(target.capabilities)}"
        )
    if not target.computes(precision):
        return f"{target.description} does not compute in {precision}"
    if set(target.capabilities) <= set(WITHOUT_FP32) and precision.floats == "fp32":
        return f"it has no fp32 products for compute capability {', '.join(WITHOUT_FP32)}; use fp16"
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return f"tensorrt_rtx is not installed; {INSTALL}"
    return None


def cannot_run(target: GpuTarget) -> str | None:
    """Returns why this machine can't run engines for the target, or None."""
    return shared.cannot_run_with("tensorrt_rtx", INSTALL, target)


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Returns why an engine can't be loaded here, or None. Only the version that built it can load it."""
    return other_version(built_with, PACKAGES)


def options(target: GpuTarget, *_: object) -> Mapping[str, Any]:
    """Returns the builder options that `build` sets."""
    return {
        "strongly_typed": True,
        "optimization_level": shared.OPTIMIZATION_LEVEL,
        "tf32": shared.TF32,
        "user_allocation": True,
        "compute_capabilities": [*target.capabilities],
    }


def build(graph: ExportedGraph, target: GpuTarget, folder: Path, options: Mapping[str, Any]) -> Path:
    """Builds `folder/<stage>.engine`, which runs on GPUs of each compute capability that the options have.

    Raises BackendError as tensorrt.build_with does, and if TensorRT for RTX refuses the compute capability.
    """
    trt = importlib.import_module("tensorrt_rtx")

    def configure(config: Any) -> None:
        # Without this the engine may allocate memory while it runs, and then it can't be captured.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        names = ["SM" + capability.replace(".", "") for capability in options["compute_capabilities"]]
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            # The setter returns False instead of raising. Without a capability, the build would make a
            # different engine.
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), i):
                raise BackendError(f"tensorrt_rtx {trt.__version__} refuses compute capability {name}")

    return shared.build_with(trt, graph, folder, configure)


def load(
    path: Path, contract: StageContract, target: GpuTarget, precision: Precision = Precision.FP32
) -> Runner:
    """Loads an engine. Raises BackendError as check_header and tensorrt.TensorRtRunner do."""
    trt = importlib.import_module("tensorrt_rtx")

    check_header(trt, path)

    def open_kernels(config: Any) -> KernelCache:
        here = gpu_here()
        assert here is not None, "an engine is loaded, so there is a GPU"
        return KernelCache(config, kernels_path(trt, path, here[0]))

    return shared.TensorRtRunner(trt, path, contract, open_kernels)


def check_header(trt: Any, path: Path) -> None:
    """Raises BackendError if the engine's header shows that it can't be loaded here.

    This reads only the header, not the complete file.
    """
    logger, _ = shared.make_logger(trt)
    runtime = trt.Runtime(logger)
    with path.open("rb") as file:
        _, found = runtime.get_engine_validity(file.read(runtime.engine_header_size))
    kinds = trt.EngineInvalidityDiagnostics.__members__.items()
    reasons = ", ".join(name.lower().replace("_", " ") for name, kind in kinds if found & int(kind))
    if reasons:
        raise BackendError(f"tensorrt_rtx {trt.__version__} can't load {path}: {reasons}", REBUILD)
