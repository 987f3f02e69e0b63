"""What the runners share whose arrays are tensors of torch, on a CPU or a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import BackendError
from lcm_compile.graphs import StageContract, TensorSpec

if TYPE_CHECKING:
    import torch


class TensorRunner(Runner):
    """A runner on `device`, "cpu" or "cuda". What it gives are tensors there."""

    def __init__(self, contract: StageContract, device: str) -> None:
        super().__init__(contract)
        self.device = device

    def tensor(self, spec: TensorSpec, array: Array) -> torch.Tensor:
        """The input as engines read it: on the device, of the contract's type, contiguous.

        BackendError for another shape, which an engine would read past its end.
        """
        import torch

        if isinstance(array, np.ndarray):
            array = self.to_device(array)
        # A step takes a hundred tensors: those of torch are spared the exchange.
        tensor = array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)
        if (shape := tuple(tensor.shape)) != spec.shape:
            raise BackendError(
                f"the {self.contract.name} engine takes {spec.name} as {spec.shape}, not {shape}"
            )
        return tensor.to(self.device, getattr(torch, spec.dtype)).contiguous()

    def empty(self, specs: Sequence[TensorSpec]) -> dict[str, torch.Tensor]:
        """Memory for each of some inputs or outputs, in their order."""
        import torch

        return {
            spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self.device)
            for spec in specs
        }

    @contextlib.contextmanager
    def beside(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """An engine on a stream of its own takes its turn in torch's; the host waits for neither.

        Without such a stream, the engine begins once the GPU has done all that torch asked of it.
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
        if self.device != "cuda":
            return super().mark()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        if self.device != "cuda":
            return super().between(start, end)
        end.synchronize()
        return start.elapsed_time(end)

    def to_device(self, array: np.ndarray) -> Array:
        import torch

        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        if self.device != "cuda":
            return tensor
        # From pinned memory, in the order of the stream: the host does not wait for what the GPU does before.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def to_host(self, array: Array) -> np.ndarray:
        return array if isinstance(array, np.ndarray) else array.cpu().numpy()
