"""Chooses the fastest backend on this CPU, by a quick measurement that is stored.

A small network of the layers that diffusion models are made of is built with every backend that can, and the
engines are timed in turns. As long as the backends' versions, the processor and the precision stay the same,
the stored figures are read and nothing is measured.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lcm_compile.engines import BACKENDS, cannot_build_from, choose_backend, find_backend
from lcm_compile.engines.runner import Runner
from lcm_compile.graphs import ExportedGraph, StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.spec import REWRITES
from lcm_compile.system.measured import Measured
from lcm_compile.system.processor import instruction_set, model_name
from lcm_compile.system.stopwatch import Report, Stopwatch, silent
from lcm_compile.system.versions import installed_version
from lcm_compile.targets import TARGETS

if TYPE_CHECKING:
    import torch

CPU = TARGETS["cpu"]
# Not timed, because that alone would take half a minute. Chosen only if no other backend can build.
SLOW_TO_BUILD = {"aotinductor": "compiles for minutes; --backend aotinductor takes it"}
ROUNDS = 7
# Backends within this factor of the fastest one's milliseconds count as equally fast: a small network is no
# exact measure of a large one.
NEAR = 1.25
FAR = 4  # a backend beyond this factor of the fastest one's milliseconds is not timed again
TIMES = Measured("cpu.json", float)  # milliseconds of the small network, by the backend
# A UNet's block at a quarter of its size: channels, heads, and a side of the map.
CHANNELS, HEADS, SIDE = 320, 8, 32


def choose_on_cpu(
    precision: Precision, report: Report = silent, graph_format: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Returns the fastest backend for this CPU, and for each other one the reason why it was not chosen.

    Among backends that are nearly as fast, the first in BACKENDS is chosen: it needs fewer packages to run.
    With a `graph_format`, only backends that build from this format count. Raises BackendError if no backend
    can build.
    """
    against = {
        name: SLOW_TO_BUILD.get(name) or cannot_build_from(name, CPU, precision, graph_format)
        for name in BACKENDS
    }
    able = [name for name, reason in against.items() if reason is None]
    if not able:
        return choose_backend(CPU, precision, graph_format)  # aotinductor, or the error
    if len(able) > 1 and importlib.util.find_spec("torch") is None:  # the small network needs torch
        return able[0], tuple(
            f"{name}: comes after {able[0]}; without torch none is timed" for name in able[1:]
        )
    milliseconds = time_on_cpu(able, precision, report) if len(able) > 1 else {}
    enough = NEAR * min(milliseconds.values(), default=0.0)
    chosen = next(name for name in able if milliseconds.get(name, 0.0) <= enough)
    for name, ms in milliseconds.items():
        times = f"{ms:.1f} ms for a small network, and {chosen} {milliseconds[chosen]:.1f} ms"
        against[name] = f"{times}, which is near enough" if ms < milliseconds[chosen] else times
    return chosen, tuple(f"{name}: {why}" for name, why in against.items() if why and name != chosen)


def bf16_gain(measured: bool, report: Report = silent) -> float | None:
    """Returns how many times as long the small network takes in fp32 as in bf16, each on its fastest backend.

    Figures that are not stored are measured only if `measured` says so. Returns None without them, or if no
    backend can build bf16 for this processor. Raises BackendError if an engine can't be built.
    """
    least = []
    for precision in (Precision.FP32, Precision.BF16):
        able = [
            name
            for name in BACKENDS
            if name not in SLOW_TO_BUILD and cannot_build_from(name, CPU, precision, None) is None
        ]
        if not able or not (measured or circumstances(able, precision) in TIMES.stored()):
            return None
        least.append(min(time_on_cpu(able, precision, report).values()))
    return least[0] / least[1]


def time_on_cpu(names: list[str], precision: Precision, report: Report = silent) -> Mapping[str, float]:
    """Returns the milliseconds of one call of each backend's engine of the small network, stored or measured.

    Raises BackendError if an engine can't be built.
    """

    def timed() -> Mapping[str, float]:
        with Stopwatch(report).task("time the backends here"):
            return measure(names, precision)

    return TIMES.of(circumstances(names, precision), names, timed)


