"""Writes pictures of the demo world with their captions: `python -m lcm_compile.demo.pictures --out DIR`.

The folder is what `lcm-compile train-lora --data` and `lcm-compile distill --data` read.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from PIL import Image

from lcm_compile.demo.world import LOOKS, caption, render, sample_scene


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="A new folder.")
@click.option("--count", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--zebra", is_flag=True, help="In zebra style.")
@click.option("--look", type=click.Choice(list(LOOKS)), default="day", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: Path, count: int, zebra: bool, look: str, seed: int) -> None:
    """Draws COUNT scenes at random, none with a caption that is held out."""
    if out.exists():
        raise click.UsageError(f"{out} exists already")
    out.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        scene = sample_scene(rng, zebra=float(zebra))
        Image.fromarray(render(scene, look=LOOKS[look])).save(out / f"{index:04d}.png")
        (out / f"{index:04d}.txt").write_text(caption(scene) + "\n")
    print(out)


if __name__ == "__main__":
    main()
