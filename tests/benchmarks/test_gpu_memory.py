"""The peak of a GPU's memory, with a stand-in for the driver's own tool."""

from __future__ import annotations

import time

import pytest

from lcm_compile.benchmarks.measure.bench import take_warm
from lcm_compile.benchmarks.measure.environment import LOOK, PeakGpuMemory
from lcm_compile.benchmarks.measure.rivals import draw_with_bundle
from lcm_compile.benchmarks.measure.worker import Maker

MIB = 1 << 20


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on PATH that tells, look by look, these MiB; the last of them from then on."""

    def tells(*mebibytes):
        told = tmp_path / "told"
        told.write_text("".join(f"{number}\n" for number in mebibytes))
        tool = tmp_path / "nvidia-smi"
        tool.write_text(
            "#!/bin/sh\n"
            'case "$*" in *=memory.used*=csv,noheader,nounits*"-i 0"*) ;; *) exit 9;; esac\n'
            f'head -n 1 "{told}"\n'
            f'[ "$(wc -l < "{told}")" = 1 ] || sed -i 1d "{told}"\n'
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return tells


def test_what_is_freed_again_counts(nvidia_smi):
    nvidia_smi(100, 300, 1100, 600)
    with PeakGpuMemory() as gpu:
        time.sleep(20 * LOOK)
    assert gpu.bytes == 1000 * MIB


def test_what_is_taken_last_counts(nvidia_smi):
    nvidia_smi(100, 400)
    with PeakGpuMemory() as gpu:
        pass
    assert gpu.bytes == 300 * MIB


def test_without_a_gpu_there_is_no_figure(nvidia_smi, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with PeakGpuMemory() as gpu:
        time.sleep(2 * LOOK)
    assert gpu.bytes is None


def test_loading_and_drawing_are_watched_one_by_one(nvidia_smi, sdxl_bundle):
    """The second finds what the first still holds."""
    nvidia_smi(50, 850, 450)
    drawers = {name: Maker(draw_with_bundle, (sdxl_bundle,)) for name in ("ours", "twin")}
    measured = take_warm(drawers, "a star", 1, 1, 60.0, lambda *_: None)
    assert measured.gpu_memory == {"ours": 800 * MIB, "twin": 0}
