"""A fixed, rule-based judge of the demo world's pictures: what one shows, and whether that was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lcm_compile.demo.world import (
    BACKGROUNDS,
    COLOURS,
    DISTANCE,
    STRIPE_ANGLES,
    Description,
    parse_caption,
    pattern_weight,
    second_tone,
)

Picture = NDArray[np.uint8]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

COLUMNS = ("background", "pattern", "colour", "size", "shape")
NEAR_BACKGROUND = 30.0  # RGB distance from the line between the two tones
NEAR_COLOUR = 80.0  # RGB distance from the nominal colour
MIN_OVERLAP = 0.6  # with the best template; under it a blob is no shape
MIN_PATTERN = 0.45  # correlation with the best pattern; under it there is none
LARGE = 0.21  # radius, between the largest small shape and the smallest large one
GRID, EXTENT = 40, 1.15  # cells of a shape template, and half its side for a shape of area 1


@dataclass(frozen=True)
class Blob:
    """One shape as it was read; None is what could not be recognised."""

    colour: str | None
    shape: str | None
    size: str
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows, its shapes from left to right."""

    background: str
    pattern: str | None
    blobs: tuple[Blob, ...]


def judge(picture: Picture) -> Reading:
    """Reads a square picture (H, H, 3)."""
    pixels = picture.astype(float)
    background = max(BACKGROUNDS, key=lambda name: np.sum(_from_tones(pixels, name)[0] < NEAR_BACKGROUND))
    distance, tone = _from_tones(pixels, background)
    colours = np.array(list(COLOURS.values()), float)
    to_colours = np.linalg.norm(pixels[:, :, None] - colours, axis=-1).min(-1)
    blobs = [_read_blob(pixels, mask) for mask in _shapes(to_colours < distance)]
    return Reading(background, _read_pattern(tone, distance < NEAR_BACKGROUND), tuple(blobs))


def matches(reading: Reading, asked: Description) -> dict[str, bool | None]:
    """Whether each column of a reading is right; None where the caption says nothing of it.

    A picture with another number of shapes than asked for has none of them right.
    """
    pairs = list(zip(reading.blobs, asked.things, strict=False))
    counted = len(reading.blobs) == len(asked.things)
    sized = all(thing.size for thing in asked.things)
    return {
        "background": reading.background == asked.background,
        "pattern": reading.pattern == asked.pattern,
        "colour": counted and all(blob.colour == thing.colour for blob, thing in pairs),
        "size": (counted and all(blob.size == thing.size for blob, thing in pairs)) if sized else None,
        "shape": counted and all(blob.shape == thing.shape for blob, thing in pairs),
    }


def score(pictures: Iterable[Picture], prompts: Sequence[str]) -> dict[str, float]:
    """Which part of the pictures is right in each column, of those whose prompt says something of it."""
    rows = [
        matches(judge(picture), parse_caption(text)) for picture, text in zip(pictures, prompts, strict=True)
    ]
    columns = {name: [right for row in rows if (right := row[name]) is not None] for name in COLUMNS}
    return {name: sum(rights) / len(rights) for name, rights in columns.items() if rights}


def _from_tones(pixels: Array, background: str) -> tuple[Array, Array]:
    """Each pixel's distance from the line between the two tones, and its place on it, 0 to 1. Both (H, H)."""
    first = np.array(BACKGROUNDS[background], float)
    line = second_tone(background) - first
    place = np.clip((pixels - first) @ line / (line @ line), 0, 1)
    return np.linalg.norm(pixels - first - place[..., None] * line, axis=-1), place


@lru_cache(maxsize=8)
def _pattern_templates(size: int) -> tuple[list[str], Array]:
    """Every stripe and checker pattern in steps of phase, as rows of +-1. Names and (n, size * size)."""
    stripes = [
        pattern_weight("striped", size, a, (p, 0)) for a in STRIPE_ANGLES for p in np.arange(0, 1, 0.125)
    ]
    checkers = [
        pattern_weight("checkered", size, 0, (p, q))
        for p in np.arange(0, 2, 0.125)
        for q in np.arange(0, 1, 0.125)
    ]
    names = ["striped"] * len(stripes) + ["checkered"] * len(checkers)
    return names, np.stack([*stripes, *checkers]).reshape(len(names), -1) * 2 - 1


