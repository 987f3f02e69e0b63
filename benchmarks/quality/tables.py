"""The proof's tables, as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

Record = Mapping[str, Any]

WIDTH = 100  # characters
RIVAL = ("euler", 25)  # whose times the others of its part are told in
COLUMNS = ("background", "pattern", "colour", "size", "shape", "binding", "clean", "all")
STYLE_COLUMNS = ("stripes", "colour", "size", "shape", "binding", "clean", "all")
TITLES = {
    "steps": "How many steps",
    "guidance": "Guidance at 4 LCM steps; the negative prompt is the contrary of the prompt",
    "style": "A style with the acceleration vector, not trained further: τ' = λ1·style + λ2·LCM, 4 steps",
    "universal": "The same LCM-LoRA on a base tuned to another palette, judged by that palette",
}


def report(machine: Record, records: Sequence[Record]) -> str:
    """All tables; `records` are rows of `proof.json`."""
    lines = ["# Proof", "", *preface(machine, records)]
    for part, title in TITLES.items():
        rows = [record for record in records if record["part"] == part]
        if rows:
            lines += ["", f"## {title}", "", *part_lines(part, rows)]
    return "\n".join(lines) + "\n"


def preface(machine: Record, records: Sequence[Record]) -> list[str]:
    packages = ", ".join(machine[name] for name in ("onnxruntime", "torch", "diffusers"))
    most = max((record["count"] for record in records), default=0)
    rounds = max((len(record.get("seconds", ())) for record in records), default=0)
    how = f"""
        Up to {most} pictures a row, each of a caption that neither training nor tuning has seen, half of them
        of two shapes; fixed seeds. A picture is right where a rule-based judge reads in it what its caption
        asks. *binding*: both shapes of a pair with their own colour, in their places. *clean*: no grain that
        one sees. *all*: right in every column; its interval is Wilson's. The number after a row's name is its
        steps. MMD and Fréchet are distances from rendered pictures of the same prompts, in the
        features of a network that reads scenes."""
    where = f"""
        Seconds are the median of {rounds} rounds on {machine["cpu"]}, {machine["cores"]} cores
        ({machine["threads"]} threads), each of which draws one picture of every row on warm engines; how many
        times faster than {RIVAL[1]} Euler steps is the median of the rounds' ratios. {packages}."""
    return [*textwrap.wrap(" ".join(how.split()), WIDTH), "", *textwrap.wrap(" ".join(where.split()), WIDTH)]


def part_lines(part: str, rows: Sequence[Record]) -> list[str]:
    if part != "style":
        return tables(rows, COLUMNS)
    whole = [row for row in rows if not row["strengths"]]
    return [*tables(whole, STYLE_COLUMNS), "", *style_grid([row for row in rows if row["strengths"]])]


def tables(rows: Sequence[Record], columns: Iterable[str]) -> list[str]:
    """What is right, in percent; then what it took, and how far from rendered pictures it is."""
    names = [name for name in columns if any(row["right"][name] for row in rows)]
    floor = rows[0]["floor"]
    rival = next((row["seconds"] for row in rows if (row["sampler"], row["steps"]) == RIVAL), None)
    costs = ["UNet passes", "s a picture", *([f"× {RIVAL[1]} Euler"] if rival else [])]
    return [
        *table(["% right", *names], [[name_of(r), *(percent(r["right"][n]) for n in names)] for r in rows]),
        "",
        *table(
            ["", *costs, "MMD", "Fréchet", "all, 95 % interval"],
            [[name_of(row), *cost(row, rival), *distance(row)] for row in rows],
        ),
        "",
        "The floor, which rendering the same prompts anew leaves: "
        f"MMD {floor['mmd']['mean']:.3f} (95 % under {floor['mmd']['p95']:.3f}),",
        f"Fréchet {floor['frechet']['mean']:.2f} (95 % under {floor['frechet']['p95']:.2f}).",
    ]


def cost(row: Record, rival: Sequence[float] | None) -> list[str]:
    """UNet passes, seconds and, where there is a rival, how many times faster than it this is."""
    told = [str(row["passes"]), f"{median(row['seconds']):.3f}"]
    if rival:
        told.append(f"{median(other / own for own, other in zip(row['seconds'], rival, strict=True)):.1f}")
    return told


def distance(row: Record) -> list[str]:
    everything = row["right"]["all"]
    return [
        f"{row['distances']['mmd']:.3f}",
        f"{row['distances']['frechet']:.2f}",
        f"{100 * everything['low']:.0f}–{100 * everything['high']:.0f}",
    ]


def style_grid(cells: Sequence[Record]) -> list[str]:
    """Stripes and shapes of each cell; λ1 downwards, λ2 across."""
    found = {tuple(cell["strengths"]): cell["right"] for cell in cells}
    down, across = (sorted({strengths[i] for strengths in found}) for i in (0, 1))
    lines = [
        [
            f"λ1 {one:g}",
            *(" / ".join(percent(found[one, two][name]) for name in ("stripes", "shape")) for two in across),
        ]
        for one in down
    ]
    return [
        f"% of {cells[0]['count']} pictures with stripes right / shape right:",
        "",
        *table(["", *(f"λ2 {two:g}" for two in across)], lines),
    ]


def name_of(row: Record) -> str:
    guided = f", guidance {row['guidance']:g}" if row["guidance"] > 1 else ""
    return f"{row['label']}, {row['steps']}{guided}{', negative' * row['negative']}"


def percent(share: Record | None) -> str:
    return "–" if share is None else f"{100 * share['part']:.0f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, aligned for those who read it as text: the first column left, figures right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return (
            "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"
        )

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [line(header), rule, *map(line, rows)]
