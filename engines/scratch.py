"""Memory that engines on a GPU compute in, shared by those that compute one after another."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Scratch:
    """Memory for what engines compute on the way, as large as the engine needs that needs the most.

    What an engine leaves there nothing reads. So the stages of a pipeline share one such memory: with one
    each, SDXL's would take 1 GB for the decoder alone while it waits. `turn` is held while an engine is given
    the memory and is launched. The launches of several threads are in order on the GPU because each waits for
    what is on torch's current stream, and that stream then waits for it.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.turn = threading.RLock()
        self._device = device
        self._needed = 0
        self._memory: list[torch.Tensor] = []  # the last one is used; CUDA graphs may use the others

    def reserve(self, size: int) -> None:
        """Makes the memory at least `size` bytes large, once it is needed."""
        self._needed = max(self._needed, size)

    def memory(self) -> torch.Tensor:
        """Returns the memory, in bytes. It moves only if more was reserved since the last call.

        The former memory is kept, because CUDA graphs that were captured with it go on using it.
        """
        import torch

        if not self._memory or self._memory[-1].numel() < self._needed:
            self._memory.append(torch.empty(self._needed, dtype=torch.uint8, device=self._device))
        return self._memory[-1]
