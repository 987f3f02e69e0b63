"""Quantizes the UNet: layers with int8 or fp8 weights and inputs, whose scales fit the LCM trajectory.

A value x becomes s · q(x / s), where q rounds to the nearest value of the type, ties to even, and clips.
As in TensorRT, an input has a single scale s. The layers compute this in torch as well. Exported, they are
QuantizeLinear and DequantizeLinear of ONNX, which every engine with kernels of the type supports. For torch's
own compiler Linear layers in fp8 are torch's product of fp8 arrays instead.
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
    """An 8-bit type, and how layers use it.

    `largest` is the value that the largest weight becomes. `kinds` are the types of layers that are
    quantized. `clippings` are the fractions of the largest activation at which an input may be clipped. With
    `by_channel` a weight has a scale for each output channel, otherwise a single one.
    """

    dtype: torch.dtype
    largest: float
    kinds: tuple[type[nn.Module], ...]
    clippings: tuple[float, ...]
    by_channel: bool


# In a float type small values are as exact as large ones. So in fp8 neither clipping nor scales by channel
# gain anything, and not every fp8 product of TensorRT takes scales by channel. Only Linear layers use fp8:
# TensorRT's fp8 convolutions require certain numbers of channels, and TensorRT for RTX documents no fp8
# convolutions, although its builder accepts them.
TYPES = {
    "int8": EightBits(torch.int8, 127, (nn.Linear, nn.Conv2d), tuple(i / 20 for i in range(4, 21)), True),
    "fp8": EightBits(torch.float8_e4m3fn, 448, (nn.Linear,), (1.0,), False),
}
# About how many values of each call's input are kept, to choose its scale.
SAMPLED = 4096
# Layers with these names are not quantized: the first, the last, and products with a single row.
LEFT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj")
# A layer is not quantized if its own output in 8 bits has a lower signal-to-noise ratio than this, in dB.
LEAST_SNR = 25.0
# Half precision can hold this scale, and an input of zeros causes no division by zero.
SMALLEST_SCALE = 1e-6


@torch.library.custom_op("lcm_compile::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x / scale as the nearest values of the type, ties to even, clipped to its range."""
    return to_eight_bits(x, scale, dtype)


