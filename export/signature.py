"""Gives a module the kind of signature that torch.export needs."""

from __future__ import annotations

import torch


class PlainSignature(torch.nn.Module):
    """A module whose forward has exactly `count` positional parameters.

    torch.export takes the *args of a forward as one argument, so each input needs a parameter of its own.
    """

    def __init__(self, module: torch.nn.Module, count: int) -> None:
        super().__init__()
        self.module = module
        names = ", ".join(f"x{i}" for i in range(count))
        scope: dict[str, object] = {}
        exec(f"def forward(self, {names}): return self.module({names})", scope)
        self.forward = scope["forward"].__get__(self)  # type: ignore[attr-defined]
