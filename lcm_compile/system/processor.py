"""This machine's processor, as far as machine code compiled for it depends on it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# The vector and matrix extensions of x86, by how the kernel names them. All of a name's kind are taken
# (avx512_bf16, amx_int8, …): a compiler told to use this processor may use any of them.
KINDS = ("amx", "avx", "bmi", "f16c", "fma", "gfni", "sse4", "vaes", "vpclmulqdq")


@dataclass(frozen=True)
class Processor:
    """The processor's name, and the features that every core of it has, as the kernel names both."""

    name: str
    features: frozenset[str]


def read_processor(cpuinfo: Path = CPUINFO) -> Processor:
    """Reads what the kernel says of the processor; where it says nothing, the name is the architecture's."""
    fields = [line.partition(":") for line in (cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ())]
    values = [(name.strip(), value.strip()) for name, _, value in fields]
    cores = [set(value.split()) for name, value in values if name in ("flags", "Features")]
    names = (value for name, value in values if name == "model name")
    fallback = platform.processor() or platform.machine()
    return Processor(next(names, fallback), frozenset(set.intersection(*cores) if cores else ()))


def instruction_set(cpuinfo: Path = CPUINFO) -> list[str]:
    """The architecture and, sorted, the vector and matrix extensions that every core of this machine has.

    On another architecture than x86 all features are listed; where the kernel lists none, the architecture
    alone is.
    """
    machine = platform.machine()
    features = read_processor(cpuinfo).features
    if machine == "x86_64":
        features = frozenset(feature for feature in features if feature.startswith(KINDS))
    return [machine, *sorted(features)]


def model_name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name, with the number of threads that engines compute with here."""
    return f"{read_processor(cpuinfo).name}, {threads()} threads"


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
