"""ONNX Runtime: its CPU provider, and on a GPU its CUDA provider; `onnxruntime_tensorrt` shares it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.engines.gpu import cannot_run_on_gpu
from lcm_compile.engines.runner import Array, Runner, as_numpy
from lcm_compile.engines.tensors import TensorRunner
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.system.processor import threads
from lcm_compile.targets import GpuTarget

if TYPE_CHECKING:
    import torch

GRAPH_FORMAT = "onnx"
PACKAGES = ("onnxruntime-gpu", "onnxruntime")
# A provider's name, alone or with its options.
Provider = str | tuple[str, dict[str, Any]]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Ids of CUDA graphs, as run options name them.
GRAPH, NO_GRAPH = "1", "-1"
# What the CUDA provider is linked with; {} is the CUDA version that onnxruntime was built for.
CUDA_LIBRARIES = ("libcudart.so.{}", "libcublasLt.so.{}", "libcurand.so.10", "libcudnn.so.9")
INSTALL_CUDA = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
# What may not be computed on the processor in a session on a GPU. Little things are there, such as ArgMax of
# token ids; but in 1.24 Attention was as well (github.com/microsoft/onnxruntime/issues/28025).
HEAVY = {"Attention", "Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MultiHeadAttention"}
# Its providers round to fp8, and then multiply in fp16.
NO_FP8 = "it multiplies in no fp8; in int8 and fp16 it does"


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    if precision.product == "fp8":
        return NO_FP8
    if reason := cannot_run(target):
        return reason if target.is_cpu else f"{reason}. It optimises a graph only on the GPU that will run it"
    if target.is_cpu and precision.floats == "bf16":
        return "its CPU provider has no bf16 kernels; use fp32, or --backend torchscript"
    if not target.computes(precision):
        return f"{target.description} does not compute in {precision}"
    return None


def cannot_run(target: GpuTarget) -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; pip install onnxruntime"
    if target.is_cpu:
        return None
    return cannot_run_on_gpu(target, linked_cuda()) or cannot_open(CUDA, CUDA_LIBRARIES, INSTALL_CUDA)


def linked_cuda() -> int | None:
    """The major version of CUDA that the installed ONNX Runtime is for, if it is for any."""
    import onnxruntime as ort

    version = ort.cuda_version.partition(".")[0]
    return int(version) if version else None


def cannot_open(provider: str, libraries: Sequence[str], install: str) -> str | None:
    """Why the installed ONNX Runtime has no such provider, or which of its libraries is missing.

    ONNX Runtime itself would only log that, and compute on the CPU.
    """
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        return f"this onnxruntime was built without {provider}; pip install onnxruntime-gpu"
    preload()
    for name in libraries:
        library = name.format(ort.cuda_version.partition(".")[0])
        try:
            ctypes.CDLL(library)
        except OSError:
            return f"onnxruntime's {provider} needs {library}, which is not here; {install}"
    return None


def preload() -> None:
    """Loads CUDA's libraries that pip installed, which are on no path; in each process anew."""
    import onnxruntime as ort

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Its files open in any version that knows their operators; opening them tells."""
    return None


def options(target: GpuTarget) -> Mapping[str, Any]:
    return {"provider": CPU if target.is_cpu else CUDA, "offline_optimisation": "extended"}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path) -> Path:
    """Writes the graph as ONNX Runtime's own optimiser leaves it, so that loading need not do that again.

    "Extended" fusions hold for any CPU; the layouts of one instruction set are chosen when it is loaded.
    """
    import onnxruntime as ort

    path = folder / f"{graph.contract.name}.onnx"
    session_options = quiet_options()
    session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session_options.optimized_model_filepath = str(path)
    if graph.weights.exists():
        session_options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", path.name + ".data"
        )
    open_session(graph.path, session_options, [CPU if target.is_cpu else CUDA])
    return path


def load(path: Path, contract: StageContract, target: GpuTarget) -> Runner:
    if target.is_cpu:
        return OnnxRuntimeRunner(open_checked(path, contract, [CPU]), contract)
    import torch

    stream = torch.cuda.Stream()  # not torch's default one, whose address 0 stands for none
    settings = {"user_compute_stream": str(stream.cuda_stream)}
    cannot_graph = ""
    try:
        session = open_checked(path, contract, [(CUDA, {**settings, "enable_cuda_graph": "1"})])
    except BackendError as error:  # it refuses graphs of which not every node computes on the GPU
        cannot_graph = error.message
        session = open_checked(path, contract, [(CUDA, settings)])
    return BoundRunner(session, contract, "cuda", stream, cannot_graph)


def quiet_options() -> Any:
    import onnxruntime as ort

    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    return session_options


def check_contract(path: Path, side: str, found: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """BackendError unless the engine takes and gives arrays of the contract's shapes and types."""
    types = {"float32": "tensor(float)", "int64": "tensor(int64)", "uint8": "tensor(uint8)"}
    has = [(list(x.shape), x.type) for x in found]
    needs = [(list(spec.shape), types.get(spec.dtype)) for spec in specs]
    if has != needs:
        raise BackendError(f"{path} has the {side} {has}; its contract says {needs}", REBUILD)


