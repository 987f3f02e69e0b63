"""ONNX Runtime with its CPU provider, or with its CUDA provider on a GPU.

`onnxruntime_tensorrt` shares the functions and the runner of this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import io
import threading
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
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
# Values of the run option gpu_graph_id.
GRAPH = "1"  # the id of a session's only CUDA graph
NO_GRAPH = "-1"  # run without a CUDA graph
# Convolutions with channels last, as GroupNorm has them, and no memory beyond what is asked for.
CUDA_SETTINGS = {"prefer_nhwc": "1", "arena_extend_strategy": "kSameAsRequested"}
# The libraries that the CUDA provider is linked with; {} is the major CUDA version of the onnxruntime build.
CUDA_LIBRARIES = ("libcudart.so.{}", "libcublasLt.so.{}", "libcurand.so.10", "libcudnn.so.9")
INSTALL_CUDA = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
# Operators that a session on a GPU may not leave to the processor. ONNX Runtime leaves small ones there, such
# as ArgMax of token ids, but 1.24 also left Attention (github.com/microsoft/onnxruntime/issues/28025).
HEAVY = {"Attention", "Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MultiHeadAttention"}
# The code of the forms that graphs have. A build may start from an export that is older than it.
FORMS = Path(__file__).with_name("onnxruntime_forms.py")
# The providers round values to fp8, but then multiply them in fp16.
NO_FP8 = "it does not multiply in fp8; use int8 or fp16"


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    """Returns why this machine can't build an engine for the target in that precision, or None."""
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
    """Returns why this machine can't run engines for the target, or None."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed; pip install onnxruntime"
    if target.is_cpu:
        return None
    return cannot_run_on_gpu(target, linked_cuda()) or cannot_open(CUDA, CUDA_LIBRARIES, INSTALL_CUDA)


def linked_cuda() -> int | None:
    """Returns the major version of CUDA that the installed ONNX Runtime was built for, or None."""
    import onnxruntime as ort

    version = ort.cuda_version.partition(".")[0]
    return int(version) if version else None


def cannot_open(provider: str, libraries: Sequence[str], install: str) -> str | None:
    """Returns why the installed ONNX Runtime can't use a provider, or None.

    Either the provider is not built in, or one of its `libraries` can't be loaded; `install` is the command
    that installs them. ONNX Runtime itself would only log this, and compute on the CPU.
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
            return f"onnxruntime's {provider} needs {library}, which can't be loaded; {install}"
    return None


def preload() -> None:
    """Loads the CUDA libraries that pip installed outside the library path. Every process needs this."""
    import onnxruntime as ort

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the libraries that it does not find
        ort.preload_dlls()


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Returns None: any version that knows the file's operators opens it, and `load` raises otherwise."""
    return None


def options(target: GpuTarget, *_: object) -> Mapping[str, Any]:
    """Returns the provider, the level of optimisation that `build` applies, and the digest of its forms."""
    forms = hashlib.sha256(FORMS.read_bytes()).hexdigest()[:16]
    provider = CPU if target.is_cpu else CUDA
    return {"provider": provider, "offline_optimisation": "extended", "forms": forms}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path, *_: object) -> Path:
    """Writes the graph as ONNX Runtime's own optimiser leaves it, so that loading need not optimise again.

    The graph is first rewritten in the forms of onnxruntime_forms. The "extended" fusions are valid on any
    CPU. Layouts for one instruction set are chosen at loading. Raises BackendError if ONNX Runtime
    can't open the graph on the target's provider.
    """
    import onnxruntime as ort

    from lcm_compile.engines.onnxruntime_forms import CPU_FORMS, CUDA_FORMS, with_forms

    path = folder / f"{graph.contract.name}.onnx"
    session_options = quiet_options()
    content = with_forms(graph.path, CPU_FORMS if target.is_cpu else CUDA_FORMS)
    session_options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(graph.path.parent)
    )
    session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session_options.optimized_model_filepath = str(path)
    if graph.weights.exists():
        session_options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", path.name + ".data"
        )
    open_session(graph.path, session_options, [CPU if target.is_cpu else CUDA], content)
    return path


