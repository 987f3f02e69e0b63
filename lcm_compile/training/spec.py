"""What a training is asked for, and the machine that it runs on."""

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
    """What every training is asked for. A step takes batch × gradient_accumulation × processes pictures."""

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
    if value < 1:
        raise UsageError(f"{name.replace('_', '-')} must be 1 or more, not {value}")


@dataclass(frozen=True)
class Machine:
    """Where this process computes, in which precision (None: fp32), and which of how many it is."""

    device: torch.device
    dtype: torch.dtype | None = None
    process: int = 0
    processes: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.process == 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """Any kernel on a GPU; on a CPU the plain one: fused attention's backward takes a third of a step."""
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()


def find_machine(mixed_precision: str) -> Machine:
    """This process, alone or among those of `accelerate launch` or `torchrun`.

    UsageError for fp16 on a CPU.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    device = state.device
    if mixed_precision == "auto":  # on a CPU bf16 was only a fifth faster
        mixed_precision = "bf16" if device.type == "cuda" else "no"
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UsageError("fp16 trains on a GPU only, and there is none here", "--mixed-precision no, or bf16")
    return Machine(device, PRECISIONS[mixed_precision], state.process_index, state.num_processes)
