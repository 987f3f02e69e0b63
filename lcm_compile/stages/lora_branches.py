"""LoRAs that are not fused: branches beside a model's layers, whose strengths or factors are inputs.

A branch adds Σ λ·s·B·(A·x) to what its layer returns for x. It is part of the layer's output before any
rewrite of the graphs, and the rewrites that join or move layers take it along.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.graphs import DOWN, STRENGTHS, UP, is_lora_input

# The LoRA inputs of the stage that is being called, and the names of those that a branch has read.
GIVEN: ContextVar[tuple[Mapping[str, Tensor], set[str]]] = ContextVar("GIVEN")


@dataclass(frozen=True)
class FixedLora:
    """A layer's part of a LoRA that is in the graph: ΔW = up·down, and the change of the bias or None.

    `down` is (r, in) or (r, in, k, k) and `up` is (out, r). `place` is the index of its strength in the
    flattened input `lora_strengths`.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    place: int


class Branch:
    """What LoRAs add to the output of one linear layer or convolution.

    It is no module, so that the layer stays one without children: what casts and measures layers takes them
    as they are.
    """

    def __init__(self, layer: nn.Module, fixed: Sequence[FixedLora], slot: str | None) -> None:
        """Takes the LoRAs that are in the graph, and the name of the layer if it has slots."""
        self.conv = layer if isinstance(layer, nn.Conv2d) else None
        self.slot = slot
        self.places = torch.tensor([lora.place for lora in fixed for _ in range(len(lora.down))])
        self.down = torch.cat([lora.down for lora in fixed]) if fixed else None
        self.up = torch.cat([lora.up for lora in fixed], 1) if fixed else None
        self.biases = [(lora.place, lora.bias) for lora in fixed if lora.bias is not None]

    def __call__(self, x: Tensor) -> Tensor:
        """Returns what is added to the layer's output for x."""
        arrays, read = GIVEN.get()
        added: Tensor | None = None
        if self.down is not None and self.up is not None:
            read.add(STRENGTHS)
            strengths = arrays[STRENGTHS].flatten().to(x.dtype)
            added = self.through(x, self.down.to(x.dtype), self.up.to(x.dtype), strengths[self.places])
            for place, bias in self.biases:
                added = added + self.on_channels(strengths[place] * bias.to(x.dtype))
        if self.slot is not None:
            names = DOWN + self.slot, UP + self.slot
            read.update(names)
            down, up = (arrays[name].to(x.dtype) for name in names)
            own = self.through(x, down, up)
            added = own if added is None else added + own
        assert added is not None
        return added

    def through(self, x: Tensor, down: Tensor, up: Tensor, scale: Tensor | None = None) -> Tensor:
        """Returns up·(scale ⊙ (down·x)). `scale` (r,) is 1 if it is None."""
        if self.conv is None:
            inner = F.linear(x, down)
            return F.linear(inner if scale is None else inner * scale, up)
        conv: Any = self.conv
        inner = F.conv2d(x, down, None, conv.stride, conv.padding, conv.dilation)
        inner = inner if scale is None else inner * self.on_channels(scale)
        return F.conv2d(inner, up[:, :, None, None])

    def on_channels(self, vector: Tensor) -> Tensor:
        """Returns a vector so that it is added to, or multiplies, the channels of the layer's output."""
        return vector if self.conv is None else vector[:, None, None]


def add_branch(layer: nn.Module, branch: Callable[[Tensor], Tensor]) -> None:
    """Adds a branch to a layer. `branch_of` finds it again."""
    layer.lora_branch = branch  # type: ignore[assignment]
    layer.register_forward_hook(call_branch)


def call_branch(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Returns a layer's output with its branch's, as a forward hook."""
    return output + layer.lora_branch(inputs[0])


def branch_of(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Returns the branch of a layer, or None if it has none."""
    return getattr(layer, "lora_branch", None)


def join_branches(joined: nn.Module, layers: Sequence[Any]) -> None:
    """Gives a layer that does the work of several, side by side, the branches that these have."""
    if not any(map(branch_of, layers)):
        return

    def branches(x: Tensor) -> Tensor:
        parts = []
        for layer in layers:
            branch = branch_of(layer)
            zeros = x.new_zeros(*x.shape[:-1], layer.out_features)
            parts.append(zeros if branch is None else branch(x))
        return torch.cat(parts, dim=-1)

    add_branch(joined, branches)


def move_branch(conv: nn.Module, upsampling: nn.Module) -> None:
    """Gives the rewrite of an upsampling and the convolution after it the branch of the convolution."""
    if branch := branch_of(conv):
        add_branch(upsampling, lambda x: branch(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class WithLoras(nn.Module):
    """A stage with LoRA inputs: it calls the stage without them, whose branches read them."""

    def __init__(self, stage: nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self.stage = stage
        self.inputs = tuple(inputs)

    def forward(self, *arrays: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = dict(zip(self.inputs, arrays, strict=True))
        loras = {name: array for name, array in given.items() if is_lora_input(name)}
        read: set[str] = set()
        token = GIVEN.set((loras, read))
        try:
            outputs = self.stage(*(array for name, array in given.items() if name not in loras))
        finally:
            GIVEN.reset(token)
        # Some builders drop an input that nothing reads, such as those of a text encoder's last layer, and
        # then refuse it when it is given.
        unread = [loras[name].sum() for name in loras if name not in read]
        if not unread:
            return outputs
        first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        first = first + 0.0 * torch.stack(unread).sum()
        return (first, *others) if others else first


def slot_layers(checkpoint: Checkpoint, component: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of the weight of each layer of a component that has slots for LoRAs, by name."""
    config = checkpoint.components[component].config
    return layers_of_config(component, json.dumps(dict(config), sort_keys=True))


@cache
def layers_of_config(component: str, config: str) -> dict[str, tuple[int, ...]]:
    """Returns what `slot_layers` does for a config in JSON. Each config is read once."""
    module = empty_module(Component(component, json.loads(config)))
    return {
        name: tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
