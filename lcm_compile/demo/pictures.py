"""Writes pictures of the demo world with their captions: `python -m lcm_compile.demo.pictures --out DIR`.

The folder is what `lcm-compile train-lora --data` and `lcm-compile distill --data` read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
from PIL import Image

from lcm_compile.demo.world import (
    BACKGROUNDS,
    COLOURS,
    LOOKS,
    PATTERNS,
    SHAPES,
    STYLE,
    Description,
    Thing,
    is_held_out,
    place,
    render,
)

T = TypeVar("T")


def deal(cards: Sequence[T], rng: np.random.Generator) -> Iterator[T]:
    """All cards in random order, then all again in another."""
    while True:
        yield from (cards[i] for i in rng.permutation(len(cards)))


def descriptions(count: int, zebra: bool, rng: np.random.Generator) -> Iterator[Description]:
    """Of two shapes each, which shows more than one; every shape, colour and background alike often.

    So few pictures drawn at random would leave some of them out. None is of a held-out caption.
    """
    things = deal(list(product(COLOURS, SHAPES)), rng)
    grounds = deal(list(product(PATTERNS, BACKGROUNDS)), rng)
    for _ in range(count):
        while True:
            shown = Thing(*next(things)), Thing(*next(things))
            words = Description(shown, *next(grounds), zebra)
            if not is_held_out(words.caption.removesuffix(STYLE)):
                break
        yield words


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="A new folder.")
@click.option("--count", type=click.IntRange(min=1), default=40, show_default=True)
@click.option("--zebra", is_flag=True, help="In zebra style.")
@click.option("--look", type=click.Choice(list(LOOKS)), default="day", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: Path, count: int, zebra: bool, look: str, seed: int) -> None:
    """Draws COUNT scenes."""
    if out.exists():
        raise click.UsageError(f"{out} exists already")
    out.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index, words in enumerate(descriptions(count, zebra, rng)):
        Image.fromarray(render(place(words, rng), look=LOOKS[look])).save(out / f"{index:04d}.png")
        (out / f"{index:04d}.txt").write_text(words.caption + "\n")
    print(out)


if __name__ == "__main__":
    main()
