"""Backends: each turns an exported graph into an engine for a target, and runs that engine.

Every module here that BACKENDS names has the same shape:

GRAPH_FORMAT              the graph it builds from
PACKAGES                  distributions that it needs; the installed one's version goes into the key
cannot_build(target, precision) -> str | None    why it can't build that here, or None
cannot_run(target) -> str | None                 why its engines for that target can't run here, or None
cannot_load(built_with, options) -> str | None   why an engine of that version and those options can't be
                                                 loaded by what is installed here, or None
options(target) -> dict                          builder options; they go into the key
build(graph, target, folder) -> Path             writes the engine file
load(path, contract, target) -> Runner           an engine, ready to run
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lcm_compile.engines.runner import Runner
from lcm_compile.errors import BackendError, unknown_name
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.system.versions import installed_version
from lcm_compile.targets import TARGETS, GpuTarget

# In the order in which they are tried where none is asked for.
BACKENDS = {
    "tensorrt-rtx": "lcm_compile.engines.tensorrt_rtx",
    "tensorrt": "lcm_compile.engines.tensorrt",
    "onnxruntime": "lcm_compile.engines.onnxruntime",
    "openvino": "lcm_compile.engines.openvino",
    "torchscript": "lcm_compile.engines.torchscript",
    "aotinductor": "lcm_compile.engines.aotinductor",
    "onnxruntime-tensorrt": "lcm_compile.engines.onnxruntime_tensorrt",
}

ON_THE_GPU = (
    "on the machine with the {} itself: pip install 'lcm-compile[tensorrt]', and build there; "
    "lcm-compile doctor tells what works"
)


class Backend(Protocol):
    """What a backend module offers; the modules themselves are the implementations."""

    GRAPH_FORMAT: str
    PACKAGES: tuple[str, ...]

    def cannot_build(self, target: GpuTarget, precision: Precision) -> str | None: ...
    def cannot_run(self, target: GpuTarget) -> str | None: ...
    def cannot_load(self, built_with: str, options: Mapping[str, Any]) -> str | None: ...
    def options(self, target: GpuTarget) -> Mapping[str, Any]: ...
    def build(self, graph: ExportedGraph, target: GpuTarget, folder: Path) -> Path: ...
    def load(self, path: Path, contract: StageContract, target: GpuTarget) -> Runner: ...


def find_backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS, "lcm-compile doctor")
    return importlib.import_module(BACKENDS[name])  # type: ignore[return-value]


def choose_backend(
    target: GpuTarget, precision: Precision, graph_format: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """The first backend, in the table's order, that can build for the target here; why those before can't.

    Only from graphs of `graph_format`, if that is given.
    BackendError lists every candidate with its reason when none can.
    """
    reasons: list[str] = []
    for name in BACKENDS:
        reason = cannot_build_from(name, target, precision, graph_format)
        if reason is None:
            return name, tuple(reasons)
        reasons.append(f"{name}: {reason}")
    raise BackendError(
        f"no backend can build {precision} engines for {target.name} here.\n  " + "\n  ".join(reasons),
        "lcm-compile doctor" if target.is_cpu else ON_THE_GPU.format(target.description),
    )


def cannot_build_from(
    name: str, target: GpuTarget, precision: Precision, graph_format: str | None
) -> str | None:
    """Why a backend can't build for the target here, or not from graphs of that format if one is given."""
    backend = find_backend(name)
    reason = backend.cannot_build(target, precision)
    if reason is None and graph_format not in (None, backend.GRAPH_FORMAT):
        return f"builds from {backend.GRAPH_FORMAT} graphs"
    return reason


def find_target_here() -> str:
    """The name of the target that this machine's GPU is, or "cpu".

    Of those of its compute capability, the one most of whose description is in the GPU's name, and of equals
    the one with most nearly its memory: NVIDIA calls both kinds of A100 so.
    """
    from lcm_compile.engines.gpu import gpu_here, gpu_memory

    name, capability = gpu_here() or ("", "")
    words, memory = re.findall(r"\w+", name.lower()), gpu_memory()

    def likeness(target: GpuTarget) -> tuple[int, int]:
        told = sum(word in words for word in target.description.lower().split())
        return told, -abs((target.memory_bytes or 0) - memory)

    alike = [target for target in TARGETS.values() if target.compute_capability == capability]
    return max(alike, key=likeness).name if alike else "cpu"


def other_version(built_with: str, packages: tuple[str, ...]) -> str | None:
    """Why an engine that runs with nothing but the version that built it can't run here, or None.

    What follows a plus (the CUDA version, of torch) is told apart by the target.
    """
    here = installed_version(packages)
    if here and here.partition("+")[0] == built_with.partition("+")[0]:
        return None
    return f"it was built with {built_with}, and only that version can load it; here is {here}"
