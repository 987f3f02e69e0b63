"""The settings that every training has, and the machine that it runs on."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcm_compile.errors import UsageError, unknown_name

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainSpec:
    """The settings that every training has. A step takes batch × gradient_accumulation × processes pictures.

    With `ema` above 0, a running mean of the weights with this decay is written in place of the weights. A
    state is saved every `save_every` steps. Raises UsageError if a value is out of range.
    """

    base: str
    data: str | None = None
    steps: int = 1000
    rank: int = 64
    batch: int = 1
    lr: float = 1e-4
    seed: int = 0
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "auto"
    ema: float = 0.0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "batch", "gradient_accumulation", "save_every"):
            at_least_one(name, getattr(self, name))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr must be a positive number, not {self.lr}", "for example --lr 1e-4")
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema must be at least 0 and below 1, not {self.ema}", "for example --ema 0.99")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if self.mixed_precision not in ("auto", *PRECISIONS):
            raise unknown_name("mixed precision", self.mixed_precision, ("auto", *PRECISIONS))


def at_least_one(name: str, value: int) -> None:
    """Raises UsageError if the value of a setting is below 1."""
    if value < 1:
        raise UsageError(f"{name.replace('_', '-')} must be 1 or more, not {value}")


@dataclass(frozen=True)
class Machine:
    """The device and precision (None: fp32) of this process, its index, and the number of processes."""

    device: torch.device
    dtype: torch.dtype | None = None
    process: int = 0
    processes: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.process == 0

    def autocast(self) -> torch.autocast:
        """Returns a context in which models compute in this precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context for attention: any kernel on a GPU, only the plain one on a CPU.

        On a CPU the backward pass of fused attention takes a third of a step.
        """
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()


def find_machine(mixed_precision: str) -> Machine:
    """Returns the machine of this process, which runs alone or under `accelerate launch` or `torchrun`.

    `mixed_precision` is auto, no, bf16 or fp16. Raises UsageError for fp16 on a CPU.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    device = state.device
    if mixed_precision == "auto":  # bf16 on a CPU was only a fifth faster than fp32
        mixed_precision = "bf16" if device.type == "cuda" else "no"
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UsageError(
            "fp16 trains on a GPU only, and there is none here", "use --mixed-precision no or bf16"
        )
    return Machine(device, PRECISIONS[mixed_precision], state.process_index, state.num_processes)
