"""TensorRT, and the code that TensorRT for RTX shares with it: strongly typed engines and their runner.

TensorRT builds an engine on the GPU that will run it. `tensorrt_rtx` calls the functions here with its own
Python package as `trt`; the two packages' APIs differ only in how the target is set.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.engines import other_version
from lcm_compile.engines.gpu import LEAST_DRIVERS, cannot_run_on_gpu, gpu_here
from lcm_compile.engines.runner import Array, Runner
from lcm_compile.engines.scratch import Scratch
from lcm_compile.engines.tensorrt_caches import KernelCache, keeping_timings, timings_path
from lcm_compile.engines.tensorrt_network import allow_decomposed_attention, join_upsampling
from lcm_compile.engines.tensors import TensorRunner
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.system.versions import installed_version
from lcm_compile.targets import GpuTarget

if TYPE_CHECKING:
    import torch

GRAPH_FORMAT = "onnx"
PACKAGES = ("tensorrt", "tensorrt-cu13")
INSTALL = "pip install 'lcm-compile[tensorrt]'"
LEAST_VERSION = 11  # the oldest major version that this module supports
OPTIMIZATION_LEVEL = 3
TF32 = "in stages of half precision"  # where fp32 layers may round to it
# NumPy's names for the types that contracts have, by TensorRT's.
DTYPES = {"FLOAT": "float32", "INT64": "int64", "UINT8": "uint8"}
ALIGNMENT = 256  # bytes, of every address that is given to an engine: IExecutionContext::setTensorAddress


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    """Returns why this machine can't build an engine for the target in that precision, or None."""
    if not target.computes(precision):
        return f"{target.description} does not compute in {precision}"
    reason = cannot_run(target)
    return reason and f"{reason}. It builds only on the GPU that will run the engine"


def cannot_run(target: GpuTarget) -> str | None:
    """Returns why this machine can't run engines for the target, or None."""
    return cannot_run_with("tensorrt", INSTALL, target) or too_old(installed_version(PACKAGES))


def too_old(version: str | None) -> str | None:
    """Returns why an installed `name version` is too old for this module, or None."""
    if version is None or int(version.split(" ")[1].partition(".")[0]) >= LEAST_VERSION:
        return None
    return f"{version} is installed, but version {LEAST_VERSION} or newer is needed; {INSTALL}"


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Returns why an engine can't be loaded here, or None. Only the version that built it can load it."""
    return other_version(built_with, PACKAGES)


def options(target: GpuTarget, *_: object) -> Mapping[str, Any]:
    """Returns the builder options that `build` sets."""
    return {
        "strongly_typed": True,
        "optimization_level": OPTIMIZATION_LEVEL,
        "profiling": "detailed",
        "tf32": TF32,
    }


def build(graph: ExportedGraph, target: GpuTarget, folder: Path, *unused: object) -> Path:
    """Builds `folder/<stage>.engine`, and writes the result of inspect_engine to `<stage>.json` next to it.

    Raises BackendError as build_with does.
    """
    trt = importlib.import_module("tensorrt")

    def configure(config: Any) -> None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for inspect_engine

    here = gpu_here()
    assert here is not None, "cannot_build was not called"
    path = build_with(trt, graph, folder, configure, timings_path(trt, here[0]))
    logger, _ = make_logger(trt)
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is not None:  # otherwise the check of the stage reports why it can't be loaded
        path.with_suffix(".json").write_text(json.dumps(inspect_engine(trt, engine), indent=1))
    return path


def load(
    path: Path, contract: StageContract, target: GpuTarget, precision: Precision = Precision.FP32
) -> Runner:
    """Loads an engine. Raises BackendError as TensorRtRunner does."""
    return TensorRtRunner(importlib.import_module("tensorrt"), path, contract)


def cannot_run_with(package: str, install: str, target: GpuTarget) -> str | None:
    """Returns why engines for `target` can't run here with this package, or None.

    `install` is the command that installs the package.
    """
    if target.is_cpu:
        return "runs on NVIDIA GPUs only"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; {install}"
    return cannot_run_on_gpu(target, linked_cuda(package))


def linked_cuda(package: str) -> int | None:
    """Returns the major CUDA version that the installed package is for, or None.

    The name of the distribution that provides the package says it: `<package>_cu<version>`.
    """
    versions = (cuda for cuda in LEAST_DRIVERS if installed_version((f"{package}_cu{cuda}",)))
    return next(versions, None)


def make_logger(trt: Any) -> tuple[Any, list[str]]:
    """Returns a TensorRT logger that prints nothing, and the list in which it collects error messages."""
    messages: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)

    return Logger(), messages


