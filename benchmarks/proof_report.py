"""The proof's tables, as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

WIDTH = 100  # characters
COLUMNS = ("background", "pattern", "colour", "size", "shape", "binding", "clean", "all")
STYLE_COLUMNS = ("stripes", "colour", "size", "shape", "binding", "clean", "all")
TITLES = {
    "steps": "How many steps",
    "guidance": "Guidance, with the contrary of each prompt as its negative, at 4 LCM steps",
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
    how = f"""
        Up to {most} pictures a row, each of a caption that neither training nor tuning has seen, half of them
        of two shapes; fixed seeds. A picture is right where a rule-based judge reads in it what its caption
        asks. *binding*: both shapes of a pair with their own colour, in their places. *clean*: no grain that
        one sees. *all*: right in every column; its interval is Wilson's. The number after a row's name is its
        steps. MMD and Fréchet are distances from rendered pictures of the same prompts, in the
        features of a network that reads scenes."""
    where = f"""
        Measured on {machine["cpu"]}, {machine["cores"]} cores ({machine["threads"]} threads), one picture at
        a time, the median second of warm engines; {packages}."""
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
    return [
        *table(["% right", *names], [[name_of(r), *(percent(r["right"][n]) for n in names)] for r in rows]),
        "",
        *table(
            ["", "UNet passes", "s a picture", "MMD", "Fréchet", "all, 95 % interval"],
            [[name_of(row), *costs(row)] for row in rows],
        ),
        "",
        "The floor, which rendering the same prompts anew leaves: "
        f"MMD {floor['mmd']['mean']:.3f} (95 % under {floor['mmd']['p95']:.3f}),",
        f"Fréchet {floor['frechet']['mean']:.2f} (95 % under {floor['frechet']['p95']:.2f}).",
    ]


def costs(row: Record) -> list[str]:
    everything = row["right"]["all"]
    return [
        str(row["passes"]),
        f"{row['median_seconds']:.3f}",
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
    return f"{row['label']}, {row['steps']}{guided}"


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
