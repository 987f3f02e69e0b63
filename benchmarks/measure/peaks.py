"""The peak throughput of a device: measured on a processor, taken from NVIDIA's figures for a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lcm_compile.benchmarks.measure.work import Work
from lcm_compile.precisions import Precision
from lcm_compile.system.child_process import call_in_child
from lcm_compile.targets import GpuTarget

PRODUCT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}  # bytes of a weight
# Sides of the matrices that are multiplied. Many cores reach their peak on large ones; on a busy machine a
# shorter product has a better chance of running undisturbed.
SIDES = (1024, 2048)
COPIED = 256 << 20  # bytes that are copied, more than any cache holds
MEASURED_FOR = 0.5  # seconds for each product, and for the copy


@dataclass(frozen=True)
class Peak:
    """A device's peak: FLOP per second at one precision, and bytes per second from memory."""

    flops: float
    bandwidth: float

    def limit_ms(self, work: Work, precision: Precision) -> float:
        """Returns the least milliseconds that one pass can take at this peak.

        That is the longer of computing all products and of reading all weights once: the roofline model.
        """
        read = work.weights * PRODUCT_BYTES[precision.product] / self.bandwidth
        return 1000 * max(work.flop / self.flops, read)


@dataclass(frozen=True)
class Published:
    """Published dense rates of a GPU: TFLOPS, for int8 TOPS, and the memory bandwidth in GB/s.

    `half` is the rate of fp16 and bf16; it and `fp8` are with fp32 accumulation. `fp32` is the rate without
    the matrix units, because their TF32 is not fp32. None means that NVIDIA publishes no figure, or that the
    device does not compute in this type.
    """

    half: float | None
    int8: float | None
    fp8: float | None
    fp32: float
    gigabytes: float

    def tflops(self, precision: Precision) -> float | None:
        """Returns the rate of the precision's products in TFLOPS, or None."""
        product = precision.product
        return self.half if product in ("fp16", "bf16") else getattr(self, product)


# Sources: NVIDIA's data sheets. For GeForce cards, the appendices of its Turing, GA102, Ada (version 2.1,
# because earlier ones had a wrong fp8 rate) and RTX Blackwell whitepapers; for the 3060 and the 4060, their
# announcements. Those two and the RTX PRO 6000's sheet give no dense rate of the matrix units. The A10G's
# sheet is from AWS. The B200's figures are the HGX B200's sparse rates, halved. GB10 is missing, because its
# only published rate is for sparse fp4.
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
    """Returns the target's peak at this precision, or None if it is not known.

    On a processor it is measured, with this many threads.
    """
    if target.is_cpu:
        # Measured in a process of its own, which frees its threads and its memory when it ends.
        return Peak(*call_in_child(measure, precision, threads))
    published = GPUS.get(target.name)
    tflops = None if published is None else published.tflops(precision)
    if published is None or tflops is None:
        return None
    return Peak(tflops * 1e12, published.gigabytes * 1e9)


def peaks_of(target: GpuTarget, precisions: Iterable[Precision], threads: int) -> dict[Precision, Peak]:
    """Returns the peaks that are known, by precision."""
    peaks = {precision: peak_of(target, precision, threads) for precision in sorted(set(precisions))}
    return {precision: peak for precision, peak in peaks.items() if peak is not None}


def unpublished(
    target: GpuTarget, precisions: Iterable[Precision], peaks: Mapping[Precision, Peak]
) -> list[str]:
    """Returns a note for each precision whose peak is not known."""
    return [
        f"no peak throughput is published for {target.description} in {precision}, so no limit is shown"
        for precision in sorted(set(precisions) - set(peaks))
    ]


def higher(one: Mapping[Precision, Peak], other: Mapping[Precision, Peak]) -> dict[Precision, Peak]:
    """Returns the higher figures of two measurements, by precision."""
    return {
        precision: Peak(
            max(peak.flops, other[precision].flops), max(peak.bandwidth, other[precision].bandwidth)
        )
        for precision, peak in one.items()
    }


def measure(precision: Precision, threads: int) -> tuple[float, float]:
    """Returns the FLOP per second of torch's matrix product and the bytes per second of its copy.

    Each is the best of many runs.
    """
    import torch

    torch.set_num_threads(threads)
    # Processors compute fp16 products in fp32.
    dtype = torch.bfloat16 if precision.floats == "bf16" else torch.float32
    source = torch.zeros(COPIED // 4)
    copy = torch.empty_like(source)
    with torch.inference_mode():
        products = [product(torch.randn(side, side).to(dtype), torch.mm) for side in SIDES]
        if precision.product == "int8":
            matrices = [torch.randint(-128, 128, (side, side), dtype=torch.int8) for side in SIDES]
            products += [product(matrix, torch._int_mm) for matrix in matrices]
        return max(products), 2 * COPIED / best(lambda: copy.copy_(source))


def product(matrix: Any, multiply: Callable[[Any, Any], Any]) -> float:
    """Returns the operations per second of a square matrix times itself, a multiply-add as two."""
    return 2 * len(matrix) ** 3 / best(lambda: multiply(matrix, matrix))


def best(call: Callable[[], Any]) -> float:
    """Calls for MEASURED_FOR seconds, and returns the least seconds that a call took."""
    least, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < MEASURED_FOR:
        before = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - before)
    return least
