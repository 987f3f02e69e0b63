"""What a device can do at most: measured on a processor, published of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lcm_compile.apart import call_apart
from lcm_compile.benchmarks.work import Work
from lcm_compile.spec import float_type, product_type
from lcm_compile.targets import GpuTarget

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
SIDES = (1024, 2048)  # of the matrices; many cores want larger ones, a busy machine shorter tries
COPIED = 256 << 20  # bytes, more than any cache holds
MEASURED_FOR = 0.5  # seconds, of each


@dataclass(frozen=True)
class Peak:
    """FLOP a second at one precision, and bytes a second from memory."""

    flops: float
    bandwidth: float

    def limit_ms(self, work: Work, precision: str) -> float:
        """The least that one pass can take: all products at the peak, or all weights read once."""
        read = work.weights * BYTES[product_type(precision)] / self.bandwidth
        return 1000 * max(work.flop / self.flops, read)


# Dense TFLOPS of fp16 and bf16 matrix units with fp32 sums, and GB/s: NVIDIA's data sheets.
GPUS = {
    "t4": (65, 320),
    "a10": (125, 600),
    "a30": (165, 933),
    "a40": (149.7, 696),
    "a6000": (154.8, 768),
    "a100": (312, 1555),
    "a100-80gb": (312, 2039),
    "3090": (71, 936),
    "4090": (165.2, 1008),
    "l4": (121, 300),
    "l40s": (362, 864),
    "h100": (989, 3350),
    "h200": (989, 4800),
}
EIGHT_BITS = ("int8", "fp8")  # twice as fast, where there are units for them


def peak_of(target: GpuTarget, precision: str, threads: int) -> Peak | None:
    """None where it is not known."""
    if target.is_cpu:
        # In a process of its own, which gives its threads and its memory back.
        return Peak(*call_apart(measure, precision, threads))
    if target.name not in GPUS or precision == "fp32":
        return None
    tflops, gigabytes = GPUS[target.name]
    return Peak(tflops * 1e12 * (1 + (product_type(precision) in EIGHT_BITS)), gigabytes * 1e9)


def peaks_of(target: GpuTarget, precisions: Iterable[str], threads: int) -> dict[str, Peak]:
    """By precision, those that are known."""
    found = {precision: peak_of(target, precision, threads) for precision in sorted(set(precisions))}
    return {precision: peak for precision, peak in found.items() if peak is not None}


def higher(one: Mapping[str, Peak], other: Mapping[str, Peak]) -> dict[str, Peak]:
    """The better of two measurements."""
    return {
        name: Peak(max(a.flops, other[name].flops), max(a.bandwidth, other[name].bandwidth))
        for name, a in one.items()
    }


def measure(precision: str, threads: int) -> tuple[float, float]:
    """FLOP and bytes a second of torch's matrix product and copy: the best of many."""
    import torch

    torch.set_num_threads(threads)
    # Processors compute fp16 in fp32.
    dtype = torch.bfloat16 if float_type(precision) == "bf16" else torch.float32
    source = torch.zeros(COPIED // 4)
    copy = torch.empty_like(source)
    with torch.inference_mode():
        products = [product(torch.randn(side, side).to(dtype), torch.mm) for side in SIDES]
        if product_type(precision) == "int8":
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
