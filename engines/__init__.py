"""Backends: each builds an engine from an exported graph for one target, and runs that engine.

Each module that BACKENDS lists implements the `Backend` protocol below.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lcm_compile.engines.runner import Runner
from lcm_compile.errors import BackendError, unknown_name
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.system.stopwatch import Report
from lcm_compile.system.versions import installed_version
from lcm_compile.targets import PRECISIONS, TARGETS, GpuTarget

# The module of each backend, in the order in which choose_backend tries them.
BACKENDS = {
    "tensorrt-rtx": "lcm_compile.engines.tensorrt_rtx",
    "tensorrt": "lcm_compile.engines.tensorrt",
    "onnxruntime": "lcm_compile.engines.onnxruntime",
    "openvino": "lcm_compile.engines.openvino",
    "torchscript": "lcm_compile.engines.torchscript",
    "aotinductor": "lcm_compile.engines.aotinductor",
    "onnxruntime-tensorrt": "lcm_compile.engines.onnxruntime_tensorrt",
}

# Those whose engines can run on GPUs of several compute capabilities.
FOR_SEVERAL = ("tensorrt-rtx",)

ON_THE_GPU = (
    "on the machine with the {} itself: pip install 'lcm-compile[tensorrt]', and build there; "
    "or here, in an environment of its own: pip install 'lcm-compile[cross]'; "
    "lcm-compile doctor shows what works"
)


class Backend(Protocol):
    """What every backend module provides. The modules themselves are the implementations.

    A module that does not depend on the last arguments of a function takes them as `*_`.
    """

    # The format of the graphs that it builds from.
    GRAPH_FORMAT: str
    # The distributions that can provide its library. The bundle's key has the first installed one's version.
    PACKAGES: tuple[str, ...]

    def cannot_build(self, target: GpuTarget, precision: Precision) -> str | None:
        """Returns why this machine can't build an engine for the target in that precision, or None."""

    def cannot_run(self, target: GpuTarget) -> str | None:
        """Returns why this machine can't run engines for the target, or None."""

    def cannot_load(self, built_with: str, options: Mapping[str, Any]) -> str | None:
        """Returns why the installed library can't load an engine, or None.

        `built_with` is the package and version that built the engine, `options` are its builder options.
        """

    def options(
        self, target: GpuTarget, precision: Precision, rewrites: Collection[str], report: Report
    ) -> Mapping[str, Any]:
        """Returns the builder options for the target. They are part of the bundle's key.

        `precision` is the step's, and `rewrites` are the names of those in spec.REWRITES that are asked for.
        `report` is called if something is measured for it. Raises BackendError if that fails.
        """

    def build(
        self, graph: ExportedGraph, target: GpuTarget, folder: Path, options: Mapping[str, Any]
    ) -> Path:
        """Builds an engine file in `folder` by these options, and returns its path.

        Raises BackendError if that fails.
        """

    def load(
        self, path: Path, contract: StageContract, target: GpuTarget, precision: Precision = Precision.FP32
    ) -> Runner:
        """Loads an engine file, which was built from a graph of that precision.

        On a GPU an engine in fp32 does not round to TF32. Raises BackendError if the file can't be loaded or
        does not fit the contract.
        """


def find_backend(name: str) -> Backend:
    """Returns the module of a backend. Raises UsageError for an unknown name."""
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS, "lcm-compile doctor")
    return importlib.import_module(BACKENDS[name])


def choose_backend(
    target: GpuTarget, precision: Precision, graph_format: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Returns the first backend of BACKENDS that can build for the target here, and why earlier ones can't.

    A reason has the form "name: reason". If `graph_format` is given, only backends that build from graphs of
    that format qualify. Raises BackendError with every backend's reason if none qualifies.
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
    """Returns why a backend can't build for the target here, or None.

    If `graph_format` is given, a backend that builds from graphs of another format can't build either.
    """
    backend = find_backend(name)
    if target.further_capabilities and name not in FOR_SEVERAL:
        return "builds for one kind of GPU at a time"
    reason = backend.cannot_build(target, precision)
    if reason is None and graph_format not in (None, backend.GRAPH_FORMAT):
        return f"it builds from {backend.GRAPH_FORMAT} graphs; these are {graph_format}"
    return reason


def shared_target(
    name: str, target: GpuTarget, others: Sequence[GpuTarget], precision: Precision
) -> tuple[GpuTarget, GpuTarget, tuple[str, ...]]:
    """Returns what a backend builds engines for: for a target alone, with others, and which others those are.

    Of several compute capabilities a target keeps those for which the backend builds in the precision. The
    second is the target with the capabilities of those others too for which it builds.
    """
    if name not in FOR_SEVERAL:
        return target, target, ()

    def able(one: GpuTarget) -> list[str]:
        return [c for c in one.capabilities if not cannot_build_from(name, one.of([c]), precision, None)]

    joined = [other for other in others if able(other)]
    found = {c for one in (target, *joined) for c in able(one)}
    wide = target.of([c for c in PRECISIONS if c in found])
    return target.of(able(target)), wide, tuple(other.name for other in joined)


def find_target_here() -> str:
    """Returns the name of the target that this machine's GPU matches, or "cpu" if there is none.

    It compares the targets of the GPU's compute capability, and returns the one whose description shares
    the most words with the GPU's name. The memory size breaks a tie, because NVIDIA calls the 40 GB and the
    80 GB model both "A100".
    """
    from lcm_compile.engines.gpu import gpu_here, gpu_memory

    name, capability = gpu_here() or ("", "")
    words, memory = re.findall(r"\w+", name.lower()), gpu_memory()

    def similarity(target: GpuTarget) -> tuple[int, int]:
        shared_words = sum(word in words for word in target.description.lower().split())
        return shared_words, -abs((target.memory_bytes or 0) - memory)

    candidates = [target for target in TARGETS.values() if target.compute_capability == capability]
    return max(candidates, key=similarity).name if candidates else "cpu"


def other_version(built_with: str, packages: tuple[str, ...]) -> str | None:
    """Returns why the version installed here can't load an engine, or None if it is the one that built it.

    What follows a plus sign (torch's CUDA version) is not compared: the target distinguishes those builds.
    """
    here = installed_version(packages)
    if here and here.partition("+")[0] == built_with.partition("+")[0]:
        return None
    return f"it was built with {built_with}, and only that version can load it; this machine has {here}"
