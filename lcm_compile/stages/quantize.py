"""The UNet in 8 bits: layers with int8 or fp8 weights and inputs, scaled to the LCM trajectory.

x is taken as s · q(x / s), with one scale s for all of an input, as TensorRT has it: q rounds to the nearest
value of the type, halves to even, and clips. The layers compute that in torch too; exported they are
QuantizeLinear and DequantizeLinear of ONNX, which every engine that has kernels of the type knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_compile.precisions import Precision
from lcm_compile.stages.half_precision import DTYPES


@dataclass(frozen=True)
class EightBits:
    """An 8-bit type, and what is done with it.

    `largest` is what the largest weight becomes, `kinds` are the layers that take it, `clippings` the parts
    of the largest activation where a scale may end: what is larger is clipped. `by_channel`: a weight has a
    scale for each output channel, else one for all of it.
    """

    dtype: torch.dtype
    largest: float
    kinds: tuple[type[nn.Module], ...]
    clippings: tuple[float, ...]
    by_channel: bool


# Of a float type the small values are as exact as the large: clipping gains nothing there, nor do scales by
# channel, which not every fp8 product of TensorRT has. Its fp8 convolutions ask for channels of some numbers,
# and TensorRT for RTX documents none, though its builder takes them.
TYPES = {
    "int8": EightBits(torch.int8, 127, (nn.Linear, nn.Conv2d), tuple(i / 20 for i in range(4, 21)), True),
    "fp8": EightBits(torch.float8_e4m3fn, 448, (nn.Linear,), (1.0,), False),
}
# Values of an input that are kept from each call, to choose a scale by.
SAMPLED = 4096
# Layers of these names stay as they are: the first and the last, and products of a single row.
LEFT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj")
# And those whose own output in 8 bits is further from what it was, in dB.
LEAST_SNR = 25.0
SMALLEST_SCALE = 1e-6  # of half precision, and no division by zero where an input is all zeros


@torch.library.custom_op("lcm_compile::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale as the nearest value of the type, halves to even; what is beyond its ends becomes an end."""
    scaled = x.float() / scale.float()
    if dtype.is_floating_point:
        return scaled.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    return scaled.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)


@torch.library.custom_op("lcm_compile::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """q · scale in the scale's type; a vector has a scale for each index of `axis`."""
    shape = [-1 if i == axis and scale.ndim else 1 for i in range(q.ndim)]
    return q.to(scale.dtype) * scale.reshape(shape)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


class Quantized(nn.Module):
    """A Linear or Conv2d layer with an 8-bit weight, which takes its input in 8 bits.

    `dtype` is what it computes in but for that; what it gives is of its input's type.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, scale: float, dtype: torch.dtype, bits: EightBits
    ) -> None:
        super().__init__()
        self.bits = bits
        weight = layer.weight.detach()
        largest = weight.abs().flatten(1).amax(1) if bits.by_channel else weight.abs().amax()
        # Rounded as it will be used before the weights are divided by it.
        scales = (largest / bits.largest).clamp_min(SMALLEST_SCALE).to(dtype)
        small = quantize(weight, scales.reshape(-1, *[1] * (weight.ndim - 1)), bits.dtype)
        self.register_buffer("weight", self.laid_out(small))
        self.register_buffer("weight_scale", scales)
        self.register_buffer("input_scale", torch.tensor(scale, dtype=dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(dtype))

    def laid_out(self, weight: Tensor) -> Tensor:
        return weight

    def forward(self, x: Tensor) -> Tensor:
        small = quantize(x.to(self.input_scale.dtype), self.input_scale, self.bits.dtype)
        return self.product(dequantize(small, self.input_scale, 0)).to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class QuantizedLinear(Quantized):
    def laid_out(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous()  # as ONNX's MatMul takes it

    def product(self, x: Tensor) -> Tensor:
        # (…, in) → (…, out)
        product = x @ dequantize(self.weight, self.weight_scale, 1)
        return product if self.bias is None else product + self.bias


class QuantizedConv2d(Quantized):
    def __init__(self, layer: nn.Conv2d, scale: float, dtype: torch.dtype, bits: EightBits) -> None:
        super().__init__(layer, scale, dtype, bits)
        self.settings = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def product(self, x: Tensor) -> Tensor:
        # (b, c, h, w) → (b, c', h', w')
        weight = dequantize(self.weight, self.weight_scale, 0)
        return F.conv2d(x, weight, self.bias, *self.settings)  # type: ignore[arg-type]


KINDS: dict[type[nn.Module], type[Quantized]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}


def layers_of(module: nn.Module, bits: EightBits) -> dict[str, nn.Module]:
    """The layers that may be quantized."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) in bits.kinds and not set(name.split(".")) & set(LEFT)
    }


