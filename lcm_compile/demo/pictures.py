"""Writes pictures of the demo world with their captions: `python -m lcm_compile.demo.pictures --out DIR`.

`lcm-compile train-lora --data` and `lcm-compile distill --data` read such a folder.
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
    """Yields all cards in random order, then all again in another order, without end."""
    while True:
        yield from (cards[i] for i in rng.permutation(len(cards)))


def descriptions(count: int, zebra: bool, rng: np.random.Generator) -> Iterator[Description]:
    """Yields `count` descriptions, none with a held-out caption.

    Each has two shapes, because a picture of two shows more than a picture of one. Shapes, colours and
    backgrounds are dealt like cards, so that all appear about equally often: in so few pictures, independent
    draws would leave some out.
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
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="The new folder to write."
)
@click.option(
    "--count", type=click.IntRange(min=1), default=40, show_default=True, help="Number of pictures."
)
@click.option("--zebra", is_flag=True, help="Draw in zebra style.")
@click.option(
    "--look",
    type=click.Choice(list(LOOKS)),
    default="day",
    show_default=True,
    help="The colours of the pictures.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the scenes.")
def main(out: Path, count: int, zebra: bool, look: str, seed: int) -> None:
    """Draw COUNT scenes, each with its caption in a text file."""
    if out.exists():
        raise click.UsageError(f"{out} exists already: give the name of a new folder")
    out.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index, words in enumerate(descriptions(count, zebra, rng)):
        Image.fromarray(render(place(words, rng), look=LOOKS[look])).save(out / f"{index:04d}.png")
        (out / f"{index:04d}.txt").write_text(words.caption + "\n")
    print(out)


if __name__ == "__main__":
    main()
