"""Casts stages to half precision, and keeps the layers that would overflow fp16 in fp32.

The largest fp16 value is 65,504. An overflow can't be found by running the fp16 graph on a CPU, because ONNX
Runtime computes it in fp32 there. So the largest absolute activation of every layer is recorded in fp32 on a
real picture, and every layer above FP16_LIMIT stays in fp32. If a family has a VAE that does not overflow,
`checkpoint/vae.py` takes that before anything is cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FP16_LIMIT = 32_000.0  # absolute activation; half of fp16's range, because other prompts give larger ones
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class SummedInFp32(TorchFunctionMode):
    """Lets a processor add up fp16 convolutions and Linear layers in fp32, and round the sums, as a GPU does.

    Most processors have no products in fp16. There torch's own convolution took 175 times as long as fp32's.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_product = func in (F.conv2d, F.linear) and args
        if not (is_product and args[0].dtype == torch.float16 and args[0].device.type == "cpu"):
            return func(*args, **kwargs)

        def wider(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) else value

        return func(*map(wider, args), **{name: wider(value) for name, value in kwargs.items()}).half()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of a tensor, or of nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def peak(value: Any) -> float:
    """Returns the largest absolute value of the float tensors in a module's inputs or outputs."""
    floats = [t for t in tensors_in(value) if t.is_floating_point() and t.numel()]
    return max((float(t.abs().max()) for t in floats), default=0.0)


@contextmanager
def record_peaks(module: nn.Module) -> Iterator[dict[str, tuple[float, float]]]:
    """Yields a dict that each call of `module` in this context updates.

    It maps the name of a submodule to its (largest input, largest output), as absolute values. A stage inside
    a WithLoras is left out: its inputs are the contract's, and no activations.
    """
    peaks: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, inputs: Any, outputs: Any) -> None:
            before = peaks.get(name, (0.0, 0.0))
            peaks[name] = (max(before[0], peak(inputs)), max(before[1], peak(outputs)))

        return record

    handles = [
        sub.register_forward_hook(hook(name))
        for name, sub in module.named_modules()
        if name not in ("", "stage")
    ]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def leaves_with_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the name and the layer of each submodule that has weights and no children."""
    for name, sub in module.named_modules():
        if not any(True for _ in sub.children()) and any(True for _ in sub.parameters(recurse=False)):
            yield (f"{prefix}.{name}" if prefix and name else prefix or name), sub


def layers_over(module: nn.Module, peaks: dict[str, tuple[float, float]]) -> set[str]:
    """Returns the names of the leaf layers that must stay in fp32.

    These are the layers whose input or output is above the limit. If only the output of a block is above it,
    which is a residual sum, all layers of the block stay in fp32. Type promotion then computes the sums of
    the block in fp32, and every later sum on that path too.
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
    """Casts a module in place and returns it; the layers named in `keep_fp32` compute in fp32.

    It casts one weight at a time, so that memory never holds two copies of the model. If some layers stay in
    fp32, each layer casts its inputs to its own type.
    """
    if floats == "fp32":
        return module
    kept = set(keep_fp32)
    layers = dict(leaves_with_weights(module))
    originals = {name: layers[name].state_dict() for name in kept}
    module.to(DTYPES[floats])
    if kept:
        for name, layer in layers.items():
            if name in kept:
                layer.float().load_state_dict(originals[name])
            layer.register_forward_pre_hook(cast_to_own_type)
    return module


def cast_to_own_type(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the inputs of a layer in the type of its weights, as a forward pre-hook."""
    own = next(layer.parameters()).dtype
    return tuple(
        x.to(own) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != own else x for x in inputs
    )
