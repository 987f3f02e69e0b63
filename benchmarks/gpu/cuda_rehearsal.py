"""Recording the stages with torch on this machine's GPU, where a full-size picture takes seconds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lcm_compile.engines.runner import Array
from lcm_compile.proof.recording import Rehearsal, TorchRunner
from lcm_compile.stages.stage import Stage


class CudaRehearsal(Rehearsal):
    """A rehearsal whose stages compute on the GPU, each while it is recorded."""

    def runner_of(self, stage: Stage) -> TorchRunner:
        return CudaRunner(stage)


class CudaRunner(TorchRunner):
    """Runs a stage's module on the GPU, and returns it to the processor when it is closed."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        torch.backends.cudnn.allow_tf32 = (
            False  # cuDNN's convolutions use it by default; fp32 is the reference
        )
        move(self.module, "cuda")

    def tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(np.array(array)).cuda()

    def close(self) -> None:
        move(self.module, "cpu")


def move(module: nn.Module, device: str) -> None:
    """Moves a stage's module, with the plain tensors next to its weights, which `Module.to` leaves behind."""
    module.to(device)
    for inner in module.modules():
        for name, value in list(vars(inner).items()):
            if isinstance(value, Tensor):
                setattr(inner, name, value.to(device))
