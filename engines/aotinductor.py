"""AOTInductor: torch's own compiler, which compiles ahead of time to machine code that torch loads.

The .pt2 file that it writes holds code, and the .safetensors file beside it the weights. They can be moved,
because they refer to no path, and running them needs only torch's library. Code for a CPU uses the
instruction set of the processor that compiled it. Code for a GPU is compiled on that GPU, or without it with
some versions of torch: see absent_gpu.
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
from typing import TYPE_CHECKING, Any

from lcm_compile.engines import absent_gpu, other_version
from lcm_compile.engines.cuda_toolkit import missing_toolkit, toolkit_for_torch
from lcm_compile.engines.gpu import cannot_run_on_gpu, torch_cuda
from lcm_compile.engines.gpu_rewrites import (
    choose_attention,
    join_upsampling,
    lay_out_convolutions,
    split_group_norm,
    split_wide_attention,
)
from lcm_compile.engines.runner import Array
from lcm_compile.engines.tensors import TensorRunner, fp32_of, prepare_torch
from lcm_compile.engines.weights_file import read_weights, write_weights
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.system.child_process import call_in_child
from lcm_compile.system.processor import instruction_set
from lcm_compile.targets import GpuTarget

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

GRAPH_FORMAT = "torch_export"
PACKAGES = ("torch",)
WEIGHTS = ".safetensors"
SETTINGS = {
    # Headers that are precompiled for the next build would leave hundreds of megabytes on the disk.
    "aot_inductor.precompile_headers": False,
    # Weights are not in the package, which torch unpacks whenever it is loaded; the compiler returns them.
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    # Nor are small ones, which would be written into the code, so that the file beside it has them all.
    "always_keep_tensor_constants": True,
}
# More settings for a GPU that is not here.
WITHOUT_GPU = {
    # What is constant in a graph would be computed on the GPU.
    "joint_graph_constant_folding": False,
    # Kernels are compiled before the code that launches them is written, and by this process.
    "triton.autotune_at_compile_time": True,
    "compile_threads": 1,
    # torch's own launcher would load each kernel.
    "use_static_cuda_launcher": False,
}


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    """Returns why this machine can't build an engine for the target in that precision, or None."""
    if precision.product == "int8":
        return f"it compiles no 8-bit products in int8; use {precision.floats}, or fp8 where the GPU has it"
    if reason := cannot_run(target):
        if target.is_cpu or importlib.util.find_spec("torch") is None:
            return reason
        if why_not := absent_gpu.cannot_compile(target):
            return f"{reason}; {why_not}"
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
    """Returns the compiler's settings for the target, and the instruction set that an engine needs to run.

    If the target is a GPU that is not here, `without_gpu` is True, and the engines of GPUs with less memory
    may be others.
    """
    if target.is_cpu or cannot_run(target) is None:
        return {**SETTINGS, "instruction_set": instruction_set()}
    needed = [absent_gpu.MACHINE, *absent_gpu.HOST_FEATURES]
    known = {"instruction_set": needed, "without_gpu": True, "memory": target.memory_bytes}
    return {**SETTINGS, **WITHOUT_GPU, **known}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path, options: Mapping[str, Any]) -> Path:
    """Compiles the graph to `folder/<stage>.pt2`, and writes its weights beside that file.

    Raises BackendError if torch can't compile it.
    """
    if options.get("without_gpu"):
        return call_in_child(compile_without_gpu, graph, target, folder)
    return compile_graph(graph, target, folder)


def compile_without_gpu(graph: ExportedGraph, target: GpuTarget, folder: Path) -> Path:
    """Does as `build`, for a GPU that is not here. The process compiles for that GPU alone from then on."""
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"  # which torch's compiler takes for what the host can do
    absent_gpu.pretend(target)
    return compile_graph(graph, target, folder, without_gpu=True)


