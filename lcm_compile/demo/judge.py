"""Judges pictures of the demo world by fixed rules: reads what one shows and compares it with its caption."""

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
NEAR_BACKGROUND = 30.0  # largest RGB distance from the line between a background's two tones
NEAR_COLOUR = 80.0  # largest RGB distance from a nominal colour
MIN_OVERLAP = 0.6  # intersection over union with the best template; below it a blob is not a known shape
MIN_PATTERN = 0.45  # correlation with the best pattern; below it the pattern is unknown
MIN_STRIPES = 0.75  # correlation with the style's stripes; below it a shape has none
# Between a stripe's middle and the paint next to it, as a fraction of the way from paint to white.
MIN_CONTRAST = 0.5
MAX_OFFSET = 0.125  # of one of two shapes from the middle of its half, in picture sides
# The RGB distance at which grain becomes visible. Rendered pictures that the VAE reconstructs stay under 5.
MAX_GRAIN = 11.5
LARGE = 0.21  # radius between the largest small shape and the smallest large one, in picture sides
GRID = 40  # cells along one side of a shape template
EXTENT = 1.15  # half the side of a shape template, for a shape of area 1


@dataclass(frozen=True)
class Blob:
    """One shape as it was read from a picture.

    `colour` and `shape` are None if they were not recognised. `overlap` is the intersection over union with
    the best template, and `x` the horizontal centre, from 0 to 1.
    """

    colour: str | None
    shape: str | None
    size: str
    overlap: float
    x: float
    striped: bool


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    `pattern` is None if it was not recognised, `blobs` are the shapes from left to right, and `grain` is the
    unevenness of areas that should be flat, as an RGB distance.
    """

    background: str
    pattern: str | None
    blobs: tuple[Blob, ...]
    grain: float


def judge(picture: Picture, look: Look = DAY) -> Reading:
    """Reads what a square picture (H, H, 3) shows, given the look that its colours should have."""
    pixels = picture.astype(float)
    tones = {name: _from_tones(pixels, name, look) for name in look.backgrounds}
    background = max(tones, key=lambda name: np.sum(tones[name][0] < NEAR_BACKGROUND))
    distance, tone = tones[background]
    colours = np.array(list(look.colours.values()), float)
    to_colours = np.linalg.norm(pixels[:, :, None] - colours, axis=-1).min(-1)
    painted = to_colours < distance
    # White stripes cut a shape into pieces, so shapes are first searched for with the gaps closed.
    white = np.linalg.norm(pixels - 255, axis=-1) < distance
    masks = [m for m in _shapes(_closed(painted | white, straight=False)) if np.any(m & painted)]
    stripes = [_zebra_stripes(pixels, mask, painted) for mask in masks]
    if all(weight is None for weight in stripes):
        masks = _shapes(painted)
        stripes = [None] * len(masks)
    blobs = tuple(
        _read_blob(pixels, mask & painted, weight, look) for mask, weight in zip(masks, stripes, strict=True)
    )
    pattern = _read_pattern(tone, distance < NEAR_BACKGROUND)
    return Reading(background, pattern, blobs, _grain(pixels, _palette(background, pattern, blobs, look)))


def matches(reading: Reading, asked: Description) -> dict[str, bool | None]:
    """Returns for each of COLUMNS whether a reading is right, or None if the caption does not specify it.

    `binding` is whether each of two shapes has the right colour and form and is near the middle of its half;
    `clean` is whether the picture has little grain. With the wrong number of shapes, every column about
    shapes is wrong.
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
    """Returns the fraction of pictures that are right in each column.

    A column counts only the pictures whose prompt specifies it, and is left out if there are none.
    """
    rows = [
        matches(judge(picture, look), parse_caption(text))
        for picture, text in zip(pictures, prompts, strict=True)
    ]
    columns = {name: [right for row in rows if (right := row[name]) is not None] for name in COLUMNS}
    return {name: sum(rights) / len(rights) for name, rights in columns.items() if rights}


