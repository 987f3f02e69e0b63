"""Stages in half precision, with the layers that would overflow fp16 kept in fp32.

An fp16 value ends at 65,504 and ONNX Runtime's CPU provider does not show it, so the largest absolute
activation of every layer is recorded in fp32 on a real picture, and whatever passes FP16_LIMIT stays fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FP16_LIMIT = 32_000.0
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def peak(value: Any) -> float:
    """The largest absolute value in a module's inputs or outputs."""
    floats = [t for t in tensors_in(value) if t.is_floating_point() and t.numel()]
    return max((float(t.abs().max()) for t in floats), default=0.0)


@contextmanager
def record_peaks(module: nn.Module) -> Iterator[dict[str, tuple[float, float]]]:
    """Within it, each call of `module` updates {submodule name: (largest input, largest output)}."""
    peaks: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, inputs: Any, outputs: Any) -> None:
            before = peaks.get(name, (0.0, 0.0))
            peaks[name] = (max(before[0], peak(inputs)), max(before[1], peak(outputs)))

        return record

    handles = [sub.register_forward_hook(hook(name)) for name, sub in module.named_modules() if name]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def leaves_with_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, sub in module.named_modules():
        if not any(True for _ in sub.children()) and any(True for _ in sub.parameters(recurse=False)):
            yield (f"{prefix}.{name}" if prefix and name else prefix or name), sub


def layers_over(module: nn.Module, peaks: dict[str, tuple[float, float]]) -> set[str]:
    """The leaf layers that must stay fp32.

    A leaf whose input or output passes the limit is one. Where a block's output passes it although no
    layer inside does (a residual sum), the whole block is: its sums are then fp32 by type promotion,
    and every later sum on that path too.
    """
    over: set[str] = set()
    large = {name for name, (_, out) in peaks.items() if out > FP16_LIMIT}
    for name, _ in leaves_with_weights(module):
        if max(peaks.get(name, (0.0, 0.0))) > FP16_LIMIT:
            over.add(name)
    for name in large:
        explained = any(other.startswith(f"{name}.") for other in large)
        if not explained:
            over |= {leaf for leaf, _ in leaves_with_weights(module.get_submodule(name), name)}
    return over


def to_precision(module: nn.Module, floats: str, keep_fp32: Iterable[str] = ()) -> nn.Module:
    """`module` itself, cast in place; the layers named in `keep_fp32` compute in fp32.

    Weight by weight, so that never two copies of a model are in memory. Neighbours of different types meet
    through a cast of each layer's inputs to its own type.
    """
    if floats == "fp32":
        return module
    kept = set(keep_fp32)
    layers = dict(leaves_with_weights(module))
    whole = {name: layers[name].state_dict() for name in kept}
    module.to(DTYPES[floats])
    if kept:
        for name, layer in layers.items():
            if name in kept:
                layer.float().load_state_dict(whole[name])
            layer.register_forward_pre_hook(cast_to_own_type)
    return module


def cast_to_own_type(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    own = next(layer.parameters()).dtype
    return tuple(
        x.to(own) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != own else x for x in inputs
    )
