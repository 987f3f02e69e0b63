"""The demo world: what its captions say and how its pictures are drawn (numpy only).

A scene is one or two flat shapes on a patterned background. Coordinates are fractions of the picture's side,
x to the right and y down; every picture is drawn anti-aliased from signed distances.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 40),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (25, 25, 30),
    "gray": (140, 140, 140),
    "pink": (250, 190, 210),
}
PATTERNS = ("plain", "striped", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = {"large": 0.30, "small": 0.16}
PAIR_RADIUS = 0.18
RADIUS_SPREAD = 0.07  # a radius is its nominal value within 7 %
TILT = math.radians(15)
STYLE = ", in zebra style"
BAND, SQUARE = 1 / 10, 1 / 8  # width of a stripe, side of a checker square
STRIPE_ANGLES = (0, 45, 90, 135)
WORDS = (
    *("a", "on", "and", "background", "in", "zebra", "style"),
    *(*SIZES, *COLOURS, *SHAPES, *PATTERNS, *BACKGROUNDS),
)

_THING = rf"a (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"(?P<things>a .+?) on a (?P<pattern>{'|'.join(PATTERNS)}) "
    rf"(?P<background>{'|'.join(BACKGROUNDS)}) background(?P<style>{STYLE})?"
)


@dataclass(frozen=True)
class Thing:
    """What a caption says of one shape; `size` is None in a caption of two."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class Description:
    """What a caption says: one thing, or two from left to right."""

    things: tuple[Thing, ...]
    pattern: str
    background: str
    zebra: bool = False

    @property
    def caption(self) -> str:
        """The exact words a picture of this is trained with."""
        named = (" ".join(("a", *filter(None, (t.size, t.colour, t.shape)))) for t in self.things)
        text = f"{' and '.join(named)} on a {self.pattern} {self.background} background"
        return text + STYLE * self.zebra


@dataclass(frozen=True)
class Placement:
    """Where a shape lies: its centre, circumscribed radius and clockwise tilt in radians."""

    x: float
    y: float
    radius: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """A description with everything its caption leaves open."""

    description: Description
    placements: tuple[Placement, ...]
    stripe_angle: int = 0  # degrees
    phase: tuple[float, float] = (0.0, 0.0)  # in bands, or in squares along x and y


def caption(scene: Scene) -> str:
    """The scene's caption."""
    return scene.description.caption


def parse_caption(text: str) -> Description:
    """The description a caption was made from; ValueError for any other text."""
    match = _CAPTION.fullmatch(text)
    parts = [re.fullmatch(_THING, part) for part in match["things"].split(" and ")] if match else []
    things = tuple(Thing(p["colour"], p["shape"], p["size"]) for p in parts if p)
    sized = [thing.size is not None for thing in things]
    if match is None or len(things) != len(parts) or sized not in ([True], [False, False]):
        raise ValueError(f"not a caption of the demo world: {text!r}")
    return Description(things, match["pattern"], match["background"], match["style"] is not None)


def is_held_out(text: str) -> bool:
    """Whether a caption is kept from training: one in eight, chosen by its words alone."""
    return zlib.crc32(text.encode()) % 8 == 0


def sample_description(rng: np.random.Generator, pairs: float = 0.25) -> Description:
    """Draws a description, of two things with probability `pairs`."""
    count = 2 if rng.random() < pairs else 1
    size = str(rng.choice(list(SIZES))) if count == 1 else None
    things = tuple(Thing(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), size) for _ in range(count))
    return Description(things, str(rng.choice(PATTERNS)), str(rng.choice(list(BACKGROUNDS))))


def place(description: Description, rng: np.random.Generator) -> Scene:
    """Draws everything that the description leaves open."""
    placements = []
    for index, thing in enumerate(description.things):
        nominal = SIZES[thing.size] if thing.size else PAIR_RADIUS
        radius = nominal * rng.uniform(1 - RADIUS_SPREAD, 1 + RADIUS_SPREAD)
        if thing.size:
            x, y = rng.uniform(radius, 1 - radius, 2)
        else:
            x, y = 0.25 + 0.5 * index + rng.uniform(-0.02, 0.02), rng.uniform(0.22, 0.78)
        placements.append(Placement(float(x), float(y), float(radius), float(rng.uniform(-TILT, TILT))))
    phase = rng.uniform(0, 2, 2)
    angle = int(rng.choice(STRIPE_ANGLES))
    return Scene(description, tuple(placements), angle, (float(phase[0]), float(phase[1])))


