"""AOTInductor: torch's own compiler, which compiles ahead of time to machine code that torch loads.

The .pt2 file that it writes holds code and weights. The file can be moved, because it refers to no path, and
running it needs only torch's library. Code for a CPU uses the instruction set of the processor that compiled
it; code for a GPU is compiled on that GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lcm_compile.engines import other_version
from lcm_compile.engines.cuda_toolkit import missing_toolkit, toolkit_for_torch
from lcm_compile.engines.gpu import cannot_run_on_gpu, torch_cuda
from lcm_compile.engines.gpu_rewrites import split_group_norm, split_wide_attention
from lcm_compile.engines.runner import Array
from lcm_compile.engines.tensors import TensorRunner, fp32_of, prepare_torch
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.system.processor import instruction_set
from lcm_compile.targets import GpuTarget

GRAPH_FORMAT = "torch_export"
PACKAGES = ("torch",)
# Headers that are precompiled for the next build would leave hundreds of megabytes on the disk.
SETTINGS = {"aot_inductor.precompile_headers": False}


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    """Returns why this machine can't build an engine for the target in that precision, or None."""
    if precision.is_quantized:
        return f"it compiles no 8-bit products; use {precision.floats}"
    if reason := cannot_run(target):
        return reason if target.is_cpu else f"{reason}. It compiles only on the GPU that will run the engine"
    if not target.computes(precision):
        return f"{target.description} does not compute in {precision}"
    if shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        return f"it needs a C++ compiler, and {compiler} is not installed; apt install g++, or set CXX"
    return None if target.is_cpu else missing_for_gpus()


def missing_for_gpus() -> str | None:
    """Returns what torch's compiler lacks here for a GPU, apart from a C++ compiler, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton, which compiles for GPUs, is not installed; pip install triton"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "triton needs Python.h, which is not installed; apt install python3-dev"
    return missing_toolkit()


def cannot_run(target: GpuTarget) -> str | None:
    """Returns why this machine can't run engines for the target, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install torch"
    return None if target.is_cpu else cannot_run_on_gpu(target, torch_cuda())


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Returns why an engine can't be loaded here, or None.

    Another version of torch may lay out its tensors differently, and a processor that lacks one of the
    engine's instructions ends the process.
    """
    if reason := other_version(built_with, PACKAGES):
        return reason
    compiled_for = options.get("instruction_set")
    wanted = {str(name) for name in compiled_for} if isinstance(compiled_for, list) else set()
    missing = sorted(wanted - set(instruction_set()))
    if missing:
        return f"it was compiled for a processor with {', '.join(missing)}, which this one lacks"
    return None


def options(target: GpuTarget, *_: object) -> Mapping[str, Any]:
    """Returns the compiler's settings for the target, and this processor's instruction set."""
    return {**settings(target), "instruction_set": instruction_set()}


def settings(target: GpuTarget) -> dict[str, Any]:
    """Returns the settings of torch's compiler for the target.

    On a GPU the compiler computes convolutions in the channels-last layout. With `freezing` it converts their
    weights at compile time, without it at every call (`freezing` in torch/_inductor).
    Engines for CPUs keep the settings that they are tested with.
    """
    return SETTINGS if target.is_cpu else {**SETTINGS, "freezing": True}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path, *_: object) -> Path:
    """Compiles the graph to `folder/<stage>.pt2`. Raises BackendError if torch can't compile it."""
    import torch
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(graph.path)
    if not target.is_cpu:
        split_wide_attention(program, target)
        split_group_norm(program)
        program = move_to_device_pass(program, "cuda")
    path = folder / f"{graph.contract.name}.pt2"
    exactly = fp32_of(graph.precision, "cpu" if target.is_cpu else "cuda")
    with compiler_in(folder, target), exactly, torch.no_grad():  # `freezing` has no effect with gradients
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own use of torch
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(path), inductor_configs=dict(settings(target))
                )
        except OSError:
            raise
        except Exception as error:  # the compiler and its tools raise errors of unrelated classes
            raise BackendError(
                f"torch {torch.__version__} can't compile the {graph.contract.name} stage: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                "--backend auto chooses another; LCM_COMPILE_DEBUG=1 shows the compiler's full error",
            ) from error
    return path


@contextlib.contextmanager
def compiler_in(folder: Path, target: GpuTarget) -> Iterator[None]:
    """Gives torch's compiler an empty cache in `folder`, and deletes it afterwards.

    That way the compiler uses no stale results, and leaves no files behind. For a GPU it finds the toolkit.
    """
    from torch._inductor.utils import fresh_cache

    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".inductor-", dir=folder)))
        if not target.is_cpu:
            (scratch / "libraries").mkdir()
            stack.enter_context(toolkit_for_torch(scratch / "libraries"))
        stack.enter_context(fresh_cache(dir=str(scratch)))
        yield


def load(
    path: Path, contract: StageContract, target: GpuTarget, precision: Precision = Precision.FP32
) -> AotInductorRunner:
    """Loads an engine. Raises BackendError if torch can't open the file, or as prepare_torch does."""
    prepare_torch()
    return AotInductorRunner(path, contract, precision)


class AotInductorRunner(TensorRunner):
    """A compiled engine. Each call returns new tensors, and calls from several threads run one at a time."""

    def __init__(self, path: Path, contract: StageContract, precision: Precision = Precision.FP32) -> None:
        import torch

        self._turn = threading.Lock()
        # torch._inductor.aoti_load_package returns a wrapper of this class, but first compiles a C++ program
        # to compare the processor. That takes seconds, and needs a compiler, which a machine that only runs
        # engines may lack.
        # The argument True makes the model single-threaded. Otherwise each call waits on the host until the
        # GPU has finished the previous one, and can't be captured (github.com/pytorch/pytorch/pull/148601).
        try:
            self._model: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            # Torch unpacks the engine there, and looks at no other folder if the variable names a bad one.
            hint = (
                "set TMPDIR to a folder that can be written to"
                if "temporary directory" in reason
                else REBUILD
            )
            raise BackendError(f"torch {torch.__version__} can't open {path}: {reason}", hint) from error
        super().__init__(contract, self._model.get_metadata()["AOTI_DEVICE_KEY"])
        self._precision = precision

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        model = self.opened(self._model)
        with self._turn, torch.inference_mode(), fp32_of(self._precision, self.device):
            outputs = model.run([self.tensor(s, inputs[s.name]) for s in self.contract.inputs])
        return {s.name: output for s, output in zip(self.contract.outputs, outputs, strict=True)}

    def cannot_capture(self) -> str | None:
        """Returns None on a GPU: calls use torch's current stream, and memory that torch allocates."""
        return None if self.device == "cuda" else super().cannot_capture()

    def close(self) -> None:
        """Frees the model."""
        self._model = None
