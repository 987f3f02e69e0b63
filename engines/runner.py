"""The interface of a loaded engine."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar

import numpy as np

from lcm_compile.engines.scratch import Scratch
from lcm_compile.errors import UsageError
from lcm_compile.graphs import StageContract

# An array that has `__dlpack__` and arithmetic: a NumPy array between CPU engines, a CUDA tensor between
# GPU engines. The pipeline computes with operators, `clip` and `mean` alone, which both have.
Array = Any

Engine = TypeVar("Engine")


class Runner(ABC):
    """A loaded engine with its memory. It is called with arrays by name, and returns arrays by name.

    Inputs may be NumPy arrays, or DLPack arrays on the engine's device. If the runner is `exclusive`, an
    output is valid until the next call. Otherwise each call returns arrays of its own, and several threads
    may call the runner at the same time.
    """

    def __init__(self, contract: StageContract) -> None:
        self.contract = contract

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the engine once. `inputs` has an array for each of the contract's inputs.

        Raises UsageError if the runner is closed.
        """

    @property
    def exclusive(self) -> bool:
        """Whether a drawing must have the engine to itself from its first call to its last."""
        return False

    def opened(self, engine: Engine | None) -> Engine:
        """Returns an engine that `close` replaces by None. Raises UsageError if that has happened.

        A call keeps what this returns, so that another thread can't free the engine while it computes.
        """
        if engine is None:
            raise closed(f"the {self.contract.name} engine")
        return engine

    def kept(self, output: Array) -> Array:
        """Returns an output as an array that the next call leaves as it is: a copy if need be."""
        return output + 0 if self.exclusive else output

    def to_device(self, array: np.ndarray) -> Array:
        """Returns the array on the device where this engine computes; on a CPU, the same array."""
        return array

    def to_host(self, array: Array) -> np.ndarray:
        """Returns the array as a NumPy array."""
        return as_numpy(array)

    def all_to_host(self, arrays: Sequence[Array]) -> list[np.ndarray]:
        """Returns the arrays as NumPy arrays, and waits for a GPU once."""
        return [self.to_host(array) for array in arrays]

    def share_scratch(self, scratch: Scratch) -> None:  # noqa: B027 - not abstract: most engines ignore it
        """Lets an engine on a GPU compute in memory that it shares with other engines of its pipeline.

        It is called once, before the first call. Engines whose libraries manage that memory ignore it.
        """

    def cannot_capture(self) -> str | None:
        """Returns why torch can't capture the engine's calls in a CUDA graph, or None if it can.

        A call that can be captured never waits for the GPU, and enqueues its work on the stream on which
        torch is capturing.
        """
        return "it computes on the processor"

    def graph_itself(self, on: bool) -> str | None:
        """Switches the engine's own CUDA graph on or off. While it is on, each call is one launch of it.

        Returns why the engine has no CUDA graph of its own, or None.
        """
        return self.cannot_capture() or "torch captures its calls instead"

    def keep_kernels(self) -> None:  # noqa: B027 - not abstract: most engines are compiled when they are built
        """Writes what the engine's library has compiled for this GPU to the disk, if that is kept."""

    def mark(self) -> Any:
        """Returns a mark: the moment at which the engine's device finishes all work that it has so far."""
        return time.perf_counter()

    def between(self, start: Any, end: Any) -> float:
        """Returns the milliseconds between two marks, and waits until the second is reached."""
        return (end - start) * 1000

    @abstractmethod
    def close(self) -> None:
        """Frees the engine's memory. It may be called more than once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ForwardingRunner(Runner):
    """Hands every call on to another runner, which `runner()` returns."""

    @abstractmethod
    def runner(self) -> Runner:
        """Returns the runner that does the work."""

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.runner()(inputs)

    @property
    def exclusive(self) -> bool:
        return self.runner().exclusive

    def to_device(self, array: np.ndarray) -> Array:
        return self.runner().to_device(array)

    def to_host(self, array: Array) -> np.ndarray:
        return self.runner().to_host(array)

    def all_to_host(self, arrays: Sequence[Array]) -> list[np.ndarray]:
        return self.runner().all_to_host(arrays)

    def cannot_capture(self) -> str | None:
        return self.runner().cannot_capture()

    def graph_itself(self, on: bool) -> str | None:
        return self.runner().graph_itself(on)

    def keep_kernels(self) -> None:
        self.runner().keep_kernels()

    def mark(self) -> Any:
        return self.runner().mark()

    def between(self, start: Any, end: Any) -> float:
        return self.runner().between(start, end)

    def close(self) -> None:
        self.runner().close()


def closed(what: str) -> UsageError:
    """Returns the error for the use of something that was closed."""
    return UsageError(f"{what} is closed, and can't draw any more", "load the bundle again")


def as_numpy(array: Array) -> np.ndarray:
    """Returns an array in the host's memory as a NumPy array, without a copy."""
    return array if isinstance(array, np.ndarray) else np.from_dlpack(array)
