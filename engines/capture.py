"""CUDA graphs by torch: work for the GPU that is captured once, and then launched as one unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Capturer:
    """Captures CUDA graphs on one stream, into one memory pool that the graphs share.

    The caller must keep torch's rules (docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs"):
    - Captured code neither waits for the GPU nor reads what it computed.
    - Every launch reads and writes the same addresses.
    - Libraries allocate memory at their first call on a stream, so that call comes before the capture.
    - Graphs may share a pool if no two are launched at the same time, and if the tensors that one graph
      leaves for another are not freed in between.
    """

    def __init__(self) -> None:
        import torch

        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Calls the function on the capturing stream without capturing it, and returns its result."""
        import torch

        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Captures one call of the function. Returns a function that launches the graph, and the result.

        Each launch writes new values to the result's arrays. Raises RuntimeError if something in the function
        can't be captured.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        # With "thread_local", other threads may use the GPU during the capture: neither side fails.
        capturing = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")
        # If the capture fails, torch leaves the capturing stream as the current one; the outer block undoes
        # that.
        with torch.cuda.stream(torch.cuda.current_stream()), capturing:
            result = function()
        return graph.replay, result
