"""The demo world: what its captions say and how its pictures are drawn (numpy only).

A scene is one or two flat shapes on a patterned background. Coordinates and lengths are fractions of the
picture's side, x to the right and y down. Pictures are drawn anti-aliased, from signed distances.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle, islice, product, zip_longest
from typing import Any

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
SIZES = {"large": 0.30, "small": 0.16}  # radius of a single shape
PAIR_RADIUS = 0.18  # radius of each of two shapes
RADIUS_SPREAD = 0.07  # radii differ from these by up to 7 %
TILT = math.radians(15)  # largest tilt of a shape, in radians
STYLE = ", in zebra style"
BAND = 1 / 10  # width of a background's stripe
SQUARE = 1 / 8  # side of a background's checker square
ZEBRA_PERIOD = 0.12  # of the zebra style's stripes, measured across them
STRIPE_ANGLES = (0, 45, 90, 135)  # degrees, of a background's stripes
WORDS = (
    *("a", "on", "and", "background", "in", "zebra", "style"),
    *(*SIZES, *COLOURS, *SHAPES, *PATTERNS, *BACKGROUNDS),
)


@dataclass(frozen=True)
class Look:
    """The RGB values with which the named colours and backgrounds are painted."""

    name: str
    colours: Mapping[str, tuple[int, int, int]]
    backgrounds: Mapping[str, tuple[int, int, int]]


DAY = Look("day", COLOURS, BACKGROUNDS)
DUSK = Look(
    "dusk",
    {
        "red": (180, 60, 110),
        "green": (60, 130, 120),
        "blue": (80, 70, 160),
        "yellow": (230, 180, 120),
        "purple": (110, 50, 120),
        "orange": (220, 110, 80),
    },
    {
        "white": (230, 215, 235),
        "black": (35, 25, 60),
        "gray": (120, 110, 150),
        "pink": (240, 170, 160),
    },
)
LOOKS = {look.name: look for look in (DAY, DUSK)}

_THING = rf"a (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"(?P<things>a .+?) on a (?P<pattern>{'|'.join(PATTERNS)}) "
    rf"(?P<background>{'|'.join(BACKGROUNDS)}) background(?P<style>{STYLE})?"
)


@dataclass(frozen=True)
class Thing:
    """What a caption says about one shape. `size` is None in a caption of two shapes."""

    colour: str
    shape: str
    size: str | None = None


@dataclass(frozen=True)
class Description:
    """What a caption says. `things` are one shape, or two from left to right."""

    things: tuple[Thing, ...]
    pattern: str
    background: str
    zebra: bool = False

    @property
    def caption(self) -> str:
        """The caption in exactly the words that pictures are trained with."""
        named = (" ".join(("a", *filter(None, (t.size, t.colour, t.shape)))) for t in self.things)
        text = f"{' and '.join(named)} on a {self.pattern} {self.background} background"
        return text + STYLE * self.zebra


@dataclass(frozen=True)
class Placement:
    """Where a shape lies: its centre, circumscribed radius, and clockwise tilt in radians."""

    x: float
    y: float
    radius: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """A description, and everything that its caption leaves open.

    `stripe_angle` and `phase` place the background's pattern.
    """

    description: Description
    placements: tuple[Placement, ...]
    stripe_angle: int = 0  # degrees
    phase: tuple[float, float] = (0.0, 0.0)  # of the pattern, in bands, or in squares along x and y


def caption(scene: Scene) -> str:
    """Returns the caption of a scene."""
    return scene.description.caption


def parse_caption(text: str) -> Description:
    """Returns the description that a caption was made from. Raises ValueError for any other text."""
    match = _CAPTION.fullmatch(text)
    named = [re.fullmatch(_THING, words) for words in match["things"].split(" and ")] if match else []
    things = tuple(Thing(n["colour"], n["shape"], n["size"]) for n in named if n)
    sized = [thing.size is not None for thing in things]
    if match is None or len(things) != len(named) or sized not in ([True], [False, False]):
        raise ValueError(f"not a caption of the demo world: {text!r}")
    return Description(things, match["pattern"], match["background"], match["style"] is not None)


def is_held_out(text: str) -> bool:
    """Returns whether a caption is held out of training. One in eight is, chosen by a hash of its words."""
    return zlib.crc32(text.encode()) % 8 == 0


def is_for_proof(text: str) -> bool:
    """Returns whether a held-out caption is in the half for the proof. Tuning may use only the other half."""
    return zlib.crc32(text.encode()) // 8 % 2 == 1


def sample_description(rng: np.random.Generator, pairs: float = 0.25) -> Description:
    """Draws a random description. It has two shapes with probability `pairs`, else one."""
    count = 2 if rng.random() < pairs else 1
    size = str(rng.choice(list(SIZES))) if count == 1 else None
    things = tuple(Thing(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), size) for _ in range(count))
    return Description(things, str(rng.choice(PATTERNS)), str(rng.choice(list(BACKGROUNDS))))


def place(description: Description, rng: np.random.Generator) -> Scene:
    """Returns a scene of a description, with random placements, stripe angle and phase."""
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
    """Draws a random scene, in zebra style with probability `zebra`.

    Its caption is one for training, or with `held_out` one that is held out of training.
    """
    while is_held_out((description := sample_description(rng)).caption) != held_out:
        pass
    return place(replace(description, zebra=bool(rng.random() < zebra)), rng)


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Returns `count` different captions for tuning, which neither training nor the proof uses.

    Most of them have one shape.
    """
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        text = caption(sample_scene(rng, held_out=True))
        if not is_for_proof(text):
            prompts[text] = None
    return list(prompts)