def waiting_options() -> Any:
    """Options of sessions whose threads sleep until there is work, instead of spinning for it.

    Each stage has threads of its own: those of one stage would take the cores from the next. The demo's
    pictures took 1.4 times as long so on two cores, and varied twice as much.
    """
    session_options = quiet_options()
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session_options.intra_op_num_threads = threads()
    return session_options


def open_checked(path: Path, contract: StageContract, providers: Sequence[Provider]) -> Any:
    session = open_session(path, waiting_options(), providers)
    check_contract(path, "inputs", session.get_inputs(), contract.inputs)
    check_contract(path, "outputs", session.get_outputs(), contract.outputs)
    return session


def open_session(path: Path, session_options: Any, providers: Sequence[Provider]) -> Any:
    """A session on the first of `providers`; BackendError where ONNX Runtime takes another instead."""
    import onnxruntime as ort

    asked = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if asked != CPU:
        preload()
        session_options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = ort.InferenceSession(str(path), session_options, providers=list(providers))
    except Exception as error:  # onnxruntime's own exceptions share no base class but this
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't open {path}: {str(error).splitlines()[0]}",
            REBUILD,
        ) from error
    if (got := session.get_providers()[0]) != asked:
        raise BackendError(f"asked ONNX Runtime for {asked}, got {got}", "lcm-compile doctor")
    if asked != CPU and (left := heavy_on_processor(session)):
        raise BackendError(
            f"ONNX Runtime {ort.__version__} does not compute all of {path} on the GPU: {left}",
            "pip install --upgrade onnxruntime-gpu, or another --backend",
        )
    return session


