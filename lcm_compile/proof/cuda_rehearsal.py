"""Records the stages with torch on this machine's GPU, where a full-size picture takes seconds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lcm_compile.engines.runner import Array
from lcm_compile.proof.recording import Rehearsal, TorchRunner
from lcm_compile.stages.stage import Stage

DEVICE = "cuda"
# The share of the GPU's free memory that a stage's weights may take. The rest is for what it computes.
MOST_MEMORY = 1 / 2


class CudaRehearsal(Rehearsal):
    """A rehearsal on the GPU, which holds only the stage that is being recorded."""

    def runner_of(self, stage: Stage) -> TorchRunner:
        """Returns a runner that moves the stage to the GPU, or one on the processor if it is too large."""
        tensors = (*stage.module.parameters(), *stage.module.buffers())
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        fits = size <= MOST_MEMORY * torch.cuda.mem_get_info()[0]
        return CudaRunner(stage) if fits else TorchRunner(stage)


class CudaRunner(TorchRunner):
    """Runs a stage's module on the GPU, and moves it back to the processor when it is closed."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        # cuDNN's convolutions use TF32 by default, but the reference must be fp32.
        torch.backends.cudnn.allow_tf32 = False
        move(self.module, DEVICE)

    def tensor(self, array: Array) -> Tensor:
        """Returns a copy of an array as a tensor on the GPU."""
        return torch.from_numpy(np.array(array)).to(DEVICE)

    def close(self) -> None:
        """Moves the module back to the processor."""
        move(self.module, "cpu")


def move(module: nn.Module, device: str) -> None:
    """Moves a stage's module in place, with its plain tensors, which `Module.to` does not move."""
    module.to(device)
    for path, tensor in plain_tensors(module).items():
        place, _, name = path.rpartition(".")
        setattr(module.get_submodule(place), name, tensor.to(device))


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors within a module that are neither parameters nor buffers, by their paths."""
    return {
        f"{place}.{name}" if place else name: value
        for place, inner in module.named_modules()
        for name, value in vars(inner).items()
        if isinstance(value, Tensor)
    }