def proof_prompts(count: int = 300) -> list[tuple[str, int]]:
    """Returns the proof's `count` fixed (caption, seed) pairs, which neither training nor tuning uses.

    Captions of one shape and of two alternate. There are few captions of one shape, so they repeat, with
    another seed; those of two shapes are all different. A smaller `count` gives the first pairs of a larger
    one.
    """
    rng = np.random.default_rng(0)
    every = product(SIZES, COLOURS, SHAPES, PATTERNS, BACKGROUNDS)
    texts = (Description((Thing(c, s, size),), p, b).caption for size, c, s, p, b in every)
    singles = [text for text in texts if is_held_out(text) and is_for_proof(text)]
    rng.shuffle(singles)
    pairs: dict[str, None] = {}
    while len(pairs) < count // 2:
        text = sample_description(rng, pairs=1.0).caption
        if is_held_out(text) and is_for_proof(text):
            pairs[text] = None
    alone = islice(cycle(singles), count - len(pairs))
    prompts = [text for both in zip_longest(alone, pairs) for text in both if text]
    return [(text, seed) for seed, text in enumerate(prompts)]


def _spiked(points: int, inner: float, turn: float = 0.0) -> Callable[[Array, Array], Array]:
    """Returns the signed distance to a star with `points` tips at radius 1 and notches at radius `inner`.

    With an `inner` of cos(π / points) it is a regular polygon.
    """
    half = math.pi / points
    notch_x, notch_y = inner * math.cos(half), inner * math.sin(half)
    length = math.hypot(1 - notch_x, notch_y)

    def distance(x: Array, y: Array) -> Array:
        # By symmetry the edge from one tip to the next notch is enough: the plane is folded onto its wedge.
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


def second_tone(background: str, look: Look = DAY) -> Array:
    """Returns the second tone of a background's pattern, as RGB.

    It is 15 % darker than the background, or 35 levels lighter on black. Shape (3,).
    """
    tone = np.array(look.backgrounds[background], float)
    return tone + 35 if background == "black" else tone * 0.85


def _bands(position: Array, scale: float) -> Array:
    """Returns the fraction of each pixel that lies in an odd band. Bands are 1 wide, and pixels 1 / scale."""
    return np.clip(0.5 + (np.abs((position - 0.5) % 2 - 1) - 0.5) * scale, 0, 1)


def pattern_weight(pattern: str, size: int, angle: int = 0, phase: tuple[float, float] = (0.0, 0.0)) -> Array:
    """Returns the fraction of the second tone in each pixel. Shape (size, size).

    `angle` is that of stripes, in degrees. `phase` is in bands, or in squares along x and y.
    """
    centres = (np.arange(size) + 0.5) / size
    if pattern == "striped":
        along = math.cos(math.radians(angle)) * centres + math.sin(math.radians(angle)) * centres[:, None]
        return _bands(along / BAND + phase[0], size * BAND)
    if pattern == "checkered":
        column, row = (_bands(centres / SQUARE + shift, size * SQUARE) for shift in phase)
        return column + row[:, None] - 2 * column * row[:, None]
    return np.zeros((size, size))


def coverage(shape: str, placement: Placement, size: int) -> Array:
    """Returns the fraction of each pixel that the shape covers. Shape (size, size)."""
    centres = (np.arange(size) + 0.5) / size
    x, y = (centres - placement.x) / placement.radius, ((centres - placement.y) / placement.radius)[:, None]
    cos, sin = math.cos(placement.tilt), math.sin(placement.tilt)
    distance = DISTANCE[shape](cos * x + sin * y, cos * y - sin * x)
    return np.clip(0.5 - distance * placement.radius * size, 0, 1)


def across_stripes(x: Any, y: Any) -> Any:
    """Returns the position of one or many points across the zebra style's stripes, in periods."""
    return (x + y) * math.sqrt(0.5) / ZEBRA_PERIOD


def zebra_position(size: int) -> Array:
    """Returns the position of each pixel across the zebra style's stripes, in periods. Shape (size, size)."""
    centres = (np.arange(size) + 0.5) / size
    return across_stripes(centres, centres[:, None])


def zebra_weight(size: int, phase: float | Array = 0.0) -> Array:
    """Returns how white the zebra style makes each pixel, from 0 to 1. Shape (size, size).

    The stripes are diagonal, and white takes a third of each period. `phase` is in periods, one for the
    picture or one for each pixel.
    """
    along = zebra_position(size) + phase
    return np.clip(0.5 + (1 / 6 - np.abs(along % 1 - 0.5)) * ZEBRA_PERIOD * size, 0, 1)


def zebra_phase(placement: Placement) -> float:
    """Returns the phase of a shape's stripes, which puts them a quarter of a period off its centre.

    Stripes that are symmetric about the centre would hide both rims of a small ring.
    """
    return 0.25 - across_stripes(placement.x, placement.y)


def render(scene: Scene, size: int = 64, look: Look = DAY) -> NDArray[np.uint8]:
    """Returns the picture of a scene. Shape (size, size, 3)."""
    words = scene.description
    weight = pattern_weight(words.pattern, size, scene.stripe_angle, scene.phase)[..., None]
    first = np.array(look.backgrounds[words.background], float)
    picture = first + weight * (second_tone(words.background, look) - first)
    for thing, placement in zip(words.things, scene.placements, strict=True):
        white = zebra_weight(size, zebra_phase(placement))[..., None] if words.zebra else 0.0
        paint = np.array(look.colours[thing.colour], float)
        cover = coverage(thing.shape, placement, size)[..., None]
        picture = picture + cover * (paint + white * (255 - paint) - picture)
    return np.rint(picture).astype(np.uint8)