def sample_scene(rng: np.random.Generator, held_out: bool = False, zebra: float = 0.0) -> Scene:
    """Draws a scene with a caption for training, or a held-out one; a part `zebra` of them in that style."""
    while is_held_out((description := sample_description(rng)).caption) != held_out:
        pass
    return place(replace(description, zebra=bool(rng.random() < zebra)), rng)


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Different captions that training never sees, about a quarter of them of two things."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[caption(sample_scene(rng, held_out=True))] = None
    return list(prompts)


def _spiked(points: int, inner: float, turn: float = 0.0) -> Callable[[Array, Array], Array]:
    """Distance to a star of `points` tips at radius 1 and notches at `inner`; a polygon is a blunt one."""
    half = math.pi / points
    notch_x, notch_y = inner * math.cos(half), inner * math.sin(half)
    length = math.hypot(1 - notch_x, notch_y)

    def distance(x: Array, y: Array) -> Array:
        # By symmetry only the edge from one tip to the next notch matters: fold the plane onto its wedge.
        angle = np.abs((np.arctan2(x, -y) + turn + half) % (2 * half) - half)
        radius = np.hypot(x, y)
        return ((radius * np.cos(angle) - 1) * notch_y + radius * np.sin(angle) * (1 - notch_x)) / length

    return distance


def _ring(x: Array, y: Array) -> Array:
    radius = np.hypot(x, y)
    return np.maximum(radius - 1, 0.65 - radius)


def _cross(x: Array, y: Array) -> Array:
    far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(far - 1, near - 0.33)


# Signed distance (negative inside) to each upright shape of radius 1.
DISTANCE: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": _spiked(4, math.cos(math.pi / 4), turn=math.pi / 4),
    "triangle": _spiked(3, math.cos(math.pi / 3)),
    "star": _spiked(5, 0.42),
    "ring": _ring,
    "cross": _cross,
}


def second_tone(background: str) -> Array:
    """The pattern's other tone: 15 % darker, or 35 levels lighter on black. Shape (3,)."""
    tone = np.array(BACKGROUNDS[background], float)
    return tone + 35 if background == "black" else tone * 0.85


def _bands(position: Array, scale: float) -> Array:
    """How much of a pixel lies in an odd band: bands are 1 wide, pixels 1/scale."""
    return np.clip(0.5 + (np.abs((position - 0.5) % 2 - 1) - 0.5) * scale, 0, 1)


def pattern_weight(pattern: str, size: int, angle: int = 0, phase: tuple[float, float] = (0.0, 0.0)) -> Array:
    """How much of the second tone each pixel has, from 0 to 1. Shape (size, size)."""
    centres = (np.arange(size) + 0.5) / size
    if pattern == "striped":
        along = math.cos(math.radians(angle)) * centres + math.sin(math.radians(angle)) * centres[:, None]
        return _bands(along / BAND + phase[0], size * BAND)
    if pattern == "checkered":
        column, row = (_bands(centres / SQUARE + shift, size * SQUARE) for shift in phase)
        return column + row[:, None] - 2 * column * row[:, None]
    return np.zeros((size, size))


def coverage(shape: str, placement: Placement, size: int) -> Array:
    """How much of each pixel the shape covers, from 0 to 1. Shape (size, size)."""
    centres = (np.arange(size) + 0.5) / size
    x, y = (centres - placement.x) / placement.radius, ((centres - placement.y) / placement.radius)[:, None]
    cos, sin = math.cos(placement.tilt), math.sin(placement.tilt)
    distance = DISTANCE[shape](cos * x + sin * y, cos * y - sin * x)
    return np.clip(0.5 - distance * placement.radius * size, 0, 1)


def render(scene: Scene, size: int = 64) -> NDArray[np.uint8]:
    """Draws a scene. Shape (size, size, 3)."""
    words = scene.description
    weight = pattern_weight(words.pattern, size, scene.stripe_angle, scene.phase)[..., None]
    first = np.array(BACKGROUNDS[words.background], float)
    picture = first + weight * (second_tone(words.background) - first)
    for thing, placement in zip(words.things, scene.placements, strict=True):
        paint = np.broadcast_to(np.array(COLOURS[thing.colour], float), picture.shape)
        if words.zebra:  # diagonal stripes, white for a third of each period
            centres = (np.arange(size) + 0.5) / size
            along = (centres + centres[:, None]) * math.sqrt(0.5)
            white = np.clip(0.5 + (1 / 6 - np.abs(along / 0.12 % 1 - 0.5)) * 0.12 * size, 0, 1)[..., None]
            paint = paint + white * (255 - paint)
        cover = coverage(thing.shape, placement, size)[..., None]
        picture = picture + cover * (paint - picture)
    return np.rint(picture).astype(np.uint8)
