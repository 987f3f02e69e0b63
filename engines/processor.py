"""This machine's processor, as far as machine code compiled for it depends on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# The vector and matrix extensions of x86, by how the kernel names them. All of a name's kind are taken
# (avx512_bf16, amx_int8, …): a compiler told to use this processor may use any of them.
KINDS = ("amx", "avx", "bmi", "f16c", "fma", "gfni", "sse4", "vaes", "vpclmulqdq")


def instruction_set(cpuinfo: Path = CPUINFO) -> list[str]:
    """The architecture and, sorted, the extensions that every core of this machine has.

    Of another architecture than x86 the kernel's whole list is taken; where it tells none, the
    architecture alone.
    """
    machine = platform.machine()
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cores = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    flags = set.intersection(*cores) if cores else set()
    if machine == "x86_64":
        flags = {flag for flag in flags if flag.startswith(KINDS)}
    return [machine, *sorted(flags)]


def model_name(cpuinfo: Path = CPUINFO) -> str:
    """As the kernel tells it, with the number of threads that engines compute with here."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {threads()} threads"


def threads() -> int:
    """How many threads an engine computes with: OMP_NUM_THREADS, or one for each of physical_cores().

    Torch does so by itself. ONNX Runtime's own pool heeds neither that variable nor what cores a process
    may run on, and OpenVINO's heeds only the latter.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) else physical_cores()


def physical_cores() -> int:
    """Those that this process may run on: two threads on one core have one set of multipliers."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    if affinity is None:
        return os.cpu_count() or 1
    siblings = set()
    for cpu in affinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.is_file() else str(cpu))
    return len(siblings)
