"""Draws a benchmark as a figure: the stages' times, and the time of a picture against its quality."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lcm_compile.benchmarks.measure.pictures import REFERENCE
from lcm_compile.benchmarks.measure.report import BenchmarkReport, Case
from lcm_compile.benchmarks.measure.rivals import SELF
from lcm_compile.benchmarks.measure.summary import batches_of, ms_text, stages_of
from lcm_compile.errors import UsageError
from lcm_compile.system.files import check_file, replacing_output

COLOURS = ("#1f4e79", "#d9822b", "#3f8f5f", "#8e5ea2", "#b03a48", "#7f7f7f")


def check_plot(path: Path) -> None:
    """Raises UsageError if `--plot` can't write a PNG to `path`, or if matplotlib is missing."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} does not end in .png", "for example --plot bench.png")
    check_file(path, "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is missing", "pip install matplotlib")


def plot_report(report: BenchmarkReport, path: Path) -> None:
    """Draws the report and writes it to `path` as a PNG."""
    from lcm_compile.benchmarks.measure.plots import plots

    figure = draw_report(report)
    with replacing_output(path) as temporary:
        figure.savefig(temporary, format="png")
    plots().close(figure)


def draw_report(report: BenchmarkReport) -> Any:
    """Returns a matplotlib figure with the stages' times on the left, and on the right, if known, quality."""
    from lcm_compile.benchmarks.measure.plots import plots

    picture = report.cases[0]
    batches = batches_of(report)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(batches)}
    known = {picture.parity_db, *(rival.parity_db for rival in picture.rivals.values())} != {None}
    cases = [*stages_of(report), picture]
    height = 2.4 + 0.16 * len(cases) * max(len(batches), 3)  # inches: a line of text for each bar
    figure, grid = plots().subplots(
        1, 1 + known, figsize=(10.5 if known else 6.5, height), dpi=150, squeeze=False
    )
    axes = grid[0]
    handles = draw_bars(axes[0], cases, batches, colours)
    if known:
        draw_quality(axes[1], picture, batches, colours)
    benchmark = report.benchmark
    precisions = ", ".join(sorted(set(benchmark.precisions.values())))
    figure.suptitle(f"{Path(benchmark.spec.base).name} {benchmark.shape}, {benchmark.backend} {precisions}")
    figure.legend(
        handles, [Path(name).name for name in batches], loc="lower center", ncols=len(batches), frameon=False
    )
    figure.text(0.5, 0.34 / height, report.environment.device, ha="center", size=8, color="#555555")
    figure.tight_layout(rect=(0, 0.5 / height, 1, 1))
    return figure


def median_of(case: Case, name: str, batches: Mapping[str, int]) -> float | None:
    """Returns the median milliseconds for one picture, or None if this program did not time the case."""
    if name != SELF and name not in case.rivals:
        return None
    return median(case.samples_ms if name == SELF else case.rivals[name].samples_ms) / batches[name]


def draw_bars(
    axes: Any, cases: Sequence[Case], batches: Mapping[str, int], colours: Mapping[str, str]
) -> list[Any]:
    """Draws a group of bars for each case, and returns each program's bars for the legend."""
    height = 0.8 / len(colours)
    handles = []
    for i, (name, colour) in enumerate(colours.items()):
        medians = [(row, median_of(case, name, batches)) for row, case in enumerate(cases)]
        known = {row: ms for row, ms in medians if ms is not None}
        bars = axes.barh(
            [row + i * height for row in known], list(known.values()), height * 0.92, color=colour
        )
        handles.append(bars)
        axes.bar_label(bars, [ms_text(ms) for ms in known.values()], padding=3, size=8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(cases))], [case.name for case in cases])
    axes.invert_yaxis()
    axes.margins(x=0.2)  # room for the labels
    axes.set_xlabel("milliseconds a picture, median")
    return handles


def draw_quality(axes: Any, picture: Case, batches: Mapping[str, int], colours: Mapping[str, str]) -> None:
    """Plots each program's milliseconds for a picture against the PSNR of its pictures.

    The PSNR is to the picture of the rival REFERENCE, which is a vertical line. Without that rival, it is to
    torch's picture, as the builds recorded it. Every other program with a known PSNR is a point.
    """
    parity = {SELF: picture.parity_db, **{name: rival.parity_db for name, rival in picture.rivals.items()}}
    for name, db in parity.items():
        ms = median_of(picture, name, batches) or 0.0
        if name == REFERENCE:
            axes.axvline(ms, color=colours[name], linestyle="--")
        elif db is not None:
            axes.scatter([ms], [db], s=70, color=colours[name], zorder=3)
    axes.margins(0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds a picture, median")
    reference = f"of {REFERENCE} (dashed)" if REFERENCE in parity else "of torch, as recorded by its build"
    axes.set_ylabel(f"PSNR to the picture {reference}, dB")
