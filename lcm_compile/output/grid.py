"""A grid of pictures: every combination of a few settings, drawn into one labelled sheet.

`steps=1..8,seed=1..4,guidance=1,1.5` has three axes. The first runs across the sheet, the others down it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.errors import UsageError, unknown_name
from lcm_compile.output.sheet import grid_sheet
from lcm_compile.system.files import read_lines, user_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcm_compile.pipeline.drawing import Drawing
    from lcm_compile.pipeline.pipeline import Pipeline
    from lcm_compile.pipeline.request import Request

EXAMPLE = "for example --grid steps=1..8,seed=1..4"
# The name of an axis → the field of Request that it sets.
FIELDS = {
    "steps": "steps",
    "seed": "seed",
    "guidance": "guidance_scale",
    "strength": "strength",
    "prompt": "prompt",
}
FRACTIONS = ("guidance", "strength")  # the axes whose values need not be whole numbers
MAX_CELLS = 1000


@dataclass(frozen=True)
class Axis:
    """One setting and the values it takes."""

    name: str
    values: tuple[Any, ...]

    def label(self, value: Any) -> str:
        """Returns the text that the sheet shows for one of the values."""
        if self.name == "prompt":
            return str(value)
        return f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}"


def parse_grid(text: str) -> tuple[Axis, ...]:
    """Returns the axes of `NAME=VALUES,…`, where VALUES is `1..8`, `1,1.5` or a file of prompts.

    Raises UsageError if the text has another form, names an axis twice, or asks for over MAX_CELLS pictures.
    """
    parts = re.split(r"(?:^|,)\s*([A-Za-z_-]+)=", text)
    if parts[0].strip() or len(parts) < 3:
        raise UsageError(f"--grid {text!r} is not NAME=VALUES,NAME=VALUES", EXAMPLE)
    names = parts[1::2]
    axes = tuple(
        Axis(name, parse_values(name, values)) for name, values in zip(names, parts[2::2], strict=True)
    )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--grid names {twice[0]} twice", EXAMPLE)
    cells = 1
    for axis in axes:
        cells *= len(axis.values)
    if cells > MAX_CELLS:
        raise UsageError(f"--grid asks for {cells} pictures, and {MAX_CELLS} are the most", "ask for fewer")
    return axes


def parse_values(name: str, text: str) -> tuple[Any, ...]:
    """Returns the values of the axis `name`. Raises UsageError if one is no value of it."""
    if name not in FIELDS:
        raise unknown_name("axis of --grid", name, FIELDS)
    if name == "prompt":
        return read_prompts(user_path(text))
    values: list[Any] = []
    for word in text.split(","):
        try:
            values += [float(word)] if name in FRACTIONS else whole_numbers(word, MAX_CELLS)
        except ValueError:
            hint = f"--grid {name}=1..8 or {name}=1,2,4"
            if name in FRACTIONS:
                hint = f"--grid {name}=0.5,1"
            raise UsageError(f"--grid {name}={text}: {word!r} is no value of {name}", hint) from None
    return tuple(values)


def whole_numbers(word: str, most: int) -> range:
    """Returns the numbers of `7` or `1..8`. Raises ValueError for all else, and for over `most` numbers."""
    ends = re.fullmatch(r"\s*(\d{1,20})\.\.(\d{1,20})\s*", word)
    first, last = (int(ends[1]), int(ends[2])) if ends else (int(word), int(word))
    if not first <= last < first + most:
        raise ValueError(word)
    return range(first, last + 1)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Returns the lines of a text file that are not empty. Raises UsageError if it has none.

    Raises LcmCompileError if it is in another encoding than Unicode's.
    """
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--grid prompt={path} can't be read: {error}", "give a text file with a prompt on each line"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UsageError(f"--grid prompt={path}: the file holds no prompt", "write one on each line")
    return prompts


def requests(axes: Sequence[Axis], fixed: Request) -> list[Request]:
    """Returns the requests of a grid's pictures, row by row; `fixed` has the values that no axis sets.

    Raises UsageError if a value is out of range.
    """
    across, *down = axes
    fields = [FIELDS[axis.name] for axis in axes]
    return [
        replace(fixed, **dict(zip(fields, (value, *row), strict=True)))
        for row in itertools.product(*(axis.values for axis in down))
        for value in across.values
    ]


def draw_grid(
    pipeline: Pipeline, axes: Sequence[Axis], fixed: Request, report: Callable[[int, int], None]
) -> tuple[Image, list[Drawing]]:
    """Draws a grid; returns the sheet and a drawing for each of `requests(axes, fixed)`.

    The drawings hold no pictures, to save memory. `report` is called after every picture with (pictures
    done, pictures in total).
    """
    asked = requests(axes, fixed)
    drawings: list[Drawing] = []

    def draw() -> Iterator[Image]:
        for request in asked:
            drawing = pipeline.draw(request)
            yield drawing.images()[0]
            drawings.append(replace(drawing, pictures=drawing.pictures[:0]))
            report(len(drawings), len(asked))

    across, *down = [[axis.label(value) for value in axis.values] for axis in axes]
    labels = ["\n".join(row) for row in itertools.product(*down)]
    height, width = fixed.size(pipeline.settings.shape)
    size = (width, height)
    return grid_sheet(draw(), size, across, labels, title(axes, fixed)), drawings


def title(axes: Sequence[Axis], fixed: Request) -> str:
    """Returns the settings that all pictures of a grid share, as the sheet's title."""
    own = {"prompt": fixed.prompt, "steps": fixed.steps, "guidance": fixed.guidance_scale, "seed": fixed.seed}
    varied = [axis.name for axis in axes]
    return " · ".join(Axis(name, ()).label(value) for name, value in own.items() if name not in varied)
