"""A benchmark as a picture."""

from __future__ import annotations

from pathlib import Path

from lcm_compile.benchmarks.report import BenchmarkReport


def check_plot(path: Path) -> None:
    pass


def plot_report(report: BenchmarkReport, path: Path) -> None:
    pass