def load(
    path: Path, contract: StageContract, target: GpuTarget, precision: Precision = Precision.FP32
) -> Runner:
    """Loads an engine, with a CUDA graph of its own on a GPU if ONNX Runtime supports one for it.

    On a GPU it multiplies fp32 numbers in TF32 unless the stage is in fp32. Raises BackendError if ONNX
    Runtime can't open the file on the target's provider, or if the file does not match the contract.
    """
    if target.is_cpu:
        return OnnxRuntimeRunner(open_checked(path, contract, [CPU]), contract)
    import torch

    stream = torch.cuda.Stream()  # address 0, torch's default stream, would mean that no stream is given
    tf32 = str(int(precision.floats != "fp32"))
    settings = {"user_compute_stream": str(stream.cuda_stream), "use_tf32": tf32, **CUDA_SETTINGS}
    cannot_graph = ""
    try:
        session = open_checked(path, contract, [(CUDA, {**settings, "enable_cuda_graph": "1"})])
    except BackendError as error:  # CUDA graphs are refused unless every node computes on the GPU
        cannot_graph = error.message
        session = open_checked(path, contract, [(CUDA, settings)])
    return BoundRunner(session, contract, "cuda", stream, cannot_graph)


def load_as_written(path: Path, contract: StageContract) -> Runner:
    """Loads a graph for this processor, to be computed a few times as it is written.

    Nearly nothing is optimized. The optimizer would turn each weight of an fp16 graph into a constant in
    fp32, which took 13 s and 5.7 GB for SD1.5's UNet; this way it is converted when it is needed, in the
    order that frees it soonest: 0.7 s and 1.1 GB. A call then takes 1.3 s in place of 1.0 s. Raises
    BackendError as `load` does.
    """
    import onnxruntime as ort

    session_options = sleeping_options()
    session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session_options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    return OnnxRuntimeRunner(open_checked(path, contract, [CPU], session_options), contract)


def quiet_options() -> Any:
    """Returns session options that log errors only."""
    import onnxruntime as ort

    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    return session_options


