"""Reads what this machine's processor can do, as far as compiled code and its speed depend on it."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from lcm_compile.system.limits import cpu_quota

CPUINFO = Path("/proc/cpuinfo")
# The beginnings of the kernel's names for the vector and matrix extensions of x86. Every name that begins so
# counts (avx512_bf16, amx_int8, …), because a compiler that targets this processor may use any of them.
KINDS = ("amx", "avx", "bmi", "f16c", "fma", "gfni", "sse4", "vaes", "vpclmulqdq")


@dataclass(frozen=True)
class Processor:
    """A processor's name and the features that all its cores have, both as the kernel names them."""

    name: str
    features: frozenset[str]


def read_processor(cpuinfo: Path = CPUINFO) -> Processor:
    """Returns the processor as the kernel describes it. Without a name there, it has the architecture's."""
    fields = [line.partition(":") for line in (cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ())]
    values = [(name.strip(), value.strip()) for name, _, value in fields]
    cores = [set(value.split()) for name, value in values if name in ("flags", "Features")]
    names = (value for name, value in values if name == "model name")
    fallback = platform.processor() or platform.machine()
    return Processor(next(names, fallback), frozenset(set.intersection(*cores) if cores else ()))


def instruction_set(cpuinfo: Path = CPUINFO) -> list[str]:
    """Returns the architecture, followed by the sorted vector and matrix extensions that every core has.

    On architectures other than x86 it lists all features. If the kernel lists none, it returns the
    architecture alone.
    """
    machine = platform.machine()
    features = read_processor(cpuinfo).features
    if machine == "x86_64":
        features = frozenset(feature for feature in features if feature.startswith(KINDS))
    return [machine, *sorted(features)]


def model_name(cpuinfo: Path = CPUINFO) -> str:
    """Returns the processor's name and the number of threads that engines compute with here."""
    return f"{read_processor(cpuinfo).name}, {threads()} threads"


def threads() -> int:
    """Returns how many threads an engine computes with: OMP_NUM_THREADS, or else physical_cores().

    Torch heeds the variable and the set of cores that the process may run on by itself, and OpenVINO the set;
    the thread pool of ONNX Runtime ignores both, and all of them ignore a container's quota.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) else physical_cores()


def physical_cores() -> int:
    """Returns the number of physical cores that this process may run on, at most its container's quota.

    Logical cores are not counted, because two threads on one physical core share its multipliers. A quota of
    1.5 processors counts as 2: with one thread, a third of it would stay unused.
    """
    cores = cores_of_affinity()
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def share_quota() -> None:
    """Sets OMP_NUM_THREADS to a container's quota for this process and its children, unless it is set.

    Torch reads it when it is imported, and so is as fast as it can be while it builds, too.
    """
    if cpu_quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(physical_cores()))


def cores_of_affinity() -> int:
    """Returns the number of physical cores in the set that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    if affinity is None:
        return os.cpu_count() or 1
    siblings = set()
    for cpu in affinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.is_file() else str(cpu))
    return len(siblings)
