"""Describes the machine and the library versions with which samples were taken."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Self

from lcm_compile.benchmarks.measure.peaks import Peak
from lcm_compile.benchmarks.measure.report import Environment
from lcm_compile.engines.gpu import DRIVER
from lcm_compile.precisions import Precision
from lcm_compile.system.processor import read_processor
from lcm_compile.system.versions import RECORDED_PACKAGES, versions_of
from lcm_compile.targets import GpuTarget

LOOK = 0.05  # seconds between two readings of the GPU's memory


def environment_of(target: GpuTarget, threads: int, peaks: Mapping[Precision, Peak]) -> Environment:
    """Returns a description of this machine, the installed versions and the current time.

    `threads` is how many threads drew, and `peaks` holds the device's peak for each precision.
    """
    return Environment(
        device=processor() if target.is_cpu else gpu_name(),
        processor=processor(),
        cores=len(os.sched_getaffinity(0)),
        versions=versions(),
        taken=datetime.now(UTC).isoformat(timespec="seconds"),
        gpu_driver=DRIVER.read_text().strip() if DRIVER.is_file() else None,
        threads=threads,
        peak_flops={precision: peak.flops for precision, peak in peaks.items()},
        bandwidth=max((peak.bandwidth for peak in peaks.values()), default=None),
    )


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect speed, by name."""
    return {"python": platform.python_version(), **versions_of(RECORDED_PACKAGES)}


def processor() -> str:
    """Returns the processor's name and, in brackets, the features that decide how fast a network runs."""
    here = read_processor()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    features = ", ".join(name for name in wanted if name in here.features)
    return f"{here.name} ({features})" if features else here.name


def gpu_name() -> str:
    """Returns the first GPU's name, or "no GPU"."""
    from lcm_compile.engines.gpu import gpu_here

    here = gpu_here()
    return here[0] if here else "no GPU"


def gpu_memory_used() -> int | None:
    """Returns the bytes that all processes use on the first GPU, from nvidia-smi; None without a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout.strip()) << 20
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


class PeakGpuMemory:
    """A context manager that reads, every LOOK seconds, how much of the first GPU's memory is in use.

    `bytes` is the largest growth since the context was entered, None without a GPU. The measure is the same
    for every library and includes the driver's share. It counts all processes, so that nothing else may load
    while the context is open. Memory that is allocated and freed between two readings is missed, but the
    libraries' allocators keep what they allocated.
    """

    bytes: int | None = None

    def __enter__(self) -> Self:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(gpu_memory_used(),), daemon=True)
        self._thread.start()
        return self

    def _sample(self, before: int | None) -> None:
        while before is not None:
            last = self._ended.wait(LOOK)
            if (used := gpu_memory_used()) is not None:
                self.bytes = max(used - before, self.bytes or 0)
            if last:
                return

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
