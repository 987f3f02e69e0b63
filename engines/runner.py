"""What every engine looks like once it is loaded."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from lcm_compile.graphs import StageContract

# Whatever knows `__dlpack__` and arithmetic: NumPy arrays between CPU engines, CUDA tensors between
# GPU engines. The pipeline only adds and multiplies them.
Array = Any


class Runner(ABC):
    """An engine with its memory. Called with arrays by name, it returns arrays by name.

    Inputs may be NumPy arrays or any DLPack arrays on the engine's device. An output stays valid until
    the runner is called again.
    """

    def __init__(self, contract: StageContract) -> None:
        self.contract = contract

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    def to_device(self, array: np.ndarray) -> Array:
        """The array where this engine computes; itself on a CPU."""
        return array

    def to_host(self, array: Array) -> np.ndarray:
        return as_numpy(array)

    def cannot_capture(self) -> str | None:
        """Why what a call asks of the device can't be captured as a CUDA graph of torch's, or None.

        What can be captured waits for nothing, and enqueues on torch's own stream while that captures.
        """
        return "it computes on the processor"

    def graph_itself(self, on: bool) -> str | None:
        """From now on, or no longer, each call is one launch of a CUDA graph that the engine captures itself.

        Why it can't be, or None.
        """
        return self.cannot_capture() or "its calls are captured from outside"

    def mark(self) -> Any:
        """A moment on this engine's device: when all that was asked of it so far is done."""
        return time.perf_counter()

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; waits for the second."""
        return (end - start) * 1000

    @abstractmethod
    def close(self) -> None:
        """Frees the engine's memory; calling it twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_numpy(array: Array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else np.from_dlpack(array)
