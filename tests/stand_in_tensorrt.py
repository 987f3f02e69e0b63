"""Stands in for TensorRT's Python packages where there is no GPU: an "engine" is an ONNX file's bytes.

What is called of them is here under the names and with the arguments of the real bindings, to which
test_tensorrt.py holds both this module and the code that calls it. An engine is given addresses and a stream,
reads and writes memory of the processor there, and computes on ONNX Runtime.
"""

from __future__ import annotations

import ctypes
import enum

import numpy as np
import onnxruntime

__version__ = "1.7.1.116"
ALIGNMENT = 64  # torch's, on a processor
DataType = enum.Enum("DataType", ["FLOAT", "INT64", "UINT8"])
TYPES = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(int64)": (DataType.INT64, np.int64),
    "tensor(uint8)": (DataType.UINT8, np.uint8),
}
calls = []  # what an engine and streams were asked, in order
compiled = []  # kernels that were in no cache
launch = None  # what is given each launch's stream and work, where a test wants to do the work later
captured = []  # engines, each time that TensorRT itself captured one's calls
capturable = True  # whether torch may capture the calls of engines
gpu = "NVIDIA A10"  # the one that "runs" engines

TensorIOMode = enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"])
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])
SCRATCH = 1000  # bytes that an engine computes in, for each of its inputs and outputs


class EngineInvalidityDiagnostics(enum.IntFlag):
    MALFORMED_ENGINE = 1


class ILogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING"])

    def log(self, severity, msg):
        raise NotImplementedError


class Runtime:
    engine_header_size = 64

    def __init__(self, logger):
        self.logger = logger

    def get_engine_validity(self, buffer):
        assert len(buffer) == self.engine_header_size
        return 0, 0

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            session = onnxruntime.InferenceSession(serialized_engine, providers=["CPUExecutionProvider"])
        except Exception as error:
            self.logger.log(ILogger.Severity.ERROR, f"no engine: {type(error).__name__}")
            return None
        return ICudaEngine(session)


class ICudaEngine:
    def __init__(self, session):
        self.session = session
        self.tensors = {
            **{x.name: (TensorIOMode.INPUT, x) for x in session.get_inputs()},
            **{x.name: (TensorIOMode.OUTPUT, x) for x in session.get_outputs()},
        }
        self.num_io_tensors = len(self.tensors)
        self.device_memory_size_v2 = SCRATCH * len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return self.tensors[name][0]

    def get_tensor_dtype(self, name):
        return TYPES[self.tensors[name][1].type][0]

    def get_tensor_shape(self, name):
        return self.tensors[name][1].shape

    def create_runtime_config(self):
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config=None):
        return IExecutionContext(self, runtime_config)


class IRuntimeConfig:
    cache = None
    strategy = ExecutionContextAllocationStrategy.STATIC
    cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return IRuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class IRuntimeCache:
    """A line for each kernel, after the GPU and the version that they are for."""

    def __init__(self):
        self.kernels = []

    def serialize(self):
        """The kernels as an array, which is a buffer as the bindings' IHostMemory is, and no bytes."""
        content = "\n".join([gpu, __version__, *self.kernels]).encode()
        return np.frombuffer(content, np.uint8) if self.kernels else None

    def deserialize(self, blob):
        name, version, *kernels = blob.decode().split("\n")
        if (name, version) != (gpu, __version__):
            return False
        self.kernels = kernels
        return True


class IExecutionContext:
    def __init__(self, engine, config):
        self.engine, self.addresses, self.scratch = engine, {}, None
        self.captures = config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.graph = None  # the memory that the captured calls read and write
        assert config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if config.cache is not None and not config.cache.kernels:
            compiled.append(engine)
            config.cache.kernels.append(f"kernel for {len(engine.tensors)} tensors")

    def set_tensor_address(self, name, memory):
        if name not in self.engine.tensors or memory % ALIGNMENT:
            return False
        calls.append(("address", name))
        self.addresses[name] = memory
        return True

    def set_device_memory(self, memory, size):
        calls.append(("scratch", memory, size))
        self.scratch = memory, size

    def execute_async_v3(self, stream_handle):
        if launch is None:
            return self.execute(stream_handle)
        launch(stream_handle, lambda: self.execute(stream_handle))
        return True

    def execute(self, stream_handle):
        calls.append(("execute", stream_handle))
        if self.addresses.keys() != self.engine.tensors.keys() or self.scratch is None:
            return False
        memory, size = self.scratch
        if memory % ALIGNMENT or size < self.engine.device_memory_size_v2:
            return False
        if self.captures and self.graph != (self.addresses, self.scratch):
            captured.append(self.engine)
            self.graph = dict(self.addresses), self.scratch
        ctypes.memset(memory, 77, size)  # nobody else may have kept anything there
        arrays = {name: self.array(name) for name in self.engine.tensors}
        given = {n: a for n, a in arrays.items() if self.engine.get_tensor_mode(n) == TensorIOMode.INPUT}
        results = self.engine.session.run(None, given)
        for told, result in zip(self.engine.session.get_outputs(), results, strict=True):
            arrays[told.name][...] = result
        return True

    def array(self, name):
        """The memory at a tensor's address, of the type and shape that the engine has, not the caller."""
        told = self.engine.tensors[name][1]
        kind = np.dtype(TYPES[told.type][1])
        size = int(np.prod(told.shape, dtype=int)) * kind.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, kind).reshape(told.shape)

    def is_stream_capturable(self, stream):
        return capturable and self.scratch is not None