def circumstances(names: list[str], precision: Precision) -> str:
    """Returns everything that the figures depend on, as JSON: it is their key in the file."""
    backends = {name: find_backend(name) for name in names}
    built_by = {
        name: [installed_version(b.PACKAGES), b.options(CPU, precision, (), silent)]
        for name, b in backends.items()
    }
    return json.dumps([precision, model_name(), instruction_set(), built_by])


def measure(names: list[str], precision: Precision) -> dict[str, float]:
    """Times the backends in turns, and returns the least milliseconds of each.

    The least counts because other work on the machine can only add time. In every turn the second call is
    timed: during the first one, the threads of the backend before may still be busy waiting for more work. A
    backend that is far behind, as with fp16 on a processor without it, gets no further turns.
    """
    x = np.random.default_rng(0).standard_normal((1, CHANNELS, SIDE, SIDE), np.float32)
    least: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runners = {
            name: stack.enter_context(runner)
            for name, runner in small_engines(names, precision, Path(folder))
        }
        for _ in range(ROUNDS):
            for name, runner in runners.items():
                if least.get(name, 0.0) <= FAR * min(least.values(), default=0.0):
                    runner({"x": x})
                    start = time.perf_counter()
                    runner({"x": x})
                    least[name] = min(least.get(name, math.inf), time.perf_counter() - start)
    return {name: 1000 * seconds for name, seconds in least.items()}


def small_engines(names: list[str], precision: Precision, folder: Path) -> Iterator[tuple[str, Runner]]:
    """Builds the small network's engine with each backend in `folder`, and yields its name and its runner.

    Raises BackendError if a backend can't build or load it.
    """
    import torch

    from lcm_compile.export import export_stage
    from lcm_compile.stages.half_precision import to_precision
    from lcm_compile.stages.quantize import choose_scales, install_layers, quantize_layers
    from lcm_compile.stages.stage import Stage

    array = TensorSpec("x", (1, CHANNELS, SIDE, SIDE), "float32", "a feature map")
    contract = StageContract("small", (array,), (replace(array, name="y"),))
    network = small_network()
    layers = {}
    if precision.is_quantized:
        scales = choose_scales(network, precision, *[lambda: network(torch.randn(array.shape))] * 2)
        layers = quantize_layers(network, scales, precision)
    to_precision(network, precision.floats)
    install_layers(network, layers)
    stage = Stage(contract, network)
    graphs: dict[str, ExportedGraph] = {}
    for name in names:
        backend = find_backend(name)
        if (form := backend.GRAPH_FORMAT) not in graphs:
            (folder / f"{form} graph").mkdir()
            graphs[form] = export_stage(stage, form, precision, folder / f"{form} graph")
        (folder / name).mkdir()
        options = backend.options(CPU, precision, REWRITES, silent)
        path = backend.build(graphs[form], CPU, folder / name, options)
        yield name, backend.load(path, contract, CPU, precision)


def small_network() -> torch.nn.Module:
    """Returns the small network in fp32, always with the same weights.

    Its input and its output are one feature map of shape (1, CHANNELS, SIDE, SIDE).
    """
    import torch
    from torch import Tensor, nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            c = CHANNELS
            self.norm = nn.GroupNorm(32, c)
            self.convolutions = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(2))
            self.linears = nn.ModuleList(nn.Linear(c, c) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            # (1, c, h, w) → (1, c, h, w)
            x = x.to(self.norm.weight.dtype)
            for convolution in self.convolutions:
                x = x + convolution(nn.functional.silu(self.norm(x)))
            tokens = x.flatten(2).transpose(1, 2)
            heads = [linear(tokens).unflatten(2, (HEADS, -1)).transpose(1, 2) for linear in self.linears[:3]]
            mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            return (tokens + self.linears[3](mixed)).transpose(1, 2).reshape(x.shape).float()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().eval().requires_grad_(False)