def heavy_on_processor(session: Any) -> str:
    """What a session on a GPU leaves to the processor and should not, in words, or nothing."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return "it is too old to tell, and has no CUDA kernel of Attention"
    parts = [p for p in session.get_provider_graph_assignment_info() if p.ep_name == CPU]
    left = {node.op_type for part in parts for node in part.get_nodes()} & HEAVY
    return f"{', '.join(sorted(left))} is left to the processor" if left else ""


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


class BoundRunner(TensorRunner):
    """A session whose inputs and outputs are bound where they lie: on a GPU, nothing is copied to the host.

    Its outputs are the same tensors at every call. `stream` is the one that the session was opened to compute
    on; without, it has its own, and each call waits until the GPU is done.

    ONNX Runtime can't be captured from outside (github.com/microsoft/onnxruntime/pull/32081), but a session
    opened with `enable_cuda_graph` captures itself in runs that name a graph. Then its inputs must stay where
    they are, so they are copied there; in other runs they are read where they lie. Versions before
    github.com/microsoft/onnxruntime/pull/28686 also wait for the GPU after each launch. `cannot_graph`: why
    the session was opened without.
    """

    def __init__(
        self,
        session: Any,
        contract: StageContract,
        device: str,
        stream: torch.cuda.Stream | None = None,
        cannot_graph: str = "it was opened without CUDA graphs",
    ) -> None:
        super().__init__(contract, device)
        self._session = session
        self._stream = stream
        self._cannot_graph = cannot_graph
        self._options = run_options(stream, "" if cannot_graph else NO_GRAPH)
        self._graphed = False
        self._fixed: list[torch.Tensor] = []  # where its CUDA graph reads its inputs, once there is one
        self._binding = session.io_binding()
        self._outputs = self.empty(contract.outputs)
        for found, spec in zip(session.get_outputs(), contract.outputs, strict=True):
            address = self._outputs[spec.name].data_ptr()
            self._binding.bind_output(found.name, device, 0, np.dtype(spec.dtype), spec.shape, address)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        held = [self.tensor(spec, inputs[spec.name]) for spec in self.contract.inputs]
        if self._graphed:
            for own, tensor in zip(self._fixed, held, strict=True):
                own.copy_(tensor)
            held = self._fixed
        for spec, tensor in zip(self.contract.inputs, held, strict=True):
            address = tensor.data_ptr()
            self._binding.bind_input(spec.name, self.device, 0, np.dtype(spec.dtype), spec.shape, address)
        with self.beside(self._stream):
            self._session.run_with_iobinding(self._binding, self._options)
        return dict(self._outputs)

    def cannot_capture(self) -> str | None:
        if self.device != "cuda":
            return super().cannot_capture()
        return "ONNX Runtime can't be captured from outside"

    def graph_itself(self, on: bool) -> str | None:
        if on and not self._fixed and not self._cannot_graph:
            self._cannot_graph = self._capture()
        if self._cannot_graph:
            return self._cannot_graph
        self._use_graph(on)
        return None

    def _use_graph(self, on: bool) -> None:
        self._graphed = on
        self._options = run_options(self._stream, GRAPH if on else NO_GRAPH)

    def _capture(self) -> str:
        """Captures. Why its graph can't be used, or nothing: it must compute what is computed without."""
        self._fixed = list(self.empty(self.contract.inputs).values())
        zeros, ones = (
            {s.name: self.to_device(np.full(s.shape, value, s.dtype)) for s in self.contract.inputs}
            for value in (0, 1)
        )
        expected = [self.to_host(array + 0) for array in self(zeros).values()]
        self(ones)  # so that nothing is left where the graph's outputs will be
        self._use_graph(True)
        try:
            actual = [self.to_host(array) for array in self(zeros).values()]
        except Exception as error:  # onnxruntime's own exceptions share no base class but this
            return f"ONNX Runtime can't capture {self.contract.name}: {str(error).splitlines()[0]}"
        finally:
            self._use_graph(False)
        if not all(map(alike, expected, actual)):
            return f"ONNX Runtime's CUDA graph of {self.contract.name} computes something else"
        return ""

    def close(self) -> None:
        self._session = self._binding = None
        self._outputs, self._fixed = {}, []


def alike(expected: np.ndarray, actual: np.ndarray) -> bool:
    """Whether they differ by rounding alone, of kernels that add in any order."""
    ours, theirs = (np.nan_to_num(array.astype(np.float32)) for array in (expected, actual))
    return bool(np.abs(ours - theirs).mean() <= 0.01 * np.abs(ours).mean())


def run_options(stream: Any, graph: str) -> Any:
    """Without waiting for a stream that is ours. `graph` is an id, or nothing where the session has none."""
    import onnxruntime as ort

    options = ort.RunOptions()
    if stream is not None:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if graph:
        options.add_run_config_entry("gpu_graph_id", graph)
    return options
