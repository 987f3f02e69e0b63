"""A benchmark as a picture: the stages' times, and the time of a picture against its quality."""

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
    """UsageError where no PNG can be drawn to `path`."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} is no .png file", "for example --plot bench.png")
    check_file(path, "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is missing", "pip install matplotlib")


def plot_report(report: BenchmarkReport, path: Path) -> None:
    """Writes a PNG of the figure."""
    from lcm_compile.benchmarks.measure.plots import plots

    figure = draw_report(report)
    with replacing_output(path) as part:
        figure.savefig(part, format="png")
    plots().close(figure)


def draw_report(report: BenchmarkReport) -> Any:
    """A matplotlib figure: bars of the stages at the left; at the right quality, where any is known."""
    from lcm_compile.benchmarks.measure.plots import plots

    picture = report.cases[0]
    batches = batches_of(report)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(batches)}
    known = {picture.parity_db, *(rival.parity_db for rival in picture.rivals.values())} != {None}
    cases = [*stages_of(report), picture]
    tall = 2.4 + 0.16 * len(cases) * max(len(batches), 3)  # inches: a line of text for each bar
    figure, found = plots().subplots(
        1, 1 + known, figsize=(10.5 if known else 6.5, tall), dpi=150, squeeze=False
    )
    axes = found[0]
    handles = draw_bars(axes[0], cases, batches, colours)
    if known:
        draw_quality(axes[1], picture, batches, colours)
    asked = report.benchmark
    precisions = ", ".join(sorted(set(asked.precisions.values())))
    figure.suptitle(f"{Path(asked.spec.base).name} {asked.shape}, {asked.backend} {precisions}")
    figure.legend(
        handles, [Path(name).name for name in batches], loc="lower center", ncols=len(batches), frameon=False
    )
    figure.text(0.5, 0.34 / tall, report.environment.device, ha="center", size=8, color="#555555")
    figure.tight_layout(rect=(0, 0.5 / tall, 1, 1))
    return figure


def median_of(case: Case, name: str, batches: Mapping[str, int]) -> float | None:
    """Milliseconds for one picture."""
    if name != SELF and name not in case.rivals:
        return None
    return median(case.samples_ms if name == SELF else case.rivals[name].samples_ms) / batches[name]


def draw_bars(
    axes: Any, cases: Sequence[Case], batches: Mapping[str, int], colours: Mapping[str, str]
) -> list[Any]:
    """A group of bars for each stage and for the whole picture; returns those of each, for the legend."""
    tall = 0.8 / len(colours)
    handles = []
    for i, (name, colour) in enumerate(colours.items()):
        found = [(row, median_of(case, name, batches)) for row, case in enumerate(cases)]
        bars = {row: ms for row, ms in found if ms is not None}
        drawn = axes.barh([row + i * tall for row in bars], list(bars.values()), tall * 0.92, color=colour)
        handles.append(drawn)
        axes.bar_label(drawn, [ms_text(ms) for ms in bars.values()], padding=3, size=8)
    axes.set_yticks([row + 0.4 - tall / 2 for row in range(len(cases))], [case.name for case in cases])
    axes.invert_yaxis()
    axes.margins(x=0.2)  # room for the labels
    axes.set_xlabel("milliseconds a picture, median")
    return handles


def draw_quality(axes: Any, picture: Case, batches: Mapping[str, int], colours: Mapping[str, str]) -> None:
    """Milliseconds of a picture against its PSNR to diffusers' own, or to torch's when it was built.

    A line for diffusers; a point for each other whose PSNR is known.
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
