"""The published figures of GPUs, against what their units and clocks come to."""

from __future__ import annotations

import pytest

from lcm_compile.benchmarks.measure.peaks import GPUS, peak_of, peaks_of, unpublished
from lcm_compile.benchmarks.measure.work import Work
from lcm_compile.precisions import Precision
from lcm_compile.targets import TARGETS

# CUDA cores and boost clock in MHz. A core multiplies and adds once a clock.
CORES = {
    "t4": (2560, 1590),
    "2080ti": (4352, 1545),
    "a10": (9216, 1695),
    "a10g": (10240, 1710),
    "a30": (3584, 1440),
    "a40": (10752, 1740),
    "a6000": (10752, 1800),
    "a100": (6912, 1410),
    "a100-80gb": (6912, 1410),
    "3060": (3584, 1777),
    "3080": (8704, 1710),
    "3090": (10496, 1695),
    "4060": (3072, 2460),
    "4070": (5888, 2475),
    "4080": (9728, 2505),
    "4090": (16384, 2520),
    "l4": (7424, 2040),
    "l40s": (18176, 2520),
    "h100": (16896, 1980),
    "h200": (16896, 1980),
    "b200": (18944, 1980),
    "5070": (6144, 2512),
    "5080": (10752, 2617),
    "5090": (21760, 2407),
    "rtx-pro-6000": (24064, 2617),
}
GEFORCE = [name for name in GPUS if name.removesuffix("ti").isdecimal()]


def test_fp32_is_what_the_cores_do():
    assert set(CORES) == set(GPUS)
    for name, (cores, megahertz) in CORES.items():
        assert GPUS[name].fp32 == pytest.approx(2 * cores * megahertz / 1e6, rel=0.025), name


def test_eight_bits_are_twice_as_fast_as_sixteen_which_geforce_halves_where_sums_are_fp32():
    for name, told in GPUS.items():
        if told.half is not None:
            assert told.int8 == pytest.approx(told.half * (4 if name in GEFORCE else 2), rel=0.015), name
            assert told.fp8 is None or told.fp8 == pytest.approx(2 * told.half, rel=0.015), name
            assert told.half > 1.4 * told.fp32, name


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if not t.is_cpu], ids=lambda t: t.name)
def test_every_gpu_has_its_figures_or_is_told_to_lack_them(target):
    precisions = [Precision.of(name, "fp16") for name in target.precisions]
    peaks = peaks_of(target, precisions, 1)
    notes = unpublished(target, precisions, peaks)
    assert len(peaks) + len(notes) == len(precisions)
    assert all(target.description in note for note in notes)
    lacking = {"3060", "4060", "rtx-pro-6000", "gb10"}
    assert bool(notes) == (target.name in lacking)
    if target.name != "gb10":
        assert "fp32" in peaks


def test_a_limit_is_of_the_products_or_of_reading_the_weights():
    l4 = TARGETS["l4"]
    products, reading = Work(121e12, 1), Work(1.0, 300 * 10**9)
    assert peak_of(l4, Precision.FP16, 1).limit_ms(products, Precision.FP16) == pytest.approx(1000)
    assert peak_of(l4, Precision.INT8_FP16, 1).limit_ms(products, Precision.INT8_FP16) == pytest.approx(500)
    assert peak_of(l4, Precision.FP16, 1).limit_ms(reading, Precision.FP16) == pytest.approx(2000)
    assert peak_of(l4, Precision.FP32, 1).limit_ms(reading, Precision.FP32) == pytest.approx(4000)
