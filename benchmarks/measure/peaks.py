"""What a device can do at most: measured on a processor, published of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lcm_compile.benchmarks.measure.work import Work
from lcm_compile.precisions import Precision
from lcm_compile.system.child_process import call_in_child
from lcm_compile.targets import GpuTarget

PRODUCT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
SIDES = (1024, 2048)  # of the matrices; many cores want larger ones, a busy machine shorter tries
COPIED = 256 << 20  # bytes, more than any cache holds
MEASURED_FOR = 0.5  # seconds, of each


@dataclass(frozen=True)
class Peak:
    """FLOP a second at one precision, and bytes a second from memory."""

    flops: float
    bandwidth: float

    def limit_ms(self, work: Work, precision: Precision) -> float:
        """The least that one pass can take: all products at the peak, or all weights read once."""
        read = work.weights * PRODUCT_BYTES[precision.product] / self.bandwidth
        return 1000 * max(work.flop / self.flops, read)


@dataclass(frozen=True)
class Published:
    """Dense TFLOPS, of `half` (fp16 and bf16) and fp8 with fp32 sums, of int8 TOPS; and GB/s.

    `fp32` is without the matrix units: their TF32 is no fp32. None is what NVIDIA does not publish, or what
    the device does not compute.
    """

    half: float | None
    int8: float | None
    fp8: float | None
    fp32: float
    gigabytes: float

    def tflops(self, precision: Precision) -> float | None:
        product = precision.product
        return self.half if product in ("fp16", "bf16") else getattr(self, product)


# NVIDIA's data sheets; of GeForce cards the appendices of its Turing, GA102, Ada (2.1: fp8 was wrong before)
# and RTX Blackwell whitepapers, of the 3060 and the 4060 their announcements. Those and the RTX PRO 6000's
# sheet tell no dense rate of the matrix units. Of the A10G the sheet is AWS's, of the B200 HGX B200's, whose
# rates are sparse: halved. Of GB10 one rate is published, of sparse fp4.
GPUS = {
    "t4": Published(65, 130, None, 8.1, 320),
    "2080ti": Published(53.8, 215.2, None, 13.4, 616),
    "a10": Published(125, 250, None, 31.2, 600),
    "a10g": Published(70, 140, None, 35, 600),
    "a30": Published(165, 330, None, 10.3, 933),
    "a40": Published(149.7, 299.3, None, 37.4, 696),
    "a6000": Published(154.8, 309.7, None, 38.7, 768),
    "a100": Published(312, 624, None, 19.5, 1555),
    "a100-80gb": Published(312, 624, None, 19.5, 2039),
    "3060": Published(None, None, None, 13, 360),
    "3080": Published(59.5, 238, None, 29.8, 760),
    "3090": Published(71, 284, None, 35.6, 936),
    "4060": Published(None, None, None, 15, 272),
    "4070": Published(58.3, 233.2, 116.6, 29.1, 504),
    "4080": Published(97.5, 389.9, 194.9, 48.7, 716.8),
    "4090": Published(165.2, 660.6, 330.3, 82.6, 1008),
    "l4": Published(121, 242, 242, 30.3, 300),
    "l40s": Published(362, 733, 733, 91.6, 864),
    "h100": Published(989, 1979, 1979, 67, 3350),
    "h200": Published(989, 1979, 1979, 67, 4800),
    "b200": Published(2250, 4500, 4500, 75, 7700),
    "5070": Published(61.7, 246.9, 123.5, 30.9, 672),
    "5080": Published(112.6, 450.2, 225.1, 56.3, 960),
    "5090": Published(209.5, 838, 419, 104.8, 1792),
    "rtx-pro-6000": Published(None, None, None, 125, 1792),
}


def peak_of(target: GpuTarget, precision: Precision, threads: int) -> Peak | None:
    """None where it is not known."""
    if target.is_cpu:
        # In a process of its own, which gives its threads and its memory back.
        return Peak(*call_in_child(measure, precision, threads))
    published = GPUS.get(target.name)
    tflops = None if published is None else published.tflops(precision)
    if published is None or tflops is None:
        return None
    return Peak(tflops * 1e12, published.gigabytes * 1e9)


def peaks_of(target: GpuTarget, precisions: Iterable[Precision], threads: int) -> dict[Precision, Peak]:
    """By precision, those that are known."""
    found = {precision: peak_of(target, precision, threads) for precision in sorted(set(precisions))}
    return {precision: peak for precision, peak in found.items() if peak is not None}


def unpublished(
    target: GpuTarget, precisions: Iterable[Precision], peaks: Mapping[Precision, Peak]
) -> list[str]:
    """A note for each precision whose peak is not known."""
    return [
        f"no figure is published of what {target.description} does in {precision}: no share of it is told"
        for precision in sorted(set(precisions) - set(peaks))
    ]


def higher(one: Mapping[Precision, Peak], other: Mapping[Precision, Peak]) -> dict[Precision, Peak]:
    """The better of two measurements."""
    return {
        name: Peak(max(a.flops, other[name].flops), max(a.bandwidth, other[name].bandwidth))
        for name, a in one.items()
    }


def measure(precision: Precision, threads: int) -> tuple[float, float]:
    """FLOP and bytes a second of torch's matrix product and copy: the best of many."""
    import torch

    torch.set_num_threads(threads)
    # Processors compute fp16 in fp32.
    dtype = torch.bfloat16 if precision.floats == "bf16" else torch.float32
    source = torch.zeros(COPIED // 4)
    copy = torch.empty_like(source)
    with torch.inference_mode():
        products = [product(torch.randn(side, side).to(dtype), torch.mm) for side in SIDES]
        if precision.product == "int8":
            whole = [torch.randint(-128, 128, (side, side), dtype=torch.int8) for side in SIDES]
            products += [product(matrix, torch._int_mm) for matrix in whole]
        return max(products), 2 * COPIED / best(lambda: copy.copy_(source))


def product(matrix: Any, multiply: Callable[[Any, Any], Any]) -> float:
    """FLOP a second of a square matrix times itself; of whole numbers too."""
    return 2 * len(matrix) ** 3 / best(lambda: multiply(matrix, matrix))


def best(call: Callable[[], Any]) -> float:
    """The least seconds that a call took."""
    least, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < MEASURED_FOR:
        before = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - before)
    return least
