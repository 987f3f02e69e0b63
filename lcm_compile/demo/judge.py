"""A fixed, rule-based judge of the demo world's pictures: what one shows, and whether that was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcm_compile.demo.world import (
    DAY,
    DISTANCE,
    STRIPE_ANGLES,
    ZEBRA_PERIOD,
    Description,
    Look,
    parse_caption,
    pattern_weight,
    second_tone,
    zebra_position,
    zebra_weight,
)

Picture = NDArray[np.uint8]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

COLUMNS = ("background", "pattern", "colour", "size", "shape", "stripes", "binding", "clean")
NEAR_BACKGROUND = 30.0  # RGB distance from the line between the two tones
NEAR_COLOUR = 80.0  # RGB distance from the nominal colour
MIN_OVERLAP = 0.6  # with the best template; under it a blob is no shape
MIN_PATTERN = 0.45  # correlation with the best pattern; under it there is none
MIN_STRIPES = 0.75  # correlation with the style's stripes
MIN_CONTRAST = 0.5  # of the paint's way to white, between the middle of a stripe and the paint beside it
MAX_OFFSET = 0.125  # of a shape from the middle of its half, where two are asked for
MAX_GRAIN = 11.5  # RGB distance, where one sees it; rendered pictures redrawn by the VAE stay under 5
LARGE = 0.21  # radius, between the largest small shape and the smallest large one
GRID, EXTENT = 40, 1.15  # cells of a shape template, and half its side for a shape of area 1


@dataclass(frozen=True)
class Blob:
    """One shape as it was read; None is what could not be recognised. `x` is its centre's."""

    colour: str | None
    shape: str | None
    size: str
    overlap: float
    x: float
    striped: bool


@dataclass(frozen=True)
class Reading:
    """What a picture shows, its shapes from left to right; `grain` is how uneven its flat parts are."""

    background: str
    pattern: str | None
    blobs: tuple[Blob, ...]
    grain: float


def judge(picture: Picture, look: Look = DAY) -> Reading:
    """Reads a square picture (H, H, 3) that was asked for in `look`."""
    pixels = picture.astype(float)
    tones = {name: _from_tones(pixels, name, look) for name in look.backgrounds}
    background = max(tones, key=lambda name: np.sum(tones[name][0] < NEAR_BACKGROUND))
    distance, tone = tones[background]
    colours = np.array(list(look.colours.values()), float)
    to_colours = np.linalg.norm(pixels[:, :, None] - colours, axis=-1).min(-1)
    painted = to_colours < distance
    # Stripes cut a shape in pieces, so it is first looked for with their gaps closed.
    white = np.linalg.norm(pixels - 255, axis=-1) < distance
    masks = [m for m in _shapes(_closed(painted | white, straight=False)) if np.any(m & painted)]
    stripes = [_zebra_stripes(pixels, mask, painted) for mask in masks]
    if all(white is None for white in stripes):
        masks = _shapes(painted)
        stripes = [None] * len(masks)
    blobs = tuple(
        _read_blob(pixels, mask & painted, white, look) for mask, white in zip(masks, stripes, strict=True)
    )
    pattern = _read_pattern(tone, distance < NEAR_BACKGROUND)
    return Reading(background, pattern, blobs, _grain(pixels, _palette(background, pattern, blobs, look)))


def matches(reading: Reading, asked: Description) -> dict[str, bool | None]:
    """Whether each column of a reading is right; None where the caption says nothing of it.

    A picture with another number of shapes than asked for has none of them right.
    """
    pairs = list(zip(reading.blobs, asked.things, strict=False))
    counted = len(reading.blobs) == len(asked.things)
    colour = counted and all(blob.colour == thing.colour for blob, thing in pairs)
    size = counted and all(blob.size == thing.size for blob, thing in pairs)
    shape = counted and all(blob.shape == thing.shape for blob, thing in pairs)
    placed = all(
        abs(blob.x - middle) < MAX_OFFSET for blob, middle in zip(reading.blobs, (0.25, 0.75), strict=False)
    )
    return {
        "background": reading.background == asked.background,
        "pattern": reading.pattern == asked.pattern,
        "colour": colour,
        "size": size if asked.things[0].size else None,
        "shape": shape,
        "stripes": counted and all(blob.striped == asked.zebra for blob in reading.blobs),
        "binding": colour and shape and placed if len(asked.things) == 2 else None,
        "clean": reading.grain < MAX_GRAIN,
    }


