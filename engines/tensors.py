"""The base class of runners whose arrays are torch tensors, on a CPU or a GPU."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import BackendError
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.system.limits import cpu_quota
from lcm_compile.system.processor import threads

if TYPE_CHECKING:
    import torch


_process: int | None = None  # the first one that loaded an engine of torch's


def prepare_torch() -> None:
    """Prepares torch for an engine on the CPU.

    In a container with a quota it lets torch compute with at most `threads()` threads, because torch ignores
    the quota. Raises BackendError if an engine was loaded before this process was forked: OpenMP would wait
    for threads that only the other process has.
    """
    global _process
    import torch

    _process = _process or os.getpid()
    if os.getpid() != _process:
        raise BackendError(
            f"process {_process}, from which this one was forked, has computed with torch, whose threads do "
            "not live on in this process",
            "load bundles in forked processes only, or start processes with multiprocessing's spawn method",
        )
    if cpu_quota() is not None and torch.get_num_threads() > threads():
        torch.set_num_threads(threads())


# Held while torch computes in fp32 on a GPU, because what forbids TF32 is a setting of the process.
_in_fp32 = threading.Lock()


def fp32_of(precision: Precision, device: str) -> AbstractContextManager[None]:
    """Returns a context in which torch computes a stage of this precision on the device "cpu" or "cuda".

    In a half precision, the few layers that are in fp32 for its range may round to TF32.
    """
    return without_tf32() if device == "cuda" and precision.floats == "fp32" else contextlib.nullcontext()


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Keeps torch from rounding fp32 numbers to TF32 on a GPU during a block, in one thread at a time.

    TF32 has a mantissa of 10 bits. By default cuDNN's convolutions use it, which takes a UNet in fp32 from
    over 110 dB to 64 dB. Products of matrices use it where the program that imported this has allowed it.
    """
    import torch

    with _in_fp32:
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before[0]
            torch.set_float32_matmul_precision(before[1])


class TensorRunner(Runner):
    """A runner on `device`, "cpu" or "cuda". Its outputs are torch tensors on that device."""

    def __init__(self, contract: StageContract, device: str) -> None:
        super().__init__(contract)
        self.device = device

    @property
    def exclusive(self) -> bool:
        """Whether it computes on a GPU, where calls and CUDA graphs share memory and streams."""
        return self.device == "cuda"

    def tensor(self, spec: TensorSpec, array: Array) -> torch.Tensor:
        """Returns an input as engines read it: on the device, contiguous, and of the contract's type.

        Raises BackendError if its shape is not the contract's, because the engine could read past the end.
        """
        import torch

        if isinstance(array, np.ndarray):
            array = self.to_device(array)
        # A step has a hundred inputs, so those that are torch tensors skip the conversion by DLPack.
        tensor = array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)
        if (shape := tuple(tensor.shape)) != spec.shape:
            raise BackendError(
                f"the {self.contract.name} engine takes {spec.name} as {spec.shape}, not {shape}"
            )
        return tensor.to(self.device, getattr(torch, spec.dtype)).contiguous()

    def empty(self, specs: Sequence[TensorSpec]) -> dict[str, torch.Tensor]:
        """Returns new uninitialised tensors for inputs or outputs, by name and in their order."""
        import torch

        return {
            spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self.device)
            for spec in specs
        }

    @contextlib.contextmanager
    def ordered_with_torch(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Runs a block that launches an engine, in order with the work on torch's current stream.

        `stream` is the engine's own stream. It first waits for torch's stream, and then torch's waits for
        it; the host waits for neither. If `stream` is None, the host waits here until torch's stream is
        idle, and then runs the block.
        """
        import torch

        if self.device != "cuda":
            yield
            return
        current = torch.cuda.current_stream()
        if stream is None:
            current.synchronize()
            yield
            return
        stream.wait_stream(current)
        yield
        current.wait_stream(stream)

    def mark(self) -> Any:
        """Returns a CUDA event recorded on torch's current stream; on a CPU, the time."""
        if self.device != "cuda":
            return super().mark()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Returns the milliseconds between two marks, and waits until the second is reached."""
        if self.device != "cuda":
            return super().between(start, end)
        end.synchronize()
        return start.elapsed_time(end)

    def to_device(self, array: np.ndarray) -> Array:
        """Returns the array as a tensor on the engine's device."""
        import torch

        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if self.device != "cuda":
            return tensor
        # The copy is from pinned memory and in stream order, so the host does not wait for the GPU's
        # earlier work.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def to_host(self, array: Array) -> np.ndarray:
        """Returns the array as a NumPy array, and waits for the GPU if it has yet to compute it."""
        if isinstance(array, np.ndarray):
            return array
        return self.all_to_host([array])[0] if self.device == "cuda" else array.cpu().numpy()

    def all_to_host(self, arrays: Sequence[Array]) -> list[np.ndarray]:
        """Returns tensors as NumPy arrays. From a GPU they are copied to pinned memory, behind one event."""
        if self.device != "cuda":
            return super().all_to_host(arrays)
        import torch

        copies = [torch.empty(array.shape, dtype=array.dtype, pin_memory=True) for array in arrays]
        for copy, array in zip(copies, arrays, strict=True):
            copy.copy_(array, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        return [copy.numpy() for copy in copies]
