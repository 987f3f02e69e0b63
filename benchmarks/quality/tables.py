"""The proof's tables, as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from lcm_compile.benchmarks.markdown import markdown_table

Record = Mapping[str, Any]

WIDTH = 100  # characters
# The sampler and the number of steps that the other rows of a part are compared with in speed.
RIVAL = ("euler", 25)
COLUMNS = ("background", "pattern", "colour", "size", "shape", "binding", "clean", "all")
STYLE_COLUMNS = ("stripes", "colour", "size", "shape", "binding", "clean", "all")
TITLES = {
    "steps": "How many steps",
    "guidance": "Guidance at 4 LCM steps; a negative prompt is the contrary of its prompt",
    "style": "A style LoRA plus the LCM-LoRA, without further training: τ' = λ1·style + λ2·LCM, 4 steps",
    "universal": "The same LCM-LoRA on a base tuned to another palette, judged by that palette",
}


def report(machine: Record, records: Sequence[Record]) -> str:
    """Returns `proof.md`: all tables as Markdown. `machine` and `records` are those of `proof.json`."""
    lines = ["# Proof", "", *preface(machine, records)]
    for part, title in TITLES.items():
        rows = [record for record in records if record["part"] == part]
        if rows:
            lines += ["", f"## {title}", "", *part_lines(part, rows)]
    return "\n".join(lines) + "\n"


def preface(machine: Record, records: Sequence[Record]) -> list[str]:
    """Returns the paragraphs that explain the columns and how the rows were measured."""
    packages = ", ".join(machine[name] for name in ("onnxruntime", "torch", "diffusers"))
    most = max((record["count"] for record in records), default=0)
    rounds = max((len(record.get("seconds", ())) for record in records), default=0)
    how = f"""
        Each row has up to {most} pictures with fixed seeds. Their captions were used neither in training nor
        in tuning, and half of them describe two shapes. A rule-based judge reads each picture, and the
        picture is right in a column if it shows what its caption asks for. *binding*: both shapes of a pair
        are in their places and have their own colours. *clean*: no visible grain. *all*: right in every
        column, with Wilson's interval. The number after a row's name is its number of steps. MMD and Fréchet
        are distances from rendered pictures of the same prompts, in the features of a network that reads
        scenes."""
    where = f"""
        Seconds are the median of {rounds} rounds on {machine["cpu"]}, {machine["cores"]} cores
        ({machine["threads"]} threads). Each round draws one picture of every row on warm engines. The
        speed-up over {RIVAL[1]} Euler steps is the median of the rounds' ratios. {packages}."""
    return [*textwrap.wrap(" ".join(how.split()), WIDTH), "", *textwrap.wrap(" ".join(where.split()), WIDTH)]


def part_lines(part: str, rows: Sequence[Record]) -> list[str]:
    """Returns the tables of one part of the proof."""
    if part != "style":
        return tables(rows, COLUMNS)
    timed = [row for row in rows if not row["strengths"]]
    return [*tables(timed, STYLE_COLUMNS), "", *style_grid([row for row in rows if row["strengths"]])]


def tables(rows: Sequence[Record], columns: Iterable[str]) -> list[str]:
    """Returns a table of right pictures in percent, and one of costs and distances from rendered pictures."""
    names = [name for name in columns if any(row["right"][name] for row in rows)]
    floor = rows[0]["floor"]
    rival = next((row["seconds"] for row in rows if (row["sampler"], row["steps"]) == RIVAL), None)
    costs = ["UNet passes", "s per picture", *([f"× {RIVAL[1]} Euler"] if rival else [])]
    return [
        *markdown_table(
            ["% right", *names], [[name_of(r), *(percent(r["right"][n]) for n in names)] for r in rows]
        ),
        "",
        *markdown_table(
            ["", *costs, "MMD", "Fréchet", "all, 95 % interval"],
            [[name_of(row), *cost(row, rival), *distance(row)] for row in rows],
        ),
        "",
        "The noise floor, which is the distance of new renderings of the same prompts: "
        f"MMD {floor['mmd']['mean']:.3f} (95 % under {floor['mmd']['p95']:.3f}),",
        f"Fréchet {floor['frechet']['mean']:.2f} (95 % under {floor['frechet']['p95']:.2f}).",
    ]


def cost(row: Record, rival: Sequence[float] | None) -> list[str]:
    """Returns the cells for UNet passes, seconds and, if there is a rival, the speed-up over it.

    A row that was not timed beside the others has dashes for both.
    """
    if "seconds" not in row:
        return [str(row["passes"]), "–", *(["–"] if rival else [])]
    cells = [str(row["passes"]), f"{median(row['seconds']):.3f}"]
    if rival:
        cells.append(f"{median(other / own for own, other in zip(row['seconds'], rival, strict=True)):.1f}")
    return cells


def distance(row: Record) -> list[str]:
    """Returns the cells for MMD, Fréchet distance and the interval of *all*."""
    everything = row["right"]["all"]
    return [
        f"{row['distances']['mmd']:.3f}",
        f"{row['distances']['frechet']:.2f}",
        f"{100 * everything['low']:.0f}–{100 * everything['high']:.0f}",
    ]


def style_grid(cells: Sequence[Record]) -> list[str]:
    """Returns the table of right stripes and shapes by both strengths, λ1 downwards and λ2 across."""
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
        *markdown_table(["", *(f"λ2 {two:g}" for two in across)], lines),
    ]


def name_of(row: Record) -> str:
    """Returns a row's name in the tables: its label, its number of steps and its guidance."""
    guided = f", guidance {row['guidance']:g}" if row["guidance"] > 1 else ""
    return f"{row['label']}, {row['steps']}{guided}{', negative' * row['negative']}"


def percent(share: Record | None) -> str:
    """Returns a share in percent without decimals, or a dash if no prompt says anything about the column."""
    return "–" if share is None else f"{100 * share['part']:.0f}"
