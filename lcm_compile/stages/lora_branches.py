"""LoRAs that are not fused: branches beside a model's layers, whose strengths or factors are inputs.

A branch adds Σ λ·s·B·(A·x) to what its layer returns for x. It is part of the layer's output before any
rewrite of the graphs, and the rewrites that join or move layers take it along. Where a linear layer has more
rows of x than its weight is worth, it multiplies by W + Σ λ·s·B·A instead, which is less work: at 64×64, the
layers of SD1.5's largest map have 4096 rows, and the sum costs what 160 of them cost in a branch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.graphs import DOWN, STRENGTHS, UP, is_lora_input

# A branch takes r·(in + out) products a row, and a sum of weights r·in·out in all. The sum must be cheaper by
# this factor, because a processor's library arranges constant weights once, and others at each call. For 4096
# rows of width 320, the sum takes 1.1 times as long as no LoRA, and the branch 1.4 to 1.5. For 1024 rows of
# width 640, both take 1.1 to 1.4 times (rank 64, ONNX Runtime and OpenVINO in fp32).
SUM_COSTS = 4
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

    @property
    def has_bias(self) -> bool:
        """Whether it also changes the layer's bias."""
        return bool(self.biases)

    def change(self, dtype: torch.dtype) -> Tensor:
        """Returns what is added to a linear layer's weight (out, in), in place of calling the branch."""
        arrays, read = GIVEN.get()
        made: Tensor | None = None
        if self.down is not None and self.up is not None:
            read.add(STRENGTHS)
            strengths = arrays[STRENGTHS].flatten().to(dtype)
            made = (self.up.to(dtype) * strengths[self.places]) @ self.down.to(dtype)
        if self.slot is not None:
            names = UP + self.slot, DOWN + self.slot
            read.update(names)
            up, down = (arrays[name].to(dtype) for name in names)
            made = up @ down if made is None else made + up @ down
        assert made is not None
        return made

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


class JoinedBranch:
    """The branches of several linear layers whose work one layer does, side by side."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.parts = [(layer.out_features, branch_of(layer)) for layer in layers]

    def __call__(self, x: Tensor) -> Tensor:
        """Returns what is added to the layer's output for x."""
        shape = x.shape[:-1]
        each = [b(x) if b else x.new_zeros(*shape, width) for width, b in self.parts]
        return torch.cat(each, dim=-1)

    @property
    def has_bias(self) -> bool:
        """Whether it also changes the bias of one of the layers."""
        return any(branch.has_bias for _, branch in self.parts if branch)

    def change(self, dtype: torch.dtype) -> Tensor:
        """Returns what is added to the joined weight (out, in)."""
        made = [branch.change(dtype) if branch else None for _, branch in self.parts]
        some = next(one for one in made if one is not None)
        each = zip(self.parts, made, strict=True)
        return torch.cat([some.new_zeros(w, some.shape[1]) if m is None else m for (w, _), m in each])


def add_branch(layer: nn.Module, branch: Branch | JoinedBranch) -> None:
    """Adds a branch to a layer. `branch_of` finds it again."""
    layer.lora_branch = branch  # type: ignore[assignment]
    layer.forward = partial(call_with_branch, layer, branch)


def call_with_branch(layer: Any, branch: Branch | JoinedBranch, x: Tensor) -> Tensor:
    """Returns a layer's output for x with its branch's, in place of the layer's `forward`."""
    if isinstance(layer, nn.Linear) and not branch.has_bias:
        rows, (outs, ins) = x.numel() // x.shape[-1], layer.weight.shape
        if SUM_COSTS * ins * outs < rows * (ins + outs):
            return F.linear(x, layer.weight + branch.change(x.dtype), layer.bias)
    output: Tensor = type(layer).forward(layer, x)
    return output + branch(x)


def branch_of(layer: nn.Module) -> Branch | JoinedBranch | None:
    """Returns the branch of a layer, or None if it has none."""
    return getattr(layer, "lora_branch", None)


def join_branches(joined: nn.Module, layers: Sequence[nn.Linear]) -> None:
    """Gives a layer that does the work of several, side by side, the branches that these have."""
    if any(map(branch_of, layers)):
        add_branch(joined, JoinedBranch(layers))


def move_branch(conv: nn.Module, upsampling: nn.Module) -> None:
    """Gives the rewrite of an upsampling and the convolution after it the branch of the convolution."""
    if branch := branch_of(conv):
        upsampling.register_forward_hook(partial(call_after_doubling, branch))


def call_after_doubling(
    branch: Branch | JoinedBranch, upsampling: nn.Module, inputs: Any, output: Tensor
) -> Tensor:
    """Returns the output of a rewritten upsampling with the branch's, as a forward hook."""
    return output + branch(F.interpolate(inputs[0], scale_factor=2.0, mode="nearest"))


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