def check_contract(path: Path, side: str, found: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """Raises BackendError unless an engine's inputs or outputs have the contract's shapes and types.

    `side` is "inputs" or "outputs", `found` are the session's and `specs` the contract's.
    """
    types = {"float32": "tensor(float)", "int64": "tensor(int64)", "uint8": "tensor(uint8)"}
    has = [(list(x.shape), x.type) for x in found]
    needs = [(list(spec.shape), types.get(spec.dtype)) for spec in specs]
    if has != needs:
        raise BackendError(f"{path} has the {side} {has}; its contract says {needs}", REBUILD)


def sleeping_options() -> Any:
    """Returns options of sessions whose threads sleep while they have no work, instead of spinning.

    Each stage has its own threads, and spinning threads of one stage would take the cores from the next: on
    two cores the demo's pictures then took 1.4 times as long, and their times varied twice as much.
    """
    session_options = quiet_options()
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session_options.intra_op_num_threads = threads()
    return session_options


def open_checked(
    path: Path, contract: StageContract, providers: Sequence[Provider], session_options: Any = None
) -> Any:
    """Opens an engine's session on the first of `providers`, by default one whose threads sleep.

    Raises BackendError as open_session does, and if the engine does not match the contract.
    """
    session = open_session(path, session_options or sleeping_options(), providers)
    check_contract(path, "inputs", session.get_inputs(), contract.inputs)
    check_contract(path, "outputs", session.get_outputs(), contract.outputs)
    return session


def open_session(
    path: Path, session_options: Any, providers: Sequence[Provider], content: bytes | None = None
) -> Any:
    """Opens a session on the first of `providers`, of `content` if that is given in place of the file's.

    Raises BackendError if ONNX Runtime can't open the file, if it uses another provider instead, or if on a
    GPU it leaves one of the HEAVY operators to the processor.
    """
    import onnxruntime as ort

    asked = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if asked != CPU:
        preload()
        session_options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = ort.InferenceSession(content or str(path), session_options, providers=list(providers))
    except Exception as error:  # onnxruntime's own exceptions share no narrower base class
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
    """Describes the HEAVY operators that a session on a GPU leaves to the processor; "" if there are none."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return "it is too old to report where nodes run, and has no CUDA kernel for Attention"
    subgraphs = [s for s in session.get_provider_graph_assignment_info() if s.ep_name == CPU]
    left = {node.op_type for subgraph in subgraphs for node in subgraph.get_nodes()} & HEAVY
    return f"{', '.join(sorted(left))} is left to the processor" if left else ""


class OnnxRuntimeRunner(Runner):
    """A session on the CPU. Each call returns new NumPy arrays."""

    def __init__(self, session: Any, contract: StageContract) -> None:
        super().__init__(contract)
        self._session = session

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {spec.name: as_numpy(inputs[spec.name]) for spec in self.contract.inputs}
        arrays = self.opened(self._session).run(None, feeds)
        return {spec.name: array for spec, array in zip(self.contract.outputs, arrays, strict=True)}

    def close(self) -> None:
        """Frees the session."""
        self._session = None


class BoundRunner(TensorRunner):
    """A session that reads inputs and writes outputs in place: on a GPU, nothing is copied to the host.

    Its outputs are the same tensors at every call, and calls from several threads run one at a time. `stream`
    is the CUDA stream that the session was opened on. If it is None, the session has its own stream, and each
    call waits until the GPU is done.

    Torch can't capture ONNX Runtime's calls (github.com/microsoft/onnxruntime/pull/32081), but a session
    opened with `enable_cuda_graph` captures itself in runs that name a graph. The graph reads its inputs at
    fixed addresses, so inputs are copied there; runs without a graph read them in place. Versions before
    github.com/microsoft/onnxruntime/pull/28686 also wait for the GPU after each launch. `cannot_graph` says
    why the session was opened without `enable_cuda_graph`, and is empty if it was opened with it.
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
        self._turn = threading.RLock()  # held while the binding has one call's inputs
        self._session = session
        self._stream = stream
        self._cannot_graph = cannot_graph
        self._options = run_options(stream, "" if cannot_graph else NO_GRAPH)
        self._graphed = False
        self._fixed: list[torch.Tensor] = []  # the inputs that the CUDA graph reads, once it is captured
        self._binding = session.io_binding()
        self._outputs = self.empty(contract.outputs)
        for found, spec in zip(session.get_outputs(), contract.outputs, strict=True):
            address = self._outputs[spec.name].data_ptr()
            self._binding.bind_output(found.name, device, 0, np.dtype(spec.dtype), spec.shape, address)

    @property
    def exclusive(self) -> bool:
        """Returns True: every call writes to the same outputs."""
        return True

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self._turn:
            session = self.opened(self._session)
            held = [self.tensor(spec, inputs[spec.name]) for spec in self.contract.inputs]
            if self._graphed:
                for own, tensor in zip(self._fixed, held, strict=True):
                    own.copy_(tensor)
                held = self._fixed
            for spec, tensor in zip(self.contract.inputs, held, strict=True):
                address = tensor.data_ptr()
                self._binding.bind_input(spec.name, self.device, 0, np.dtype(spec.dtype), spec.shape, address)
            with self.ordered_with_torch(self._stream):
                session.run_with_iobinding(self._binding, self._options)
            return dict(self._outputs)

    def cannot_capture(self) -> str | None:
        """Returns why torch can't capture the engine's calls: ONNX Runtime does not support that."""
        if self.device != "cuda":
            return super().cannot_capture()
        return "torch can't capture ONNX Runtime's calls"

    def graph_itself(self, on: bool) -> str | None:
        """Switches the session's own CUDA graph on or off, and captures it the first time.

        Returns why there is none, or None.
        """
        with self._turn:
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
        """Captures the session's CUDA graph. Returns why it can't be used, or "".

        The graph must compute what the session computes without it.
        """
        self._fixed = list(self.empty(self.contract.inputs).values())
        zeros, ones = (
            {s.name: self.to_device(np.full(s.shape, value, s.dtype)) for s in self.contract.inputs}
            for value in (0, 1)
        )
        expected = [self.to_host(array + 0) for array in self(zeros).values()]
        self(ones)  # overwrites the outputs, so that the graph must write them itself
        self._use_graph(True)
        try:
            actual = [self.to_host(array) for array in self(zeros).values()]
        except Exception as error:  # onnxruntime's own exceptions share no narrower base class
            return f"ONNX Runtime can't capture {self.contract.name}: {str(error).splitlines()[0]}"
        finally:
            self._use_graph(False)
        if not all(map(equal_up_to_rounding, expected, actual)):
            return f"ONNX Runtime's CUDA graph of {self.contract.name} computes something else"
        return ""

    def close(self) -> None:
        """Frees the session, its outputs and the inputs of its CUDA graph."""
        self._session = self._binding = None
        self._outputs, self._fixed = {}, []


def equal_up_to_rounding(expected: np.ndarray, actual: np.ndarray) -> bool:
    """Returns whether the mean difference is at most 1 % of the mean magnitude of `expected`.

    Kernels that add in no fixed order round differently at each run, but stay within that limit.
    """
    first, second = (np.nan_to_num(array.astype(np.float32)) for array in (expected, actual))
    return bool(np.abs(first - second).mean() <= 0.01 * np.abs(first).mean())


def run_options(stream: Any, graph: str) -> Any:
    """Returns options of a run. If `stream` is given, the run does not wait for the GPU.

    `graph` is the id of a CUDA graph, or "" if the session was opened without CUDA graphs.
    """
    import onnxruntime as ort

    options = ort.RunOptions()
    if stream is not None:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if graph:
        options.add_run_config_entry("gpu_graph_id", graph)
    return options
