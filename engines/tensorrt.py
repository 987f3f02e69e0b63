"""TensorRT, and what TensorRT for RTX shares with it: strongly typed engines and their runner.

TensorRT builds an engine on the GPU that will run it. `tensorrt_rtx` calls the functions here with its
own Python package, whose API is the same but for how a target is named.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_compile.engines.gpu import cannot_run_on_gpu
from lcm_compile.engines.runner import Array, Runner
from lcm_compile.engines.tensors import TensorRunner
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.spec import ExportedGraph, StageContract
from lcm_compile.targets import GpuTarget

GRAPH_FORMAT = "onnx"
PACKAGES = ("tensorrt", "tensorrt-cu13")


def cannot_build(target: GpuTarget, precision: str) -> str | None:
    if precision not in target.precisions:
        return f"{target.description} does not compute in {precision}"
    reason = cannot_run(target)
    return reason and f"{reason}. It builds only on the GPU that will run the engine"


def cannot_run(target: GpuTarget) -> str | None:
    return cannot_run_with("tensorrt", "pip install 'lcm-compile[tensorrt]'", target)


def options(target: GpuTarget) -> Mapping[str, Any]:
    return {"strongly_typed": True, "optimization_level": 3}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path) -> Path:
    trt = importlib.import_module("tensorrt")
    return build_with(trt, graph, folder, lambda config: None)


def load(path: Path, contract: StageContract, target: GpuTarget) -> Runner:
    return TensorRtRunner(importlib.import_module("tensorrt"), path, contract)


def cannot_run_with(package: str, install: str, target: GpuTarget) -> str | None:
    """Why engines for `target` can't run here with this package, or None."""
    if target.is_cpu:
        return "runs on NVIDIA GPUs only"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; {install}"
    return cannot_run_on_gpu(target)


def make_logger(trt: Any) -> tuple[Any, list[str]]:
    """A TensorRT logger that keeps errors for the exception to tell, and prints nothing."""
    messages: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)

    return Logger(), messages


def build_with(trt: Any, graph: ExportedGraph, folder: Path, configure: Any) -> Path:
    """ONNX → `folder/<stage>.engine`; `configure(config)` names the target. BackendError on refusal."""
    logger, errors = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph.path)):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"{trt.__name__} can't read the {graph.contract.name} graph: {reasons}")
    allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    config.builder_optimization_level = 3
    configure(config)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(
            f"{trt.__name__} {trt.__version__} can't build the {graph.contract.name} stage: "
            + (errors[-1].strip() if errors else "it gave no reason")
        )
    path = folder / f"{graph.contract.name}.engine"
    path.write_bytes(memoryview(engine))
    return path


def allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Lets attention that no fused kernel covers (small heads, fp32) run as plain matrix products.

    Without it such a network does not build; where a fused kernel exists it is still taken.
    """
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


class TensorRtRunner(TensorRunner):
    """An engine with its execution context, its own CUDA stream and static output buffers.

    Inputs and outputs are CUDA tensors of torch, which are DLPack arrays.
    """

    def __init__(self, trt: Any, path: Path, contract: StageContract) -> None:
        import torch

        super().__init__(contract, "cuda")
        logger, errors = make_logger(trt)
        self._runtime = trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise BackendError(
                f"{trt.__name__} {trt.__version__} can't load {path}: "
                + (errors[-1].strip() if errors else "no reason given"),
                "build the bundle again on this machine",
            )
        check_bindings(trt, self._engine, path, contract)
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        # The engine's own names: an output named as an input carries a suffix.
        self._output_names = engine_names(trt, self._engine, trt.TensorIOMode.OUTPUT)
        self._outputs = self.empty_outputs()
        for spec, name in zip(contract.outputs, self._output_names, strict=True):
            self._context.set_tensor_address(name, self._outputs[spec.name].data_ptr())

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        held = []  # inputs must outlive the launch
        for spec in self.contract.inputs:
            tensor = self.tensor(spec, inputs[spec.name])
            self._context.set_tensor_address(spec.name, tensor.data_ptr())
            held.append(tensor)
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise BackendError(f"the {self.contract.name} engine failed while running")
        current.wait_stream(self._stream)
        return dict(self._outputs)

    def close(self) -> None:
        self._context = self._engine = self._runtime = None
        self._outputs = {}


def engine_names(trt: Any, engine: Any, mode: Any) -> list[str]:
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def check_bindings(trt: Any, engine: Any, path: Path, contract: StageContract) -> None:
    """BackendError unless the engine takes and gives what the contract says."""
    found_in = engine_names(trt, engine, trt.TensorIOMode.INPUT)
    found_out = engine_names(trt, engine, trt.TensorIOMode.OUTPUT)
    expected = [spec.name for spec in contract.inputs]
    if sorted(found_in) != sorted(expected) or len(found_out) != len(contract.outputs):
        raise BackendError(
            f"{path} takes {found_in} and gives {len(found_out)} outputs; its contract names {expected}",
            REBUILD,
        )