def _read_pattern(tone: Array, visible: Mask) -> str | None:
    """The pattern of the background's visible pixels; both (H, H)."""
    seen = visible.ravel()
    values = tone.ravel()[seen]
    if not len(values) or np.mean(values > 0.5) < 0.15:
        return "plain"
    names, templates = _pattern_templates(len(tone))
    values = values - 0.5
    fit = np.abs(templates[:, seen] @ values) / (np.linalg.norm(values) * math.sqrt(len(values)) + 1e-9)
    best = int(fit.argmax())
    return names[best] if fit[best] > MIN_PATTERN else None


def _shapes(mask: Mask) -> list[Mask]:
    """The connected parts of a mask that count as shapes, at most two, from left to right."""
    left = mask.copy()
    parts = []
    while left.any():
        part = _connected(left, tuple(np.argwhere(left)[0]))
        left &= ~part
        parts.append(part)
    parts.sort(key=lambda part: -int(part.sum()))
    smallest = max(0.005 * mask.size, 0.2 * parts[0].sum()) if parts else 0
    counted = [part for part in parts if part.sum() >= smallest][:2]
    return sorted(counted, key=lambda part: float(np.nonzero(part)[1].mean()))


def _connected(mask: Mask, start: tuple[int, ...]) -> Mask:
    """The part of a mask joined to `start` by its edges."""
    height, width = mask.shape
    part = np.zeros_like(mask)
    part[start] = True
    todo = [start]
    while todo:
        y, x = todo.pop()
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= near[0] < height and 0 <= near[1] < width and mask[near] and not part[near]:
                part[near] = True
                todo.append(near)
    return part


def _read_blob(pixels: Array, mask: Mask) -> Blob:
    """Reads the shape under a mask (H, H)."""
    padded = np.pad(mask, 1)
    inner = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    paint = np.median(pixels[inner if inner.any() else mask], axis=0)
    far = {name: float(np.linalg.norm(paint - value)) for name, value in COLOURS.items()}
    colour = min(far, key=far.__getitem__)
    y, x = (axis + 0.5 for axis in np.nonzero(mask))
    radius = np.percentile(np.hypot(x - x.mean(), y - y.mean()), 97) / len(mask)
    shape, overlap = _read_shape(mask, float(y.mean()), float(x.mean()))
    return Blob(
        colour if far[colour] < NEAR_COLOUR else None,
        shape if overlap >= MIN_OVERLAP else None,
        "large" if radius > LARGE else "small",
        overlap,
    )


def _grid() -> Array:
    """Cell centres of a template along one axis, in roots of the shape's area. Shape (GRID,)."""
    return ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * EXTENT


@lru_cache(maxsize=1)
def _shape_templates() -> tuple[list[str], Array]:
    """Every shape of area 1 in steps of 5 degrees, as rows of 0 and 1. Names and (n, GRID * GRID)."""
    names, rows = [], []
    fine = np.linspace(-1.1, 1.1, 400)
    for name, distance in DISTANCE.items():
        scale = math.sqrt(np.mean(distance(fine, fine[:, None]) < 0) * 2.2**2)
        for turn in np.radians(np.arange(0, 1 if name in ("circle", "ring") else 120, 5)):
            x, y = _grid() * scale, (_grid() * scale)[:, None]
            inside = distance(np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x) < 0
            names.append(name)
            rows.append(inside.ravel().astype(float))
    return names, np.stack(rows)


def _read_shape(mask: Mask, centre_y: float, centre_x: float) -> tuple[str, float]:
    """The best template for a mask (H, H), centred and scaled to area 1, and its intersection over union."""
    scale = math.sqrt(mask.sum())
    padded = np.pad(mask.astype(float), 1)

    def taps(centre: float) -> tuple[NDArray[np.intp], Array]:
        position = np.clip(_grid() * scale + centre + 0.5, 0, len(mask) + 0.999)
        return position.astype(int), position % 1

    (row, down), (column, right) = taps(centre_y), taps(centre_x)
    upper, lower = padded[row], padded[row + 1]
    lines = upper + down[:, None] * (lower - upper)
    sampled = lines[:, column] + right * (lines[:, column + 1] - lines[:, column])
    inside = (sampled > 0.5).ravel().astype(float)
    names, templates = _shape_templates()
    shared = templates @ inside
    overlap = shared / (templates.sum(1) + inside.sum() - shared)
    best = int(overlap.argmax())
    return names[best], float(overlap[best])
