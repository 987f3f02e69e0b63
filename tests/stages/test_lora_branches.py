"""The branches of LoRAs beside layers, against layers whose weights are W + λ·B·A."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcm_compile.graphs import DOWN, STRENGTHS, UP
from lcm_compile.stages import lora_branches
from lcm_compile.stages.lora_branches import Branch, FixedLora, WithLoras, add_branch
from lcm_compile.stages.rewrites import joined

WIDTH, RANK = 16, 3


def tensor(*shape):
    return torch.randn(shape, dtype=torch.float64)


def lora(layer, seed, bias=False):
    """A LoRA of a layer, with the change of its weight."""
    torch.manual_seed(seed)
    down, up = tensor(RANK, *layer.weight.shape[1:]), tensor(len(layer.weight), RANK)
    change = (up @ down.flatten(1)).reshape(layer.weight.shape)
    return down, up, tensor(len(layer.weight)) if bias else None, change


@pytest.mark.parametrize("rows", [2, 4096], ids=["a branch", "a sum of weights"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_alone_and_joined(rows, bias, monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH).double() for _ in range(3)]
    x, given = tensor(1, rows, WIDTH), {STRENGTHS: torch.tensor([[0.5, -2.0]])}
    weights, biases = [], []
    for i, layer in enumerate(layers):
        down, up, shift, change = lora(layer, i, bias)
        slot_down, slot_up, _, slot_change = lora(layer, 10 + i)
        weights.append(layer.weight.detach())
        biases.append(layer.bias.detach())
        if i == 1:
            continue  # this one has none
        place = 0 if i == 0 else 1
        strength = float(given[STRENGTHS][0, place])
        weights[i] = weights[i] + strength * change + slot_change
        biases[i] = biases[i] + (strength * shift if bias else 0)
        given |= {DOWN + f"x.{i}": slot_down, UP + f"x.{i}": slot_up}
        add_branch(layer, Branch(layer, [FixedLora(down, up, shift, place)], f"x.{i}"))
    sums = []
    change = lora_branches.Branch.change
    monkeypatch.setattr(
        lora_branches.Branch, "change", lambda self, dtype: sums.append(1) or change(self, dtype)
    )
    expected = torch.cat([F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
    for combine in (nn.ModuleList, joined):  # which takes the layers' weights
        alone = Alone(combine(layers))
        drawn = WithLoras(alone, ["x", *given])(x, *given.values())
        assert torch.allclose(drawn, expected, rtol=1e-10, atol=1e-10)
    assert bool(sums) == (rows > WIDTH and not bias)


class Alone(nn.Module):
    """Runs a layer, or several side by side."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        several = isinstance(self.layers, nn.ModuleList)
        return torch.cat([layer(x) for layer in self.layers], -1) if several else self.layers(x)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": 1}], ids=str)
def test_convolutions(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **options).double()
    down, up, shift, change = lora(conv, 1, bias=True)
    add_branch(conv, Branch(conv, [FixedLora(down, up, shift, 0)], None))
    x, strengths = tensor(2, 4, 9, 8), torch.tensor([[0.7]])
    drawn = WithLoras(Alone(conv), ["x", STRENGTHS])(x, strengths)
    weight, bias = conv.weight + 0.7 * change, conv.bias + 0.7 * shift
    stride, padding = options.get("stride", 1), options.get("padding", 0)
    assert torch.allclose(drawn, F.conv2d(x, weight, bias, stride, padding), atol=1e-6)