def to_eight_bits(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Does as `quantize`, by operations of torch itself."""
    scaled = x.float() / scale.float()
    if dtype.is_floating_point:
        return scaled.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    return scaled.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)


@torch.library.custom_op("lcm_compile::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Returns q · scale in the type of the scale. A vector has a scale for each index of `axis`."""
    shape = [-1 if i == axis and scale.ndim else 1 for i in range(q.ndim)]
    return q.to(scale.dtype) * scale.reshape(shape)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


class Quantized(nn.Module):
    """A Linear or Conv2d layer that rounds its weight and its input to 8 bits.

    `scale` is that of the input. `dtype` is the type of the scales, the bias and the product. The output has
    the type of the input.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, scale: float, dtype: torch.dtype, bits: EightBits
    ) -> None:
        super().__init__()
        self.bits = bits
        weight = layer.weight.detach()
        largest = weight.abs().flatten(1).amax(1) if bits.by_channel else weight.abs().amax()
        # Rounded to its type first, so that the weights are divided by the scale that is used later.
        scales = (largest / bits.largest).clamp_min(SMALLEST_SCALE).to(dtype)
        small = quantize(weight, scales.reshape(-1, *[1] * (weight.ndim - 1)), bits.dtype)
        self.register_buffer("weight", self.laid_out(small))
        self.register_buffer("weight_scale", scales)
        self.register_buffer("input_scale", torch.tensor(scale, dtype=dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(dtype))

    def laid_out(self, weight: Tensor) -> Tensor:
        """Returns the weight in the layout that `product` uses."""
        return weight

    def forward(self, x: Tensor) -> Tensor:
        small = quantize(x.to(self.input_scale.dtype), self.input_scale, self.bits.dtype)
        return self.product(dequantize(small, self.input_scale, 0)).to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """Returns the layer's output for an input that is rounded to 8 bits."""
        raise NotImplementedError


class QuantizedLinear(Quantized):
    """A Linear layer with an 8-bit weight (in, out)."""

    def laid_out(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous()  # the layout of ONNX's MatMul

    def product(self, x: Tensor) -> Tensor:
        # (…, in) → (…, out)
        product = x @ dequantize(self.weight, self.weight_scale, 1)
        return product if self.bias is None else product + self.bias


class QuantizedConv2d(Quantized):
    """A Conv2d layer with an 8-bit weight (out, in, kernel height, kernel width).

    `output_scales` has a scale for each channel of the output, for backends that round it to 8 bits as well.
    This layer itself does not round it.
    """

    output_scales: list[float] | None = None

    def __init__(self, layer: nn.Conv2d, scale: float, dtype: torch.dtype, bits: EightBits) -> None:
        super().__init__(layer, scale, dtype, bits)
        self.settings = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def product(self, x: Tensor) -> Tensor:
        # (b, c, h, w) → (b, c', h', w')
        weight = dequantize(self.weight, self.weight_scale, 0)
        return F.conv2d(x, weight, self.bias, *self.settings)  # type: ignore[arg-type]


class ScaledLinear(Quantized):
    """A Linear layer with an fp8 weight (out, in), as torch multiplies it on a GPU: torch._scaled_mm.

    The product adds up fp8 values and is scaled afterwards, so it equals QuantizedLinear's up to rounding. It
    needs SCALED_MULTIPLE inputs and outputs, or a multiple of that many. On Hopper the faster sums are asked
    for, which have fewer bits than fp32 (CUBLASLT_MATMUL_DESC_FAST_ACCUM of cuBLASLt).
    """

    def __init__(self, layer: nn.Linear, scale: float, dtype: torch.dtype, bits: EightBits) -> None:
        super().__init__(layer, scale, torch.float32, bits)  # scales in fp32, as the product reads them
        self.dtype = dtype
        self.bias = None if self.bias is None else self.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        # (…, in) → (…, out)
        small = to_eight_bits(x, self.input_scale, self.bits.dtype)
        product = torch._scaled_mm(
            # cuBLAS reads the first matrix by rows, and the second one by columns.
            small.reshape(-1, x.shape[-1]).contiguous(),
            self.weight.t(),
            self.input_scale,
            self.weight_scale,
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )
        return product.reshape(*x.shape[:-1], -1).to(x.dtype)


KINDS: dict[type[nn.Module], type[Quantized]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}
SCALED_MULTIPLE = 16  # https://docs.nvidia.com/cuda/cublas/#tensor-core-usage: 16 bytes for fp8


def layers_of(module: nn.Module, bits: EightBits) -> dict[str, nn.Module]:
    """Returns the layers of a module that may be quantized, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) in bits.kinds and not set(name.split(".")) & set(LEFT)
    }


@dataclass(frozen=True)
class Scales:
    """The scale of a layer's input, and those of its output's channels if it is a convolution."""

    input: float
    outputs: list[float] | None = None


@dataclass
class Seen:
    """The inputs of a layer so far: their largest absolute value, and a sample of the values.

    `peaks` are the largest absolute values of the output's channels, if the layer is a convolution.
    """

    largest: float = 0.0
    values: list[Tensor] = field(default_factory=list)
    peaks: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Adds an input."""
        x = x.detach().flatten()
        self.largest = max(self.largest, float(x.abs().max()))
        stride = max(1, len(x) // SAMPLED) | 1  # an odd stride does not always hit the same channels
        self.values.append(x[::stride].clone())

    def add_output(self, y: Tensor) -> None:
        """Adds the output (b, c, h, w) of a convolution."""
        peaks = y.detach().abs().amax((0, 2, 3))
        self.peaks = peaks if self.peaks is None else self.peaks.maximum(peaks)

    def scales(self, bits: EightBits) -> Scales:
        """Returns the scales of the input and the output; the latter have five digits, as in a graph."""
        if self.peaks is None:
            return Scales(self.scale(bits))
        outputs = (self.peaks / bits.largest).clamp_min(SMALLEST_SCALE).tolist()
        return Scales(self.scale(bits), [float(f"{scale:.5g}") for scale in outputs])

    def scale(self, bits: EightBits) -> float:
        """Returns the scale with the least squared error, of one for each fraction in `clippings`."""
        values = torch.cat(self.values)
        scales = [max(self.largest * clip / bits.largest, SMALLEST_SCALE) for clip in bits.clippings]
        return min(scales, key=lambda scale: float(((rounded(values, scale, bits) - values) ** 2).sum()))


def choose_scales(
    module: nn.Module, precision: Precision, draw: Callable[[], None], replay: Callable[[], None]
) -> dict[str, Scales]:
    """Returns the scales of each layer to be quantized, by name.

    `draw` calls the module as a picture does, to choose the scales. `replay` calls it again, perhaps less
    often, to compare each layer with its 8-bit form. A layer below LEAST_SNR is left out.
    """
    bits = TYPES[precision.product]
    layers = layers_of(module, bits)
    with values_seen(layers) as seen:
        draw()
    scales = {name: values.scales(bits) for name, values in seen.items() if values.values}
    with errors_of({name: layers[name] for name in scales}, scales, bits) as errors:
        replay()
    return {name: scale for name, scale in scales.items() if errors[name].snr_db() >= LEAST_SNR}


@dataclass
class Error:
    """The squared sums of a layer's outputs (`signal`), and of their differences in 8 bits (`noise`)."""

    signal: float = 0.0
    noise: float = 0.0

    def snr_db(self) -> float:
        """Returns the signal-to-noise ratio in dB."""
        return 10 * math.log10(max(self.signal, 1e-30) / max(self.noise, 1e-30))


def rounded(x: Tensor, scale: float, bits: EightBits) -> Tensor:
    """Returns x after rounding it to 8 bits with this scale."""
    scale_tensor = torch.tensor(scale)
    return dequantize(quantize(x, scale_tensor, bits.dtype), scale_tensor, 0)


@contextmanager
def values_seen(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Seen]]:
    """Yields what each layer read and returned, by name. In this context every call adds to it."""
    seen = {name: Seen() for name in layers}

    def add(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        seen[name].add(x)
        if isinstance(layer, nn.Conv2d):
            seen[name].add_output(y)

    with hooked(layers, add):
        yield seen


@contextmanager
def errors_of(
    layers: Mapping[str, nn.Module], scales: Mapping[str, Scales], bits: EightBits
) -> Iterator[dict[str, Error]]:
    """Yields the error of each layer, by name. In this context every call is computed in 8 bits too."""
    errors = {name: Error() for name in layers}

    def compare(name: str, layer: Any, x: Tensor, y: Tensor) -> None:
        found = KINDS[type(layer)](layer, scales[name].input, torch.float32, bits)(x)
        errors[name].signal += float((y**2).sum())
        errors[name].noise += float(((found - y) ** 2).sum())

    with hooked(layers, compare):
        yield errors


def quantize_layers(
    module: nn.Module, scales: Mapping[str, Scales], precision: Precision, scaled_mm: bool = False
) -> dict[str, Quantized]:
    """Returns the 8-bit layers of a module in fp32, and replaces the originals by identities in place.

    `scales` are those of choose_scales. The layers compute in the floats of the precision. For int8+bf16 they
    compute in fp32, because OpenVINO computes QuantizeLinear of bf16 wrongly (2026.4: −5 dB), and casts the
    operations around the product to bf16 anyway. With `scaled_mm`, for fp8, they multiply as torch does, and
    layers of sizes that it does not multiply are left as they are.
    """
    bits = TYPES[precision.product]
    dtype = torch.float32 if precision is Precision.INT8_BF16 else DTYPES[precision.floats]
    made = {}
    for name, scale in scales.items():
        layer: Any = module.get_submodule(name)
        if scaled_mm and any(size % SCALED_MULTIPLE for size in layer.weight.shape):
            continue
        kind = ScaledLinear if scaled_mm else KINDS[type(layer)]
        made[name] = one = kind(layer, scale.input, dtype, bits)
        if isinstance(one, QuantizedConv2d):
            one.output_scales = scale.outputs
        module.set_submodule(name, nn.Identity())
    return made


def install_layers(module: nn.Module, layers: Mapping[str, Quantized]) -> None:
    """Puts the layers of quantize_layers into the module, in place."""
    for name, layer in layers.items():
        module.set_submodule(name, layer)


@contextmanager
def hooked(
    layers: Mapping[str, nn.Module], hook: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """Calls `hook(name, layer, input, output)` for each call of these layers in this context."""

    def hook_of(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda layer, inputs, output: hook(name, layer, inputs[0], output)

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
