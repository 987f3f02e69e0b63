"""AOTInductor: torch's own compiler, ahead of time, into machine code that torch loads.

The .pt2 that comes out holds code and weights; it depends on no path, and running it takes torch's
library alone. On a CPU the code is for this very instruction set; for a GPU it is compiled on that GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lcm_compile.engines import other_version
from lcm_compile.engines.gpu import cannot_run_on_gpu, torch_cuda
from lcm_compile.engines.runner import Array
from lcm_compile.engines.tensors import TensorRunner
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.system.processor import instruction_set
from lcm_compile.targets import GpuTarget

GRAPH_FORMAT = "torch_export"
PACKAGES = ("torch",)
# Headers precompiled for the next build would stay behind, hundreds of megabytes of them.
SETTINGS = {"aot_inductor.precompile_headers": False}


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    if precision.is_quantized:
        return f"it compiles no 8-bit products; it computes in {precision.floats}"
    if reason := cannot_run(target):
        return reason if target.is_cpu else f"{reason}. It compiles only on the GPU that will run the engine"
    if not target.computes(precision):
        return f"{target.description} does not compute in {precision}"
    if shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        return f"it needs a C++ compiler, and {compiler} is not installed; apt install g++, or set CXX"
    return None if target.is_cpu else missing_for_gpus()


def missing_for_gpus() -> str | None:
    """Which of the things is not here that torch's compiler needs for a GPU, besides a C++ compiler."""
    if importlib.util.find_spec("triton") is None:
        return "triton, which compiles for GPUs, is not installed; pip install triton"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "triton needs Python.h, which is not here; apt install python3-dev"
    from torch.utils.cpp_extension import CUDA_HOME

    # What its C++ code includes, and pip's packages for running have not.
    headers = [Path(CUDA_HOME or "", "include", name) for name in ("cuda.h", "cuda_runtime.h")]
    if CUDA_HOME is None or not all(path.is_file() for path in headers):
        return (
            f"it needs {' and '.join(path.name for path in headers)} of CUDA's toolkit, and finds "
            f"no such in {CUDA_HOME or 'any usual place'}; install the toolkit, or set CUDA_HOME"
        )
    return None


def cannot_run(target: GpuTarget) -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install torch"
    return None if target.is_cpu else cannot_run_on_gpu(target, torch_cuda())


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Another version of torch may lay out its tensors otherwise; a missing instruction ends the process."""
    if reason := other_version(built_with, PACKAGES):
        return reason
    compiled_for = options.get("instruction_set")
    wanted = {str(name) for name in compiled_for} if isinstance(compiled_for, list) else set()
    missing = sorted(wanted - set(instruction_set()))
    if missing:
        return f"it was compiled for a processor with {', '.join(missing)}, which this one has not"
    return None


def options(target: GpuTarget) -> Mapping[str, Any]:
    return {**settings(target), "instruction_set": instruction_set()}


def settings(target: GpuTarget) -> dict[str, Any]:
    """What torch's compiler is told.

    On a GPU it lays out convolutions channels last: frozen, their weights are laid out so when it compiles,
    and else at every call (`freezing` in torch/_inductor). Engines for CPUs stay as they are tested.
    """
    return SETTINGS if target.is_cpu else {**SETTINGS, "freezing": True}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path) -> Path:
    import torch
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(graph.path)
    if not target.is_cpu:
        from torch.utils.cpp_extension import CUDA_HOME

        # Found by itself or not, the linker is given libcuda's stub only where this names the toolkit.
        os.environ.setdefault("CUDA_HOME", str(CUDA_HOME))
        program = move_to_device_pass(program, "cuda")
    path = folder / f"{graph.contract.name}.pt2"
    with compiler_in(folder), torch.no_grad():  # with gradients it freezes nothing
        try:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=dict(settings(target))
            )
        except OSError:
            raise
        except Exception as error:  # torch's compiler, and what it calls, share no base class but this
            raise BackendError(
                f"torch {torch.__version__} can't compile the {graph.contract.name} stage: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                "--backend auto chooses another; LCM_COMPILE_DEBUG=1 shows all that the compiler said",
            ) from error
    return path


@contextlib.contextmanager
def compiler_in(folder: Path) -> Iterator[None]:
    """Gives torch's compiler a cache of its own, gone afterwards: nothing stale, nothing left behind."""
    from torch._inductor.utils import fresh_cache

    with tempfile.TemporaryDirectory(prefix=".inductor-", dir=folder) as scratch, fresh_cache(dir=scratch):
        yield


def load(path: Path, contract: StageContract, target: GpuTarget) -> AotInductorRunner:
    return AotInductorRunner(path, contract)


class AotInductorRunner(TensorRunner):
    """Each call's outputs are new arrays. Calls from several threads take turns."""

    def __init__(self, path: Path, contract: StageContract) -> None:
        import torch

        self._turn = threading.Lock()
        # What torch._inductor.aoti_load_package returns wraps this class. That function also compiles a
        # C++ program to compare the processor: seconds, and a compiler that need not be where engines run.
        # Single-threaded, as otherwise each call waits on the host until the GPU has done the one before, and
        # can't be captured (github.com/pytorch/pytorch/pull/148601).
        try:
            self._model: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
        except RuntimeError as error:
            raise BackendError(
                f"torch {torch.__version__} can't open {path}: {str(error).splitlines()[0]}", REBUILD
            ) from error
        super().__init__(contract, self._model.get_metadata()["AOTI_DEVICE_KEY"])

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        with self._turn, torch.inference_mode():
            outputs = self._model.run([self.tensor(s, inputs[s.name]) for s in self.contract.inputs])
        return {s.name: output for s, output in zip(self.contract.outputs, outputs, strict=True)}

    def cannot_capture(self) -> str | None:
        """It enqueues on torch's current stream, and takes its memory from torch."""
        return None if self.device == "cuda" else super().cannot_capture()

    def close(self) -> None:
        self._model = None