def _from_tones(pixels: Array, background: str, look: Look) -> tuple[Array, Array]:
    """Returns each pixel's RGB distance from the line between a background's two tones, and its place on it.

    Both have shape (H, H). The place runs from 0, the first tone, to 1, the second tone.
    """
    first = np.array(look.backgrounds[background], float)
    line = second_tone(background, look) - first
    place = np.clip((pixels - first) @ line / (line @ line), 0, 1)
    return np.linalg.norm(pixels - first - place[..., None] * line, axis=-1), place


@lru_cache(maxsize=8)
def _pattern_templates(size: int) -> tuple[list[str], Array]:
    """Returns every stripe and checker pattern in steps of its phase: names, and rows of ±1.

    The rows have shape (n, size * size).
    """
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
    """Returns the background's pattern, or None if it is not recognised.

    `tone` is each pixel's place between the two tones, and `visible` marks the background's pixels. Both have
    shape (H, H).
    """
    count = visible.sum()
    if np.sum(visible & (tone > 0.5)) <= 0.15 * count:
        return "plain"
    names, templates = _pattern_templates(len(tone))
    values = np.where(visible, tone - 0.5, 0).ravel()
    fit = np.abs(templates @ values) / (np.linalg.norm(values) * math.sqrt(count) + 1e-9)
    best = int(fit.argmax())
    return names[best] if fit[best] > MIN_PATTERN else None


def _shapes(mask: Mask) -> list[Mask]:
    """Returns the connected regions of a mask that count as shapes, at most two, from left to right."""
    remaining = mask.copy()
    regions = []
    while remaining.any():
        region = _connected(remaining, tuple(np.argwhere(remaining)[0]))
        remaining &= ~region
        regions.append(region)
    regions.sort(key=lambda region: -int(region.sum()))
    smallest = max(0.005 * mask.size, 0.2 * regions[0].sum()) if regions else 0
    counted = [region for region in regions if region.sum() >= smallest][:2]
    return sorted(counted, key=lambda region: float(np.nonzero(region)[1].mean()))


def _connected(mask: Mask, start: tuple[int, ...]) -> Mask:
    """Returns the region of a mask that is connected to `start` by the edges of pixels."""
    height, width = mask.shape
    region = np.zeros_like(mask)
    region[start] = True
    todo = [start]
    while todo:
        y, x = todo.pop()
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= near[0] < height and 0 <= near[1] < width and mask[near] and not region[near]:
                region[near] = True
                todo.append(near)
    return region


def _inner(mask: Mask) -> Mask:
    """Returns the pixels of a mask (H, H) whose four neighbours are in it too, or the mask if none are."""
    padded = np.pad(mask, 1)
    inner = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner if inner.any() else mask


def _closed(mask: Mask, straight: bool) -> Mask:
    """Closes the gaps that the style's stripes leave in a mask (H, H), by dilation and then erosion.

    With `straight` both go along the diagonal across the stripes, otherwise in all directions.
    """
    # A white stripe is a third of a period wide, and a diagonal step is √2 pixels long. The pixel that is
    # added allows for half a pixel at each edge of a stripe that is neither paint nor white.
    reach = math.ceil((ZEBRA_PERIOD / 3 * len(mask) / math.sqrt(2) + 1) / 2)
    axes: list[tuple[int, ...]] = [(0, 1)] if straight else [(0,), (1,)]
    closed = np.pad(mask, 2 * reach)
    for gather, axis in product((np.logical_or, np.logical_and), axes):
        closed = gather.reduce([np.roll(closed, len(axis) * (by,), axis) for by in range(-reach, reach + 1)])
    return closed[2 * reach : -2 * reach, 2 * reach : -2 * reach]


