"""What torch.export needs of a module before it can be exported."""

from __future__ import annotations

import torch


class PlainSignature(torch.nn.Module):
    """A module whose forward has exactly `count` positional parameters.

    To torch.export the *args of a forward are one argument; a plain signature gives one input each.
    """

    def __init__(self, module: torch.nn.Module, count: int) -> None:
        super().__init__()
        self.module = module
        names = ", ".join(f"x{i}" for i in range(count))
        scope: dict[str, object] = {}
        exec(f"def forward(self, {names}): return self.module({names})", scope)
        self.forward = scope["forward"].__get__(self)  # type: ignore[attr-defined,method-assign]
