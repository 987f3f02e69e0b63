"""CUDA graphs by torch: what is asked of the GPU once, captured, and from then on launched as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Capturer:
    """Captures on one stream into one pool of memory, which its graphs share.

    By torch's rules (docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs"): nothing captured waits for
    the GPU or looks at what it computed; it reads and writes the same addresses at every launch; what
    libraries allocate at their first call on a stream, they allocate before. Graphs may share a pool where no
    two are launched at a time, and what one leaves for another is held: tensors are not freed meanwhile.
    """

    def __init__(self) -> None:
        import torch

        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Calls the function on the stream that captures, without capturing."""
        import torch

        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """What launches the graph, and the function's result, whose arrays each launch fills anew.

        RuntimeError where something in it can't be captured.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads ask of the GPU meanwhile fails neither there nor here.
        capturing = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")
        # Where capturing fails, torch leaves its stream the current one; the outer block undoes that.
        with torch.cuda.stream(torch.cuda.current_stream()), capturing:
            result = function()
        return graph.replay, result
