"""The GPUs (and the CPU) that engines are built for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lcm_compile.errors import UsageError, unknown_name
from lcm_compile.precisions import Precision

GIB = 1024**3


@dataclass(frozen=True)
class GpuTarget:
    """A device that engines are built for.

    `compute_capability` is None for a CPU. `memory_bytes` is None if it differs between machines.
    `precisions` are the types that the device computes in. A target of several compute capabilities stands
    for every GPU of these; `further_capabilities` are those after the first.
    """

    name: str
    description: str
    compute_capability: str | None
    memory_bytes: int | None
    precisions: tuple[str, ...]
    further_capabilities: tuple[str, ...] = ()

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The compute capabilities. A CPU has none."""
        return (
            () if self.compute_capability is None else (self.compute_capability, *self.further_capabilities)
        )

    def of(self, capabilities: Sequence[str]) -> GpuTarget:
        """Returns the target with these compute capabilities, of which there is at least one."""
        first, *rest = capabilities
        precisions = tuple(dict.fromkeys(name for c in capabilities for name in PRECISIONS[c]))
        return replace(
            self, compute_capability=first, further_capabilities=tuple(rest), precisions=precisions
        )

    @property
    def is_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.compute_capability is None

    @property
    def accelerator_type(self) -> str:
        """Ray's name of the GPU, which its nodes make of the driver's name in the same way."""
        return re.sub(r"^Tesla | \d+ GB$| \(.*$", "", self.description).replace(" ", "-")

    def needs_of_node(self, cores: int) -> dict[str, Any]:
        """Returns what Ray is told that work for the device needs of a node: the GPU, or that many cores.

        Ray can't be told of several kinds of GPU, so for such a target that is any GPU.
        """
        if self.is_cpu:
            return {"num_cpus": cores}
        kind = {} if self.further_capabilities else {"accelerator_type": self.accelerator_type}
        return {"num_cpus": 1, "num_gpus": 1, **kind}

    def lacks(self, precision: Precision) -> list[str]:
        """Returns the types of a precision that the device does not compute in."""
        return [name for name in precision.types if name not in self.precisions]

    def computes(self, precision: Precision) -> bool:
        """Returns whether the device computes in all types of a precision."""
        return not self.lacks(precision)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary for JSON."""
        return asdict(self)


# The precisions are those of the device's matrix units; fp8 and int8 are used by quantized graphs only. The
# compute capabilities are those of developer.nvidia.com/cuda-gpus.
TURING = ("fp32", "fp16", "int8")
AMPERE = ("fp32", "fp16", "bf16", "int8")
ADA = (*AMPERE, "fp8")

TARGETS: dict[str, GpuTarget] = {
    target.name: target
    for target in (
        GpuTarget("cpu", "this processor", None, None, ("fp32", "fp16", "bf16", "int8")),
        GpuTarget("t4", "Tesla T4", "7.5", 16 * GIB, TURING),
        GpuTarget("2080ti", "GeForce RTX 2080 Ti", "7.5", 11 * GIB, TURING),
        GpuTarget("a100", "A100", "8.0", 40 * GIB, AMPERE),
        GpuTarget("a100-80gb", "A100 80 GB", "8.0", 80 * GIB, AMPERE),
        GpuTarget("a30", "A30", "8.0", 24 * GIB, AMPERE),
        GpuTarget("a10", "A10", "8.6", 24 * GIB, AMPERE),
        GpuTarget("a10g", "A10G", "8.6", 24 * GIB, AMPERE),
        GpuTarget("a40", "A40", "8.6", 48 * GIB, AMPERE),
        GpuTarget("a6000", "RTX A6000", "8.6", 48 * GIB, AMPERE),
        GpuTarget("3060", "GeForce RTX 3060", "8.6", 12 * GIB, AMPERE),
        GpuTarget("3080", "GeForce RTX 3080", "8.6", 10 * GIB, AMPERE),
        GpuTarget("3090", "GeForce RTX 3090", "8.6", 24 * GIB, AMPERE),
        GpuTarget("4060", "GeForce RTX 4060", "8.9", 8 * GIB, ADA),
        GpuTarget("4070", "GeForce RTX 4070", "8.9", 12 * GIB, ADA),
        GpuTarget("4080", "GeForce RTX 4080", "8.9", 16 * GIB, ADA),
        GpuTarget("4090", "GeForce RTX 4090", "8.9", 24 * GIB, ADA),
        GpuTarget("l4", "L4", "8.9", 24 * GIB, ADA),
        GpuTarget("l40s", "L40S", "8.9", 48 * GIB, ADA),
        GpuTarget("h100", "H100", "9.0", 80 * GIB, ADA),
        GpuTarget("h200", "H200", "9.0", 141 * GIB, ADA),
        GpuTarget("b200", "B200", "10.0", 180 * GIB, ADA),
        GpuTarget("5070", "GeForce RTX 5070", "12.0", 12 * GIB, ADA),
        GpuTarget("5080", "GeForce RTX 5080", "12.0", 16 * GIB, ADA),
        GpuTarget("5090", "GeForce RTX 5090", "12.0", 32 * GIB, ADA),
        GpuTarget("rtx-pro-6000", "RTX PRO 6000", "12.0", 96 * GIB, ADA),
        GpuTarget("gb10", "GB10 (DGX Spark)", "12.1", 128 * GIB, ADA),
    )
}

# What GPUs of each compute capability compute in.
PRECISIONS = {t.compute_capability: t.precisions for t in TARGETS.values() if t.compute_capability}

# Every GPU that TensorRT for RTX builds for: see engines/tensorrt_rtx.py. It is not among TARGETS, because no
# machine has it.
RTX = GpuTarget("rtx", "TensorRT for RTX", "7.5", None, ()).of(("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"))

# The names that people may give an Apple GPU.
APPLE = ("mac", "macos", "apple", "mps", "metal", "coreml", "m1", "m2", "m3", "m4", "m5")


def find_target(name: str) -> GpuTarget:
    """Returns the target with this name. Raises UsageError if there is none.

    Upper and lower case, spaces, dashes and underscores make no difference, nor does a leading "RTX".
    """

    def plain(text: str) -> str:
        return text.lower().replace(" ", "").replace("-", "").replace("_", "").removeprefix("rtx")

    if name.strip().lower() == RTX.name:
        return RTX
    for target in TARGETS.values():
        if plain(target.name) == plain(name):
            return target
    if plain(name) in APPLE:
        raise UsageError(
            "no backend builds engines for Apple's GPUs",
            "on a Mac, --gpu cpu builds for its processor; docs/build.md says what to expect there",
        )
    raise unknown_name("target", name, (*TARGETS, RTX.name), "lcm-compile targets")
