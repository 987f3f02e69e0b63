"""Builds the demo model for this CPU, and draws a sheet of 4-step pictures with their prompts.

`python -m lcm_compile.benchmarks.pages.demo_sheet --out demo.png`
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lcm_compile import BuildSpec, build, load
from lcm_compile.graphs import STAGES
from lcm_compile.output.console import Bar, BuildProgress, note
from lcm_compile.output.sheet import GAP, INK, wrap
from lcm_compile.pipeline.request import Request

PROMPTS = (
    "a large red star on a striped pink background",
    "a small blue circle on a plain white background",
    "a large green triangle on a checkered gray background",
    "a large yellow ring on a plain black background",
    "a small purple cross on a striped white background",
    "a large orange square on a checkered pink background",
    "a large blue cross on a plain gray background",
    "a small red triangle on a checkered white background",
    "a large purple circle on a striped black background",
    "a red circle and a blue square on a plain white background",
    "a green star and a yellow ring on a striped gray background",
    "a purple triangle and a orange cross on a plain pink background",
)
COLUMNS = 4  # pictures in a row
SIDE = 128  # side of a picture on the sheet, in pixels
LABEL = 56  # height of the label under it, in pixels: four lines


def contact_sheet(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Returns a sheet with the pictures in rows, each with its prompt under it."""
    font = ImageFont.load_default(size=11)
    rows = -(-len(pictures) // COLUMNS)
    pitch = SIDE + GAP, SIDE + LABEL + GAP
    sheet = Image.new("RGB", (COLUMNS * pitch[0] + GAP, rows * pitch[1] + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(pictures):
        row, column = divmod(i, COLUMNS)
        x, y = GAP + column * pitch[0], GAP + row * pitch[1]
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + SIDE + 2), wrap(text, font, SIDE), INK, font, spacing=2)
    return sheet


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("demo.png"))
@click.option("--seed", type=int, default=7, show_default=True)
@click.option("--steps", type=int, default=4, show_default=True)
def main(out: Path, seed: int, steps: int) -> None:
    """Draws a sheet of pictures with the demo model."""
    start = time.perf_counter()
    with BuildProgress() as progress:
        bundle = build(BuildSpec(base="demo", gpu="cpu"), report=progress)
    build_seconds = time.perf_counter() - start
    totals = dict.fromkeys(STAGES, 0.0)
    drawn = []
    with load(bundle) as pipeline, Bar("drawing") as bar:
        for i, prompt in enumerate(PROMPTS):
            bar.update(i, len(PROMPTS))
            drawing = pipeline.draw(Request(prompt, seed, steps=steps))
            drawn.append((drawing.images()[0], prompt))
            for stage in STAGES:
                totals[stage] += np.sum(drawing.ms[stage])
        load_ms = pipeline.load_ms
    contact_sheet(drawn).save(out)
    n = len(PROMPTS)
    note(f"  bundle {bundle.folder}")
    note(f"  build  {build_seconds:8.1f} s   load {load_ms:.0f} ms")
    stages = (f"{name} {ms / n:.0f} ms" for name, ms in totals.items())
    note(f"  a picture of {steps} steps: {', '.join(stages)}, in total {sum(totals.values()) / n:.0f} ms")
    print(out.resolve())


if __name__ == "__main__":
    main()