def compile_graph(graph: ExportedGraph, target: GpuTarget, folder: Path, without_gpu: bool = False) -> Path:
    """Does as `build`, in this process."""
    import torch
    from torch._inductor.package import package_aoti
    from torch.export.passes import move_to_device_pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(graph.path)
    name_constants(program)
    settings = {**SETTINGS, **(WITHOUT_GPU if without_gpu else {}), "aot_inductor.package": True}
    values: dict[str, torch.Tensor] = {}
    scope: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not target.is_cpu:
        split_wide_attention(program, target)
        split_group_norm(program)
        join_upsampling(program)
        lay_out_convolutions(program)
        if without_gpu:
            choose_attention(program, target)
            values, scope = absent_gpu.with_fake_weights(program)
        with scope:
            program = move_to_device_pass(program, "cuda:0" if without_gpu else "cuda")
    path = folder / f"{graph.contract.name}.pt2"
    exactly = fp32_of(graph.precision, "cpu" if target.is_cpu else "cuda")
    with compiler_in(folder, target), exactly, torch.no_grad():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of its own use of torch
                module, (inputs, _) = program.module(check_guards=False), program.example_inputs
                made: Any = torch._inductor.aot_compile(module, inputs, options=settings)
                package_aoti(str(path), [file for file in made if isinstance(file, str)])
        except OSError:
            raise
        except Exception as error:  # the compiler and its tools raise errors of unrelated classes
            raise BackendError(
                f"torch {torch.__version__} can't compile the {graph.contract.name} stage: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                "--backend auto chooses another; LCM_COMPILE_DEBUG=1 shows the compiler's full error",
            ) from error
    [weights] = [file for file in made if not isinstance(file, str)]
    write_weights(
        path.with_suffix(WEIGHTS), {name: values.get(name, weight) for name, (weight, _) in weights.items()}
    )
    return path


def name_constants(program: ExportedProgram) -> None:
    """Makes the constants of a program its buffers, because torch's compiler gives others new names."""
    from torch.export.graph_signature import InputKind

    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.CONSTANT_TENSOR:
            spec.kind, spec.persistent = InputKind.BUFFER, False


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


@contextlib.contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Lets cuDNN time its kernels for each convolution during a block, instead of guessing the fastest."""
    import torch

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class AotInductorRunner(TensorRunner):
    """A compiled engine. Each call returns new tensors, and calls from several threads run one at a time."""

    def __init__(self, path: Path, contract: StageContract, precision: Precision = Precision.FP32) -> None:
        import torch
        from safetensors import SafetensorError

        self._turn = threading.Lock()
        # torch._inductor.aoti_load_package returns a wrapper of this class, but first compiles a C++ program
        # to compare the processor. That takes seconds, and needs a compiler, which a machine that only runs
        # engines may lack.
        # The argument True makes the model single-threaded. Otherwise each call waits on the host until the
        # GPU has finished the previous one, and can't be captured (github.com/pytorch/pytorch/pull/148601).
        try:
            self._model: Any = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
            super().__init__(contract, self._model.get_metadata()["AOTI_DEVICE_KEY"])
            self._weights = read_weights(path.with_suffix(WEIGHTS), self.device)
            # Not for a later swap; all of them; and used where they are, which is why they are kept.
            self._model.load_constants(self._weights, False, True, True)
        except (RuntimeError, OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            # Torch unpacks the engine there, and looks at no other folder if the variable names a bad one.
            hint = (
                "set TMPDIR to a folder that can be written to"
                if "temporary directory" in reason
                else REBUILD
            )
            raise BackendError(f"torch {torch.__version__} can't open {path}: {reason}", hint) from error
        self._precision = precision
        self._is_new = True

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        model = self.opened(self._model)
        with self._turn, torch.inference_mode(), fp32_of(self._precision, self.device):
            # The first call is never captured, and cuDNN keeps what it finds for each convolution.
            with fastest_convolutions() if self._is_new else contextlib.nullcontext():
                outputs = model.run([self.tensor(s, inputs[s.name]) for s in self.contract.inputs])
            self._is_new = False
        return {s.name: output for s, output in zip(self.contract.outputs, outputs, strict=True)}

    def cannot_capture(self) -> str | None:
        """Returns None on a GPU: calls use torch's current stream, and memory that torch allocates."""
        return None if self.device == "cuda" else super().cannot_capture()

    def close(self) -> None:
        """Frees the model."""
        self._model = None
        self._weights = {}