@dataclass
class Seen:
    """What came into a layer: its largest absolute value, and some of its values."""

    largest: float = 0.0
    values: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        x = x.detach().flatten()
        self.largest = max(self.largest, float(x.abs().max()))
        stride = max(1, len(x) // SAMPLED) | 1  # an odd one does not always meet the same channels
        self.values.append(x[::stride].clone())

    def scale(self, bits: EightBits) -> float:
        """Of those that clip at some part of the largest value, the one of the least squared error."""
        values = torch.cat(self.values)
        scales = [max(self.largest * part / bits.largest, SMALLEST_SCALE) for part in bits.clippings]
        return min(scales, key=lambda scale: float(((rounded(values, scale, bits) - values) ** 2).sum()))


def choose_scales(
    module: nn.Module, precision: Precision, draw: Callable[[], None], replay: Callable[[], None]
) -> dict[str, float]:
    """Scales of the inputs of those layers of `module` that bear a precision's 8 bits, by name.

    `draw` calls the module as it will be called; `replay` again, perhaps less often, to compare each layer.
    """
    bits = TYPES[precision.product]
    layers = layers_of(module, bits)
    with inputs_seen(layers) as seen:
        draw()
    scales = {name: inputs.scale(bits) for name, inputs in seen.items() if inputs.values}
    with errors_of({name: layers[name] for name in scales}, scales, bits) as errors:
        replay()
    return {name: scale for name, scale in scales.items() if errors[name].snr_db() >= LEAST_SNR}


@dataclass
class Error:
    """Squared sums of what a layer gives, and of what it gives otherwise in 8 bits."""

    signal: float = 0.0
    noise: float = 0.0

    def snr_db(self) -> float:
        return 10 * math.log10(max(self.signal, 1e-30) / max(self.noise, 1e-30))


def rounded(x: Tensor, scale: float, bits: EightBits) -> Tensor:
    of = torch.tensor(scale)
    return dequantize(quantize(x, of, bits.dtype), of, 0)


@contextmanager
def inputs_seen(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Seen]]:
    """Within it, each call of a layer adds to what was seen of it."""
    seen = {name: Seen() for name in layers}
    with hooked(layers, lambda name, layer, x, y: seen[name].add(x)):
        yield seen


@contextmanager
def errors_of(
    layers: Mapping[str, nn.Module], scales: Mapping[str, float], bits: EightBits
) -> Iterator[dict[str, Error]]:
    """Within it, each call of a layer is computed in 8 bits too, and compared."""
    errors = {name: Error() for name in layers}

    def compare(name: str, layer: Any, x: Tensor, y: Tensor) -> None:
        found = KINDS[type(layer)](layer, scales[name], torch.float32, bits)(x)
        errors[name].signal += float((y**2).sum())
        errors[name].noise += float(((found - y) ** 2).sum())

    with hooked(layers, compare):
        yield errors


def quantize_layers(
    module: nn.Module, scales: Mapping[str, float], precision: Precision
) -> dict[str, Quantized]:
    """Makes the 8-bit layers of a module in fp32, and takes their weights out of it.

    They compute in the precision's floats, but for int8+bf16, where it is fp32: OpenVINO computes bf16's
    QuantizeLinear wrongly (2026.4: −5 dB), and narrows what is around the product anyway.
    """
    bits = TYPES[precision.product]
    dtype = torch.float32 if precision is Precision.INT8_BF16 else DTYPES[precision.floats]
    made = {}
    for name, scale in scales.items():
        layer: Any = module.get_submodule(name)
        made[name] = KINDS[type(layer)](layer, scale, dtype, bits)
        module.set_submodule(name, nn.Identity())
    return made


def install_layers(module: nn.Module, layers: Mapping[str, Quantized]) -> None:
    """Puts what quantize_layers gave where it belongs."""
    for name, layer in layers.items():
        module.set_submodule(name, layer)


@contextmanager
def hooked(
    layers: Mapping[str, nn.Module], hook: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Within it, `hook(name, layer, input, output)` is told of each call of these layers."""

    def told(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda layer, inputs, output: hook(name, layer, inputs[0], output)

    handles = [layer.register_forward_hook(told(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