def _zebra_stripes(pixels: Array, mask: Mask, painted: Mask) -> Array | None:
    """Returns how white the style's stripes make each pixel near a shape, or None if it has no such stripes.

    `mask` (H, H) is the shape with its gaps closed, and `painted` marks the pixels in a shape's colour.
    The stripes must have the style's direction and period. Their phase is measured locally, over about one
    period, because no caption says that both sides of a ring have the same phase.
    """
    size = len(mask)
    paint = np.median(pixels[_inner(mask & painted)], axis=0)
    to_white = 255 - paint
    inside = _inner(_closed(mask & painted, straight=True))
    white = np.clip((pixels - paint) @ to_white / (to_white @ to_white), 0, 1)

    def local_sum(values: NDArray[Any]) -> NDArray[Any]:
        return blur @ np.where(inside, values, 0) @ blur

    reach = np.arange(size) - np.arange(size)[:, None]
    blur = np.exp(-((reach / (ZEBRA_PERIOD * size)) ** 2) / 2)
    swing = white - local_sum(white) / np.maximum(local_sum(inside), 1e-9)
    # Demodulation: the angle of the product of the picture and the style's wave is the phase by which the
    # picture's stripes are ahead.
    product_sum = local_sum(swing * np.exp(-2j * np.pi * zebra_position(size)))
    wanted = zebra_weight(size, np.angle(product_sum) / (2 * np.pi) + 0.5)
    seen, model = white[inside], wanted[inside]
    fit = np.mean((seen - seen.mean()) * (model - model.mean())) / (seen.std() * model.std() + 1e-9)
    stripe, between = seen[model > 0.9], seen[model < 0.1]
    if fit < MIN_STRIPES or not len(stripe) or not len(between):
        return None
    return wanted if stripe.mean() - between.mean() > MIN_CONTRAST else None


def _read_blob(pixels: Array, mask: Mask, stripes: Array | None, look: Look) -> Blob:
    """Reads the shape under a mask (H, H). `stripes` is what `_zebra_stripes` returned for it."""
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
    """Returns the colours of everything that was recognised in a picture. Shape (n, 3)."""
    palette = [np.array(look.backgrounds[background], float)]
    if pattern != "plain":
        palette.append(second_tone(background, look))
    palette += [np.array(look.colours[blob.colour], float) for blob in blobs if blob.colour]
    if any(blob.striped for blob in blobs):
        palette.append(np.full(3, 255.0))
    return np.array(palette)


def _grain(pixels: Array, palette: Array) -> float:
    """Returns the root mean square RGB distance from the palette (n, 3) of all pixels away from edges.

    Returns infinity if a picture has almost no such pixels.
    """
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    lowest = highest = np.pad(distance.argmin(-1), 1, mode="edge")
    for axis in (0, 1):
        lowest = np.lib.stride_tricks.sliding_window_view(lowest, 3, axis).min(-1)
        highest = np.lib.stride_tricks.sliding_window_view(highest, 3, axis).max(-1)
    flat = lowest == highest
    return float(np.sqrt(np.mean(distance.min(-1)[flat] ** 2))) if flat.mean() > 0.02 else math.inf


def _grid() -> Array:
    """Returns a template's cell centres along one axis, in units of the shape's √area. Shape (GRID,)."""
    return ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * EXTENT


@lru_cache(maxsize=1)
def _shape_templates() -> tuple[list[str], Array]:
    """Returns every shape with area 1, rotated in steps of 5 degrees: names, and rows of 0 and 1.

    The rows have shape (n, GRID * GRID).
    """
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
    """Returns the name of the template that fits a mask (H, H) best, and their intersection over union.

    The mask is centred and scaled to area 1. Only `bare` pixels count, which no stripe covers. If stripes
    cover some, several centres and areas near the mask's are tried, because a stripe along the rim may be
    missing from the mask.
    """
    stripe = ZEBRA_PERIOD / 3 * len(mask)
    unstriped = bool(bare.all())
    shifts = (0.0,) if unstriped else tuple(stripe * step for step in (-0.5, -0.25, 0.0, 0.25, 0.5))
    growths = (1.0,) if unstriped else (0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12)
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
    """Samples layers at a template's cells, by bilinear interpolation and a threshold of 0.5.

    `layers` are padded, (n, H + 2, H + 2). Returns 0 and 1, of shape (n, GRID * GRID).
    """

    def taps(centre: float) -> tuple[NDArray[np.intp], Array]:
        position = np.clip(_grid() * scale + centre + 0.5, 0, layers.shape[1] - 1.001)
        return position.astype(int), position % 1

    (row, down), (column, right) = taps(centre_y), taps(centre_x)
    upper, lower = layers[:, row], layers[:, row + 1]
    lines = upper + down[:, None] * (lower - upper)
    sampled = lines[:, :, column] + right * (lines[:, :, column + 1] - lines[:, :, column])
    return (sampled > 0.5).reshape(len(layers), -1).astype(float)