def build_with(
    trt: Any,
    graph: ExportedGraph,
    folder: Path,
    configure: Callable[[Any], None],
    timings: Path | None = None,
) -> Path:
    """Builds `folder/<stage>.engine` from an ONNX graph, and returns its path.

    `configure` sets the target's own options in the builder's config. `timings` is the file of kernel timings
    on this GPU, if they are kept. The network is strongly typed, which is the only kind from TensorRT 11 on:
    each layer computes in the graph's own types. Raises BackendError if TensorRT can't read the graph or
    can't build the engine.
    """
    logger, errors = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph.path)):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"{trt.__name__} can't read the {graph.contract.name} graph: {reasons}")
    allow_decomposed_attention(trt, network)
    added = join_upsampling(trt, network)
    config = builder.create_builder_config()
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    if graph.precision.floats == "fp32":  # otherwise fp32 is there for its range, and TF32 has the same
        config.clear_flag(trt.BuilderFlag.TF32)
    configure(config)
    with keeping_timings(config, timings) if timings else nullcontext():
        engine = builder.build_serialized_network(network, config)
    del added
    if engine is None:
        raise BackendError(
            f"{trt.__name__} {trt.__version__} can't build the {graph.contract.name} stage: "
            + (errors[-1].strip() if errors else "it gave no reason")
        )
    path = folder / f"{graph.contract.name}.engine"
    path.write_bytes(memoryview(engine))
    return path


def inspect_engine(trt: Any, engine: Any) -> dict[str, Any]:
    """Returns an engine's number of layers, its outputs by format, and its device memory in bytes."""
    information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {
        "layers": engine.num_layers,
        "outputs": count_formats(json.loads(information)),
        "device_memory_bytes": engine.device_memory_size_v2,
    }


def count_formats(information: Mapping[str, Any]) -> dict[str, int]:
    """Counts the layers' outputs by type and format, as the inspector's JSON names these.

    A layer that the JSON gives as a bare name is skipped.
    """
    layers = [layer for layer in information.get("Layers", []) if isinstance(layer, dict)]
    outputs = [output for layer in layers for output in layer.get("Outputs", [])]
    return dict(Counter(output.get("Format/Datatype", "not told") for output in outputs))


