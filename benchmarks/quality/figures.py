"""Draws the proof's figures: accuracy against time, and rows of pictures with their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lcm_compile.benchmarks.measure.plots import plots
from lcm_compile.demo.world import parse_caption, place, proof_prompts, render

Record = Mapping[str, Any]
Drawn = Sequence[tuple[Record, Sequence[np.ndarray]]]

# The colour of each curve, and the index of the point next to which its name is written. The colours are
# those of Okabe and Ito, which colour-blind readers can distinguish. The fastest curve has its name on the
# left, where there is space.
CURVES = {
    "LCM-LoRA": ("#0072B2", 1),
    "TCD-LoRA": ("#009E73", -1),
    "Euler": ("#D55E00", -1),
    "Euler, unguided": ("#CC79A7", -1),
    "LCM loop, no LoRA": ("#6F6F6F", -1),
}
EXAMPLE = 1  # the index of the picture in the figure of steps; it has two shapes
STYLED = 0  # the index of the picture in the figure of styles; it has a single large shape
TICKS = [digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)]  # seconds


def write_figures(out: Path, drawn: Drawn) -> None:
    """Writes the figures of all parts that `drawn` has rows of: pairs of a record and its first pictures."""
    parts = {part: [d for d in drawn if d[0]["part"] == part] for part in ("steps", "style", "universal")}
    if rows := parts["steps"]:
        accuracy_against_time([record for record, _ in rows], out / "accuracy-against-time.png")
        steps_figure(rows, out / "steps.png")
        rendered_and_drawn(rows, out / "beside.png")
    if rows := [d for d in parts["style"] if d[0]["strengths"]]:
        styles_figure(rows, out / "styles.png")
    if rows := parts["universal"]:
        universal_figure(rows, out / "universal.png")


def accuracy_against_time(records: Sequence[Record], path: Path) -> None:
    """Draws a curve for each sampler with a point for each number of steps, and with Wilson's intervals."""
    plt = plots()
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    figure, axes = plt.subplots(figsize=(8, 4.6), dpi=160)
    for label, (colour, named) in CURVES.items():
        rows = [record for record in records if record["label"] == label]
        if not rows:
            continue
        named = min(named, len(rows) - 1)
        seconds = [median(row["seconds"]) for row in rows]
        right = [row["right"]["all"] for row in rows]
        percents = [100 * share["part"] for share in right]
        axes.plot(seconds, percents, "o-", color=colour, linewidth=1.8, markersize=5)
        axes.vlines(
            seconds,
            [100 * share["low"] for share in right],
            [100 * share["high"] for share in right],
            color=colour,
            alpha=0.35,
            linewidth=3,
        )
        for row, x, y in zip(rows, seconds, percents, strict=True):
            axes.annotate(
                row["steps"],
                (x, y),
                (0, 7),
                textcoords="offset points",
                ha="center",
                color=colour,
                size=8,
                path_effects=halo,
            )
        axes.annotate(
            label,
            (seconds[named], percents[named]),
            (9 if named < 0 else -9, -3),
            textcoords="offset points",
            ha="left" if named < 0 else "right",
            color=colour,
            weight="bold",
            path_effects=halo,
        )
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    low, high = low / 1.6, high * 2.2  # room for the names
    axes.set_xlim(low, high)
    axes.set_ylim(-3, 106)
    axes.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel("seconds per picture, log scale; points are labelled with their number of steps")
    axes.set_ylabel("pictures right in every column, %")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def steps_figure(rows: Drawn, path: Path) -> None:
    """Draws one prompt and seed with each number of steps, by the LCM-LoRA and by the base."""
    lines = []
    for label, name in (("LCM-LoRA", "LCM-LoRA"), ("Euler", "base, Euler,\nguidance 3")):
        found = [(record["steps"], shown[EXAMPLE]) for record, shown in rows if record["label"] == label]
        captions = [f"{count} step{'s' * (count > 1)}" for count, _ in found]
        lines.append((name, [picture for _, picture in found], captions))
    picture_lines(lines, path)


def rendered_and_drawn(rows: Drawn, path: Path) -> None:
    """Draws renderings of the first prompts above the pictures of the base and of the LCM-LoRA."""
    wanted = {("Euler", 25): "base, Euler,\n25 steps", ("LCM-LoRA", 4): "LCM-LoRA,\n4 steps"}
    found = {(record["label"], record["steps"]): shown for record, shown in rows}
    drawn = {name: found[row] for row, name in wanted.items() if row in found}
    count = max(map(len, drawn.values()), default=0)
    rng = np.random.default_rng(0)
    rendered = [render(place(parse_caption(text), rng)) for text, _ in proof_prompts(count)]
    if drawn:
        everything = {"rendered": rendered, **drawn}
        picture_lines([(name, shown, []) for name, shown in everything.items()], path)


def styles_figure(cells: Drawn, path: Path) -> None:
    """Draws one prompt and seed at every pair of strengths of the style LoRA and the LCM-LoRA."""
    found = {tuple(record["strengths"]): shown[STYLED] for record, shown in cells}
    down, across = (sorted({strengths[i] for strengths in found}) for i in (0, 1))
    captions = [f"λ2 (LCM) {two:g}" for two in across]
    lines = [
        (f"λ1 (style) {one:g}", [found[one, two] for two in across], captions if one == down[-1] else [])
        for one in down
    ]
    picture_lines(lines, path)


def universal_figure(rows: Drawn, path: Path) -> None:
    """Draws the same prompts and seeds for every row."""
    names = [
        f"{record['label']}, {record['steps']} steps".replace(", ", ",\n")
        + f",\nguidance {record['guidance']:g}" * (record["guidance"] > 1)
        for record, _ in rows
    ]
    picture_lines([(name, shown, []) for name, (_, shown) in zip(names, rows, strict=True)], path)


def picture_lines(
    lines: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str]]], path: Path, side: float = 1.15
) -> None:
    """Writes a figure of lines of pictures. `side` is the side of a picture in inches.

    A line is its name, which is written on the left, its pictures, and the captions under them, which may be
    empty.
    """
    plt = plots()
    widest = max(len(pictures) for _, pictures, _ in lines)
    gap = 0.06  # inches between pictures
    left = 1.45  # inches for the names
    heights = [side + gap + 0.24 * bool(captions) for _, _, captions in lines]
    width, height = left + widest * (side + gap) + gap, sum(heights) + gap
    figure = plt.figure(figsize=(width, height), dpi=160, facecolor="white")
    top = height - gap
    for (name, pictures, captions), line_height in zip(lines, heights, strict=True):
        figure.text(
            (left - 0.12) / width, (top - side / 2) / height, name, ha="right", va="center", weight="bold"
        )
        for i, picture in enumerate(pictures):
            x = left + i * (side + gap)
            axes = figure.add_axes((x / width, (top - side) / height, side / width, side / height))
            axes.imshow(picture, interpolation="lanczos")
            axes.set_axis_off()
            if captions:
                centre = (x + side / 2) / width, (top - side - 0.05) / height
                figure.text(*centre, captions[i], ha="center", va="top", size=9)
        top -= line_height
    figure.savefig(path)
    plt.close(figure)
