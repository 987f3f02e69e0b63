"""The pictures that a request has for ControlNets, and the numbers that it has for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from lcm_compile.errors import UsageError
from lcm_compile.pipeline.source_picture import SourcePicture, made, source_picture
from lcm_compile.spec import Shape

GIVE = "give a picture's file, such as --control outlines.png"
SAMPLE = "sample"  # the name of the picture that is made for proofs


def sample_picture(shape: Shape) -> SourcePicture:
    """Returns the control picture of proofs: a white circle's and a white square's outline on black."""
    from PIL import Image, ImageDraw

    side = min(shape.height, shape.width)
    image = Image.new("RGB", (shape.width, shape.height))
    pen, width = ImageDraw.Draw(image), max(1, side // 32)
    pen.ellipse((side // 8, side // 8, side * 5 // 8, side * 5 // 8), outline="white", width=width)
    pen.rectangle((side * 3 // 8, side * 3 // 8, side * 7 // 8, side * 7 // 8), outline="white", width=width)
    return made(SAMPLE, "", image)


def control_pictures(given: Any, detectors: str | Sequence[str] | None = None) -> tuple[SourcePicture, ...]:
    """Returns one control picture or several, which are a list, as a tuple; () for None.

    `detectors` are what makes them of the pictures that are given, one for all or for each. Raises UsageError
    as source_picture and detected_by do, and if there are not as many detectors as pictures.
    """
    several = () if given is None else given if isinstance(given, list | tuple) else (given,)
    pictures = tuple(source_picture(one, "control") for one in several)
    each = (detectors,) if isinstance(detectors, str) else tuple(detectors or ())
    if not each:
        return pictures
    if not pictures:
        raise UsageError("a control detector is given without a control picture", GIVE)
    if len(each) == 1:
        each *= len(pictures)
    if len(each) != len(pictures):
        raise UsageError(
            f"{len(each)} control detectors for {len(pictures)} control pictures: give one, or one for each",
            "none reads a picture as it is",
        )
    return tuple(one.detected_by(detector) for one, detector in zip(pictures, each, strict=True))


def control_numbers(given: Any, name: str, pictures: int, least: float, most: float) -> tuple[float, ...]:
    """Returns a number, or one for each control picture, as a tuple; () for None.

    Raises UsageError if one is no number from `least` to `most`, or if there are not as many as pictures.
    """
    if given is None:
        return ()
    several = tuple(given) if isinstance(given, list | tuple) else (given,)
    for one in several:
        if isinstance(one, bool) or not isinstance(one, Real):
            raise UsageError(f"{name} must be a number, not {one!r}")
        if not least <= float(one) <= most or not math.isfinite(one):
            limits = f"from {least:g} to {most:g}" if math.isfinite(most) else "a finite number"
            raise UsageError(f"{name} must be {limits}, not {one}")
    if several and not pictures:
        raise UsageError(f"{name} is given without a control picture", GIVE)
    if len(several) not in (0, 1, pictures):
        raise UsageError(
            f"{len(several)} values of {name} for {pictures} control pictures: give one, or one for each"
        )
    return tuple(float(one) for one in several)


def check_span(starts: Sequence[float], ends: Sequence[float]) -> None:
    """Raises UsageError if a control picture's start is not before its end."""
    count = max(len(starts), len(ends))
    for start, end in zip(for_each(starts, count, 0.0), for_each(ends, count, 1.0), strict=True):
        if start >= end:
            raise UsageError(f"control start {start:g} must be before control end {end:g}")


def for_each(values: Sequence[float], count: int, default: float) -> list[float]:
    """Returns a value for each of `count` ControlNets: its own, the only one, or the default."""
    return [*values] if len(values) == count else [*(values or (default,))] * count