def score(pictures: Iterable[Picture], prompts: Sequence[str], look: Look = DAY) -> dict[str, float]:
    """Which part of the pictures is right in each column, of those whose prompt says something of it."""
    rows = [
        matches(judge(picture, look), parse_caption(text))
        for picture, text in zip(pictures, prompts, strict=True)
    ]
    columns = {name: [right for row in rows if (right := row[name]) is not None] for name in COLUMNS}
    return {name: sum(rights) / len(rights) for name, rights in columns.items() if rights}


def _from_tones(pixels: Array, background: str, look: Look) -> tuple[Array, Array]:
    """Each pixel's distance from the line between the two tones, and its place on it, 0 to 1. Both (H, H)."""
    first = np.array(look.backgrounds[background], float)
    line = second_tone(background, look) - first
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
    count = visible.sum()
    if np.sum(visible & (tone > 0.5)) <= 0.15 * count:
        return "plain"
    names, templates = _pattern_templates(len(tone))
    values = np.where(visible, tone - 0.5, 0).ravel()
    fit = np.abs(templates @ values) / (np.linalg.norm(values) * math.sqrt(count) + 1e-9)
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


def _inner(mask: Mask) -> Mask:
    """The pixels of a mask (H, H) whose four neighbours are in it too; all of them where there are none."""
    padded = np.pad(mask, 1)
    inner = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner if inner.any() else mask


def _closed(mask: Mask, straight: bool) -> Mask:
    """A mask (H, H) with the gaps closed that stripes leave: `straight` across them, or any way."""
    # A diagonal step is the root of 2 wide; half a pixel on both sides is neither paint nor white.
    reach = math.ceil((ZEBRA_PERIOD / 3 * len(mask) / math.sqrt(2) + 1) / 2)
    axes: list[tuple[int, ...]] = [(0, 1)] if straight else [(0,), (1,)]
    closed = np.pad(mask, 2 * reach)
    for gather, axis in product((np.logical_or, np.logical_and), axes):
        closed = gather.reduce([np.roll(closed, len(axis) * (by,), axis) for by in range(-reach, reach + 1)])
    return closed[2 * reach : -2 * reach, 2 * reach : -2 * reach]


def _zebra_stripes(pixels: Array, whole: Mask, painted: Mask) -> Array | None:
    """How white the style's stripes make each pixel near the shape under a mask (H, H), or None without any.

    Their direction and period are the style's; their phase is read where they are, as far as a period sees:
    no caption says that both sides of a ring have one.
    """
    size = len(whole)
    paint = np.median(pixels[_inner(whole & painted)], axis=0)
    way = 255 - paint
    inside = _inner(_closed(whole & painted, straight=True))
    white = np.clip((pixels - paint) @ way / (way @ way), 0, 1)

    def near(values: NDArray[Any]) -> NDArray[Any]:
        return blur @ np.where(inside, values, 0) @ blur

    reach = np.arange(size) - np.arange(size)[:, None]
    blur = np.exp(-((reach / (ZEBRA_PERIOD * size)) ** 2) / 2)
    swing = white - near(white) / np.maximum(near(inside), 1e-9)
    # Demodulated: the angle of what the style's wave and the picture share is where the picture's is ahead.
    shared = near(swing * np.exp(-2j * np.pi * zebra_position(size)))
    wanted = zebra_weight(size, np.angle(shared) / (2 * np.pi) + 0.5)
    seen, model = white[inside], wanted[inside]
    fit = np.mean((seen - seen.mean()) * (model - model.mean())) / (seen.std() * model.std() + 1e-9)
    stripe, between = seen[model > 0.9], seen[model < 0.1]
    if fit < MIN_STRIPES or not len(stripe) or not len(between):
        return None
    return wanted if stripe.mean() - between.mean() > MIN_CONTRAST else None


