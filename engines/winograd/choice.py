"""Measures for which convolutions Winograd's forms are faster than OpenVINO's own, once on each machine.

The answer depends on the processor and on a layer's size: where maps are small there are few tiles, and
reading the transformed weights, which are 1.8 or 4 times as many, takes longer than multiplying. So a grid of
layer sizes is timed, each in a small network of the layers that surround it in a UNet, and a layer takes the
form of the nearest size. The choices are stored until the processor, the number of threads, OpenVINO or the
kernels change.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcm_compile.engines.import_openvino import HINTS, import_openvino
from lcm_compile.engines.winograd.layers import DIRECT, replace_convolutions
from lcm_compile.engines.winograd.library import digest, library
from lcm_compile.precisions import Precision
from lcm_compile.system.measured import Measured
from lcm_compile.system.processor import instruction_set, model_name, threads
from lcm_compile.system.stopwatch import Report, Stopwatch, silent

# Rounding grows more in F(4×4): 35 dB in bf16 where direct convolution has 52, so it is fp32's alone.
FORMS = {"fp32": ("F2", "F4"), "bf16": ("F2",)}
# The grid: channels and a side of the map. Larger maps behave as the largest here do.
SIZES = tuple((c, s) for c in (64, 128, 320, 640, 1280) for s in (8, 16, 32, 64) if c * s <= 320 * 64)
ROUNDS = 5
# A form must be faster than the direct convolution by this factor: its weights take more memory.
WORTH = 1.05
CHOICES = Measured("winograd.json", str)  # the fastest form, by the name of a size


def choose(precision: Precision, report: Report = silent) -> Mapping[str, str]:
    """Returns the fastest form for each size of the grid, by `channels@side`. They are stored, or measured.

    `report` is called when they are measured, which takes some seconds. For a precision that the kernels
    don't multiply in, the mapping is empty. Raises BackendError if the kernels can't be compiled.
    """
    floats = precision.floats
    if floats not in FORMS:
        return {}

    def timed() -> Mapping[str, str]:
        with Stopwatch(report).task("time the convolutions here"):
            return measure(floats)

    return CHOICES.of(circumstances(floats), [name_of(*size) for size in SIZES], timed)


def name_of(channels: int, side: int) -> str:
    """Returns the name of a size of the grid."""
    return f"{channels}@{side}"


def circumstances(floats: str) -> str:
    """Returns everything that the choices depend on, as JSON: it is their key in the file."""
    return json.dumps([floats, model_name(), instruction_set(), digest()])


def measure(floats: str) -> dict[str, str]:
    """Times the forms in turns for every size of the grid, and returns the fastest of each.

    The least of the seconds counts, because other work on the machine can only add time.
    """
    chosen = {}
    for channels, side in SIZES:
        requests = {form: small_network(channels, side, form, floats) for form in (DIRECT, *FORMS[floats])}
        least = dict.fromkeys(requests, math.inf)
        for _ in range(ROUNDS):
            for form, request in requests.items():
                start = time.perf_counter()
                request.infer()
                least[form] = min(least[form], time.perf_counter() - start)
        best = min(least, key=lambda form: least[form])
        chosen[name_of(channels, side)] = best if least[DIRECT] > WORTH * least[best] else DIRECT
    return chosen


def small_network(channels: int, side: int, form: str, floats: str) -> Any:
    """Returns an inference request, called once, for a network like a ResBlock between two projections.

    Its input is one map (1, channels, side, side) of random numbers.
    """
    ov = import_openvino()
    from openvino import opset13 as op

    random = np.random.default_rng(0)

    def convolution(x: Any, size: int) -> Any:
        weights = random.standard_normal((channels, channels, size, size), np.float32)
        weights /= size * math.sqrt(channels)
        pads = [size // 2] * 2
        result = op.convolution(x, op.constant(weights), [1, 1], pads, pads, [1, 1])
        return op.add(result, op.constant(np.ones((1, channels, 1, 1), np.float32)))

    ones = op.constant(np.ones(channels, np.float32))
    groups = math.gcd(32, channels)
    parameter = op.parameter([1, channels, side, side], np.float32)
    first = x = convolution(parameter, 1)
    for _ in range(2):
        x = convolution(op.swish(op.group_normalization(x, ones, ones, groups, 1e-5)), 3)
    model = ov.Model([op.result(convolution(op.add(first, x), 1))], [parameter])
    if form != DIRECT:
        replace_convolutions(model, {"1@1": form}, floats == "bf16")
    core = ov.Core()
    core.add_extension(library())
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[floats],
        "INFERENCE_NUM_THREADS": threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.infer([random.standard_normal((1, channels, side, side), np.float32)])
    return request
