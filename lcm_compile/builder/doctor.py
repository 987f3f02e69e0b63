"""Finds out which backends work on this machine, by building and running a small network with each."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lcm_compile.builder.fastest_backend import SLOW_TO_BUILD, time_on_cpu
from lcm_compile.engines import BACKENDS, Backend, find_backend
from lcm_compile.errors import LcmCompileError
from lcm_compile.export import export_stage
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import snr_db
from lcm_compile.system.stopwatch import Report, silent
from lcm_compile.system.versions import installed_version
from lcm_compile.targets import TARGETS, GpuTarget


@dataclass(frozen=True)
class Diagnosis:
    """What one backend can do on this machine.

    `version` is that of the backend's package, or None if it is not installed. `builds_for` are the targets
    that an engine was built for (see diagnose_backend), and `runs` says whether an engine ran and its output
    was right. `reason` says what was seen. `milliseconds` is the time of one call of the small fp32 network
    by which `--backend auto` chooses on this CPU, or None if the backend was not timed.
    """

    backend: str
    version: str | None
    builds_for: tuple[str, ...]
    runs: bool
    reason: str
    milliseconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, for JSON."""
        return asdict(self)


def diagnose(report: Report = silent) -> list[Diagnosis]:
    """Returns the diagnosis of every backend. `report` is called when the backends are timed."""
    found = [diagnose_backend(name) for name in BACKENDS]
    timed = [d.backend for d in found if "cpu" in d.builds_for and d.backend not in SLOW_TO_BUILD]
    milliseconds = time_on_cpu(timed, Precision.FP32, report)
    return [replace(d, milliseconds=milliseconds.get(d.backend)) for d in found]


def diagnose_backend(name: str) -> Diagnosis:
    """Builds an engine for one target of each compute capability, and runs it if this machine can.

    Of GPUs that are not here, and that a backend compiles for all in one way but slowly, the first that works
    stands for the others that the backend does not refuse. Returns what was found. If the backend fails, its
    error is part of the result and is not raised.
    """
    backend = find_backend(name)
    version = installed_version(backend.PACKAGES)
    built: list[str] = []
    reasons: list[str] = []
    runs = works_without_gpu = False
    for target in {t.compute_capability: t for t in reversed(TARGETS.values())}.values():
        precision = Precision.FP32 if target.is_cpu else Precision.FP16
        if reason := backend.cannot_build(target, precision):
            reasons.append(reason)
            continue
        without_gpu = bool(backend.options(target, precision, (), silent).get("without_gpu"))
        try:
            db = None if without_gpu and works_without_gpu else try_backend(backend, target, precision)
        except LcmCompileError as error:
            reasons.append(error.message)
            continue
        works_without_gpu |= without_gpu
        built += [t.name for t in TARGETS.values() if t.compute_capability == target.compute_capability]
        if db is None:
            reasons.append(f"can't run: {backend.cannot_run(target)}")
        else:
            runs = True
            reasons.insert(0, f"built and ran a small network, {db:.0f} dB from torch")
    order = list(TARGETS)
    return Diagnosis(name, version, tuple(sorted(built, key=order.index)), runs, main_reason(reasons, runs))


def main_reason(reasons: list[str], runs: bool) -> str:
    """Returns the reason to show: that an engine ran, or otherwise the one that holds for most targets."""
    if runs or not reasons:
        return reasons[0] if reasons else ""
    return max(reasons, key=reasons.count)


def try_backend(backend: Backend, target: GpuTarget, precision: Precision) -> float | None:
    """Builds and runs a small network's engine, and returns its signal-to-noise ratio against torch in dB.

    Returns None if engines for this target can't run on this machine. Raises BackendError if the engine can't
    be built or loaded.
    """
    import torch

    from lcm_compile.stages.half_precision import to_precision
    from lcm_compile.stages.stage import Stage

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.layer = torch.nn.Linear(16, 16)
            with torch.no_grad():
                for parameter in self.layer.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.layer(x.to(self.layer.weight.dtype))).float()

    spec = TensorSpec("x", (2, 16), "float32", "input")
    contract = StageContract("small", (spec,), (TensorSpec("y", (2, 16), "float32", "output"),))
    module = Small().eval().requires_grad_(False)
    x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)
    expected = module(torch.from_numpy(x)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        graphs, engines = Path(folder) / "graphs", Path(folder) / "engines"
        graphs.mkdir()
        engines.mkdir()
        stage = Stage(contract, to_precision(module, precision.floats))
        graph = export_stage(stage, backend.GRAPH_FORMAT, precision, graphs)
        path = backend.build(graph, target, engines, backend.options(target, precision, (), silent))
        if backend.cannot_run(target):
            return None
        with backend.load(path, contract, target, precision) as runner:
            return snr_db(expected, runner.to_host(runner({"x": runner.to_device(x)})["y"]))