class TensorRtRunner(TensorRunner):
    """An engine with its execution context, its own CUDA stream and fixed output buffers.

    Outputs are torch tensors on the GPU, which are DLPack arrays. The memory that the engine computes in is
    not the context's own, but lent to it for each launch. Calls from several threads run one at a time.

    TensorRT for RTX can capture the calls itself. It does so anew wherever an address is another, so inputs
    are then copied to where they were.
    """

    def __init__(
        self,
        trt: Any,
        path: Path,
        contract: StageContract,
        open_kernels: Callable[[Any], KernelCache] | None = None,
    ) -> None:
        """Loads an engine. `open_kernels` adds the kernel cache to its runtime config, where `trt` has such.

        Raises BackendError if TensorRT can't load the file or can't create a context for it, or if the engine
        does not match the contract.
        """
        import torch

        super().__init__(contract, "cuda")
        self._trt = trt
        self._path = path
        logger, self._errors = make_logger(trt)
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendError(
                f"{trt.__name__} {trt.__version__} can't load {path}: {self._last_error()}", REBUILD
            )
        check_bindings(trt, self._engine, path, contract)
        self._config = self._engine.create_runtime_config()
        strategies = trt.ExecutionContextAllocationStrategy
        self._config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
        self._kernels = open_kernels(self._config) if open_kernels else None
        self.share_scratch(Scratch(self.device))
        self._stream = torch.cuda.Stream()
        # The engine's own names: an output with the same contract name as an input has a suffix there.
        self._output_names = engine_names(trt, self._engine, trt.TensorIOMode.OUTPUT)
        self._outputs = self.empty(contract.outputs)
        self._fixed: dict[str, torch.Tensor] = {}  # the inputs of calls that TensorRT captures itself
        self._cannot_graph = ""
        self._capturable: bool | None = None  # unknown
        self._open_context()

    def _open_context(self) -> None:
        """Creates the execution context by the runtime config. Raises BackendError if TensorRT can't."""
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise BackendError(
                f"{self._trt.__name__} can't run {self._path}: {self._last_error()}",
                "nvidia-smi shows how much of the GPU's memory is free",
            )
        self._context = context
        self._addresses: dict[str, int] = {}
        self._scratch_address = 0
        for spec, name in zip(self.contract.outputs, self._output_names, strict=True):
            self._place(name, self._outputs[spec.name])

    def _last_error(self) -> str:
        return self._errors[-1].strip() if self._errors else "no reason given"

    def share_scratch(self, scratch: Scratch) -> None:
        """Lets the engine compute in memory that it shares with other engines."""
        scratch.reserve(self._engine.device_memory_size_v2)
        self._scratch = scratch

    @property
    def exclusive(self) -> bool:
        """Returns True: every call writes to the same outputs."""
        return True

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self._scratch.turn:
            self.opened(self._context)
            held = []  # inputs must outlive the launch
            for spec in self.contract.inputs:
                tensor = self.tensor(spec, inputs[spec.name])
                if self._fixed:
                    tensor = self._fixed[spec.name].copy_(tensor)
                elif tensor.data_ptr() % ALIGNMENT:
                    tensor = tensor.clone()
                self._place(spec.name, tensor)
                held.append(tensor)
            self._lend_scratch()
            self._enqueue()
            return dict(self._outputs)

    def _lend_scratch(self) -> None:
        memory = self._scratch.memory()
        if memory.data_ptr() != self._scratch_address:
            self._context.set_device_memory(memory.data_ptr(), memory.numel())
            self._scratch_address = memory.data_ptr()

    def _enqueue(self) -> None:
        """Launches the engine on torch's current stream, which may be capturing.

        If that is torch's default stream, the launch uses this engine's own stream instead, because
        TensorRT waits for the GPU at every launch on the default stream.
        """
        import torch

        around: AbstractContextManager[None] = nullcontext()
        stream = torch.cuda.current_stream()
        if stream == torch.cuda.default_stream():
            stream, around = self._stream, self.ordered_with_torch(self._stream)
        with around:
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise BackendError(f"the {self.contract.name} engine failed while running")

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        address = tensor.data_ptr()
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise BackendError(
                    f"{self._trt.__name__} refuses the memory for {name} of {self.contract.name}"
                )
            self._addresses[name] = address

    def cannot_capture(self) -> str | None:
        """Returns why torch can't capture the engine's calls, or None if it can.

        Only TensorRT for RTX answers this question. TensorRT raises an error during the capture if the engine
        has loops or conditionals.
        """
        with self._scratch.turn:
            if self._capturable is None:
                asked = getattr(self.opened(self._context), "is_stream_capturable", None)
                self._lend_scratch()
                self._capturable = asked is None or bool(asked(self._stream.cuda_stream))
        if self._capturable:
            return None
        return f"{self._trt.__name__} does not let torch capture the {self.contract.name} engine"

    def graph_itself(self, on: bool) -> str | None:
        """Lets TensorRT for RTX capture the engine's calls, or not. TensorRT has no CUDA graphs of its own.

        Returns why it can't, or None.
        """
        strategies = getattr(self._trt, "CudaGraphStrategy", None)
        if strategies is None:
            return super().graph_itself(on)
        with self._scratch.turn:
            if on != bool(self._fixed) and not self._cannot_graph:
                strategy = strategies.WHOLE_GRAPH_CAPTURE if on else strategies.DISABLED
                self._config.cuda_graph_strategy = strategy
                try:
                    self._open_context()
                    self._fixed = self.empty(self.contract.inputs) if on else {}
                except BackendError as error:
                    self._cannot_graph = error.message
        return self._cannot_graph or None

    def keep_kernels(self) -> None:
        """Writes the kernel cache, if it has kernels that were not written yet."""
        with self._scratch.turn:
            if self._kernels:
                self._kernels.keep()

    def close(self) -> None:
        """Writes the kernel cache, and frees the engine and its share of the scratch memory."""
        with self._scratch.turn:
            self.keep_kernels()
            self._kernels = self._context = self._config = self._engine = self._runtime = None
            self._outputs, self._fixed = {}, {}
            self._scratch = Scratch(self.device)


def engine_names(trt: Any, engine: Any, mode: Any) -> list[str]:
    """Returns the names of an engine's inputs or outputs; `mode` is a trt.TensorIOMode."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def check_bindings(trt: Any, engine: Any, path: Path, contract: StageContract) -> None:
    """Raises BackendError unless the engine has the contract's inputs and outputs, in type and in shape.

    Inputs are compared by name and outputs in their order. A GPU would read and write past the end of memory
    that is smaller than what the engine has.
    """
    read, written = trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT
    takes = {name: described(engine, name) for name in engine_names(trt, engine, read)}
    expected = {spec.name: (spec.shape, spec.dtype) for spec in contract.inputs}
    gives = [described(engine, name) for name in engine_names(trt, engine, written)]
    promised = [(spec.shape, spec.dtype) for spec in contract.outputs]
    if (takes, gives) == (expected, promised):
        return
    names = sorted(name for name in {*takes, *expected} if takes.get(name) != expected.get(name))
    wrong = [f"takes {name} as {takes.get(name)}, not {expected.get(name)}" for name in names]
    if gives != promised:
        wrong.append(f"gives {gives}, not {promised}")
    raise BackendError(
        f"{path} does not fit the contract of {contract.name}: it {', and '.join(wrong)}", REBUILD
    )


def described(engine: Any, name: str) -> tuple[tuple[int, ...], str]:
    """Returns the shape of an engine's input or output, and its type by NumPy's name if contracts have it."""
    dtype = engine.get_tensor_dtype(name).name
    return tuple(engine.get_tensor_shape(name)), DTYPES.get(dtype, dtype)
