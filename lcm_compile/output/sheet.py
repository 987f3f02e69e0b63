"""Draws a labelled sheet of pictures on white."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 10  # pixels between pictures
INK = (40, 40, 40)  # the colour of the labels
SMALL = 128  # pixels; pictures up to this size are shown at twice their size
LARGEST = 512  # pixels; larger pictures are shrunk to this size
SHEET_WIDTH = 8192  # pixels; the most that all columns together take


def grid_sheet(
    pictures: Iterable[Image], size: tuple[int, int], across: Sequence[str], down: Sequence[str], title: str
) -> Image:
    """Returns a sheet of pictures, row by row under a title, with a label for each column and each row.

    `size` is the (width, height) of every picture in pixels. Small pictures are enlarged without smoothing,
    and large ones are shrunk, so that the details and the complete sheet can be seen.
    """
    from PIL import Image, ImageDraw, ImageFont

    small, large = ImageFont.load_default(size=12), ImageFont.load_default(size=15)
    width, height = shown_size(size, len(across))
    labels_above = [wrap(text, small, width) for text in across]
    labels_left = [wrap(text, small, 160) for text in down]
    left = GAP + max(extent(text, small)[0] + GAP if text else 0 for text in labels_left)
    right = left + len(across) * (width + GAP)
    heading = wrap(title, large, right - 2 * GAP)
    labels = GAP + (extent(heading, large)[1] + GAP if heading else 0)
    top = labels + max(extent(text, small)[1] for text in labels_above) + GAP // 2
    pitch = GAP + max(height, *(extent(text, small)[1] for text in labels_left))

    sheet = Image.new("RGB", (right, top + len(down) * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), heading, INK, large)
    for column, text in enumerate(labels_above):
        draw.multiline_text((left + column * (width + GAP), labels), text, INK, small)
    for row, text in enumerate(labels_left):
        draw.multiline_text((GAP, top + row * pitch), text, INK, small)
    smooth = Image.Resampling.NEAREST if width > size[0] else Image.Resampling.LANCZOS
    for i, picture in enumerate(pictures):
        row, column = divmod(i, len(across))
        sheet.paste(
            picture.resize((width, height), smooth), (left + column * (width + GAP), top + row * pitch)
        )
    return sheet


def shown_size(size: tuple[int, int], columns: int) -> tuple[int, int]:
    """Returns the (width, height) that a picture of `size` has on a sheet with this number of columns."""
    fits = min(LARGEST / max(size), SHEET_WIDTH / (columns * size[0]))
    scale = 2.0 if max(size) <= SMALL else min(1.0, fits)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def wrap(text: str, font: Any, width: int) -> str:
    """Returns a text whose lines are broken where they would be wider than about `width` pixels."""
    letters = max(6, int(width / font.getlength("n")))
    return "\n".join(textwrap.fill(line, letters) for line in text.split("\n"))


def extent(text: str, font: Any) -> tuple[int, int]:
    """Returns the width and height of a text, in pixels; it may have several lines."""
    from PIL import Image, ImageDraw

    _, _, right, bottom = ImageDraw.Draw(Image.new("1", (1, 1))).multiline_textbbox((0, 0), text, font)
    return math.ceil(right), math.ceil(bottom)
