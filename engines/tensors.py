"""What the runners share whose arrays are tensors of torch, on a CPU or a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import BackendError
from lcm_compile.spec import StageContract, TensorSpec

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

        tensor = self.to_device(array) if isinstance(array, np.ndarray) else torch.from_dlpack(array)
        if (shape := tuple(tensor.shape)) != spec.shape:
            raise BackendError(
                f"the {self.contract.name} engine takes {spec.name} as {spec.shape}, not {shape}"
            )
        return tensor.to(self.device, getattr(torch, spec.dtype)).contiguous()

    def empty_outputs(self) -> dict[str, torch.Tensor]:
        """Memory for each output, in the contract's order."""
        import torch

        return {
            spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=self.device)
            for spec in self.contract.outputs
        }

    def finish_tensors(self) -> None:
        """Waits for what torch still computes on the GPU."""
        import torch

        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()

    def to_device(self, array: np.ndarray) -> Array:
        import torch

        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device)

    def to_host(self, array: Array) -> np.ndarray:
        return array if isinstance(array, np.ndarray) else array.cpu().numpy()
