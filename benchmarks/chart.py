"""A benchmark as a picture: the stages' times, and the time of a picture against its quality."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lcm_compile.benchmarks.bench import REFERENCE
from lcm_compile.benchmarks.report import BenchmarkReport, Case
from lcm_compile.benchmarks.rivals import SELF
from lcm_compile.benchmarks.summary import stages_of, told_ms
from lcm_compile.errors import UsageError
from lcm_compile.files import check_file, replacing

COLOURS = ("#1f4e79", "#d9822b", "#3f8f5f", "#8e5ea2", "#b03a48", "#7f7f7f")


def check_plot(path: Path) -> None:
    """UsageError where no PNG can be drawn to `path`."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} is no .png file", "for example --plot bench.png")
    check_file(path, "--plot")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is missing", "pip install matplotlib")


def plot_report(report: BenchmarkReport, path: Path) -> None:
    """Writes a PNG: bars of the stages at the left; at the right, where pictures were compared, quality."""
    from lcm_compile.benchmarks.proof_figures import plots

    plt = plots()
    picture = report.cases[0]
    names = [SELF, *picture.rivals]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    compared = REFERENCE in picture.rivals
    cases = [*stages_of(report), picture]
    tall = 2.4 + 0.16 * len(cases) * max(len(names), 3)  # inches: a line of text for each bar
    figure, found = plt.subplots(
        1, 1 + compared, figsize=(10.5 if compared else 6.5, tall), dpi=150, squeeze=False
    )
    axes = found[0]
    handles = draw_bars(axes[0], cases, colours)
    if compared:
        draw_quality(axes[1], picture, colours)
    asked = report.benchmark
    precisions = ", ".join(sorted(set(asked.precisions.values())))
    figure.suptitle(f"{Path(asked.spec.base).name} {asked.shape}, {asked.backend} {precisions}")
    figure.legend(
        handles, [Path(name).name for name in names], loc="lower center", ncols=len(names), frameon=False
    )
    figure.text(0.5, 0.34 / tall, report.environment.device, ha="center", size=8, color="#555555")
    figure.tight_layout(rect=(0, 0.5 / tall, 1, 1))
    with replacing(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)


def median_of(case: Case, name: str) -> float | None:
    if name == SELF:
        return median(case.samples_ms)
    return median(case.rivals[name].samples_ms) if name in case.rivals else None


def draw_bars(axes: Any, cases: Sequence[Case], colours: dict[str, str]) -> list[Any]:
    """A group of bars for each stage and for the whole picture; returns those of each, for the legend."""
    tall = 0.8 / len(colours)
    handles = []
    for i, (name, colour) in enumerate(colours.items()):
        bars = [(row, ms) for row, case in enumerate(cases) if (ms := median_of(case, name)) is not None]
        places = [row + i * tall for row, _ in bars]
        drawn = axes.barh(places, [ms for _, ms in bars], tall * 0.92, color=colour)
        handles.append(drawn)
        axes.bar_label(drawn, [told_ms(ms) for _, ms in bars], padding=3, size=8)
    axes.set_yticks([row + 0.4 - tall / 2 for row in range(len(cases))], [case.name for case in cases])
    axes.invert_yaxis()
    axes.margins(x=0.2)  # room for the labels
    axes.set_xlabel("milliseconds, median")
    return handles


def draw_quality(axes: Any, picture: Case, colours: dict[str, str]) -> None:
    """Milliseconds of a picture against its PSNR to diffusers' own; a line for those."""
    parity = {SELF: picture.parity_db, **{name: rival.parity_db for name, rival in picture.rivals.items()}}
    for name, colour in colours.items():
        ms, db = median_of(picture, name) or 0.0, parity[name]
        if name == REFERENCE:
            axes.axvline(ms, color=colour, linestyle="--")
        elif db is not None:
            axes.scatter([ms], [db], s=70, color=colour, zorder=3)
    axes.margins(0.2)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds a picture, median")
    axes.set_ylabel(f"PSNR to the picture of {REFERENCE} (dashed), dB")