def _read_blob(pixels: Array, mask: Mask, stripes: Array | None, look: Look) -> Blob:
    """Reads the shape under a mask (H, H), crossed by those stripes."""
    striped = stripes is not None
    bare = stripes < 0.05 if stripes is not None else np.ones_like(mask)
    inner = _inner(mask) & bare
    paint = np.median(pixels[inner if inner.any() else mask], axis=0)
    far = {name: float(np.linalg.norm(paint - value)) for name, value in look.colours.items()}
    colour = min(far, key=far.__getitem__)
    y, x = (axis + 0.5 for axis in np.nonzero(mask))
    radius = np.percentile(np.hypot(x - x.mean(), y - y.mean()), 97) / len(mask)
    shape, overlap = _read_shape(mask, bare, float(y.mean()), float(x.mean()))
    return Blob(
        colour if far[colour] < NEAR_COLOUR else None,
        shape if overlap >= MIN_OVERLAP else None,
        "large" if radius > LARGE else "small",
        overlap,
        float(x.mean()) / len(mask),
        striped,
    )


def _palette(background: str, pattern: str | None, blobs: tuple[Blob, ...], look: Look) -> Array:
    """The colours that what was read is painted in. Shape (n, 3)."""
    palette = [np.array(look.backgrounds[background], float)]
    if pattern != "plain":
        palette.append(second_tone(background, look))
    palette += [np.array(look.colours[blob.colour], float) for blob in blobs if blob.colour]
    if any(blob.striped for blob in blobs):
        palette.append(np.full(3, 255.0))
    return np.array(palette)


def _grain(pixels: Array, palette: Array) -> float:
    """How far the pixels away from every edge lie from the palette (n, 3): the root mean square RGB distance.

    Infinite where a picture has next to no such pixels.
    """
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    lowest = highest = np.pad(distance.argmin(-1), 1, mode="edge")
    for axis in (0, 1):
        lowest = np.lib.stride_tricks.sliding_window_view(lowest, 3, axis).min(-1)
        highest = np.lib.stride_tricks.sliding_window_view(highest, 3, axis).max(-1)
    flat = lowest == highest
    return float(np.sqrt(np.mean(distance.min(-1)[flat] ** 2))) if flat.mean() > 0.02 else math.inf


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


def _read_shape(mask: Mask, bare: Mask, centre_y: float, centre_x: float) -> tuple[str, float]:
    """The best template for a mask (H, H), centred and scaled to area 1, and its intersection over union.

    Only the `bare` pixels count. Where some do not, the true centre and area are looked for near the mask's:
    a stripe along its rim may be missing from it.
    """
    stripe = ZEBRA_PERIOD / 3 * len(mask)
    whole = bool(bare.all())
    shifts = (0.0,) if whole else tuple(stripe * part for part in (-0.5, -0.25, 0.0, 0.25, 0.5))
    growths = (1.0,) if whole else (0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12)
    side = math.sqrt((mask & bare).sum() / bare.mean())
    layers = np.pad(np.stack([mask, bare]).astype(float), ((0, 0), (1, 1), (1, 1)))
    inside, counted = np.stack(
        [
            _sampled(layers, centre_y + down, centre_x + right, side * growth)
            for down, right, growth in product(shifts, shifts, growths)
        ],
        axis=-1,
    )
    names, templates = _shape_templates()
    shared = templates @ (inside * counted)
    overlap = shared / (templates @ counted + (inside * counted).sum(0) - shared + 1e-9)
    best = int(overlap.max(1).argmax())
    return names[best], float(overlap[best].max())


def _sampled(layers: Array, centre_y: float, centre_x: float, scale: float) -> Array:
    """Padded layers (n, H + 2, H + 2) at a template's cells, as 0 and 1. Shape (n, GRID * GRID)."""

    def taps(centre: float) -> tuple[NDArray[np.intp], Array]:
        position = np.clip(_grid() * scale + centre + 0.5, 0, layers.shape[1] - 1.001)
        return position.astype(int), position % 1

    (row, down), (column, right) = taps(centre_y), taps(centre_x)
    upper, lower = layers[:, row], layers[:, row + 1]
    lines = upper + down[:, None] * (lower - upper)
    sampled = lines[:, :, column] + right * (lines[:, :, column + 1] - lines[:, :, column])
    return (sampled > 0.5).reshape(len(layers), -1).astype(float)
