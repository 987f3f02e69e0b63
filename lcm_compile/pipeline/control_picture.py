"""The pictures that ControlNets read, and the numbers that requests have for each.

A control picture is resized to the bundle's pictures as diffusers' processor of control images does, which
does not keep the aspect ratio (Lanczos, in 8 bits), and turned into RGB from 0 to 1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from lcm_compile.errors import UsageError
from lcm_compile.spec import Shape
from lcm_compile.system.files import user_path

GIVE = "give a picture's file, such as --control outlines.png"
SAMPLE = "sample"  # the name of the picture that is made for proofs


@dataclass(frozen=True)
class ControlPicture:
    """A picture that a ControlNet reads.

    `file` is the name of its file without folders, "" for a picture that has none, and `sha256` the digest of
    the file, or of the picture's pixels. `pixels` is the picture itself in its own size and mode, or None
    where it is only told which picture it was.
    """

    file: str
    sha256: str
    pixels: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, source: Any) -> ControlPicture:
        """Returns the control picture of a file's path, a PIL image, or an array (h, w, 3) of 8 bits.

        A file's picture is turned upright, by its EXIF orientation. Raises UsageError if it is none of these,
        or can't be read.
        """
        from PIL import Image

        if isinstance(source, ControlPicture):
            return source
        if isinstance(source, str | Path):
            return cls.read(user_path(str(source)))
        if isinstance(source, Image.Image):
            image = source.copy()
        elif isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.shape[2:] == (3,):
            image = Image.fromarray(source)
        else:
            raise UsageError(
                f"a control picture must be a file's path, a PIL image or an array (height, width, 3) of "
                f"8 bits, not {type(source).__name__}",
                GIVE,
            )
        head = f"{image.mode} {image.size}".encode()
        return cls("", hashlib.sha256(head + image.tobytes()).hexdigest(), in_eight_bits(image, "it"))

    @classmethod
    def read(cls, path: Path) -> ControlPicture:
        """Returns the control picture in a file. Raises UsageError if it can't be read."""
        from io import BytesIO

        from PIL import Image, ImageOps

        try:
            content = path.read_bytes()
            with Image.open(BytesIO(content)) as opened:
                image = ImageOps.exif_transpose(opened)
                image.load()
        # Pillow raises SyntaxError for some broken PNGs, and refuses pictures made to exhaust memory.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"the control picture {path} can't be read: {why}", GIVE) from error
        return cls(path.name, hashlib.sha256(content).hexdigest(), in_eight_bits(image, str(path)))

    def planes(self, shape: Shape) -> np.ndarray:
        """Returns the picture (b, 3, h, w) from 0 to 1 for pictures of a shape.

        Raises UsageError if the picture itself is not here.
        """
        from PIL import Image

        if self.pixels is None:
            raise UsageError(f"the control picture {self.file or self.sha256[:12]} is not here", GIVE)
        # The order of diffusers' VaeImageProcessor: a palette's picture is resized before it becomes RGB.
        resized = self.pixels.resize((shape.width, shape.height), Image.Resampling.LANCZOS).convert("RGB")
        planes = np.asarray(resized).astype(np.float32).transpose(2, 0, 1) / np.float32(255)
        return np.tile(planes, (shape.batch, 1, 1, 1))


def in_eight_bits(image: Any, name: str) -> Any:
    """Returns a PIL image with 16 bits a pixel, as depth maps have, in 8 bits, and others as they are.

    Pillow itself would turn all above 255 into white. Raises UsageError for an image of floats, whose range
    is not known; `name` is its name there.
    """
    from PIL import Image

    if image.mode == "F":
        raise UsageError(f"the control picture {name} holds floats", "save it with 8 or 16 bits a pixel")
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))


def sample_picture(shape: Shape) -> ControlPicture:
    """Returns the control picture of proofs: a white circle's and a white square's outline on black."""
    from PIL import Image, ImageDraw

    side = min(shape.height, shape.width)
    image = Image.new("RGB", (shape.width, shape.height))
    pen, width = ImageDraw.Draw(image), max(1, side // 32)
    pen.ellipse((side // 8, side // 8, side * 5 // 8, side * 5 // 8), outline="white", width=width)
    pen.rectangle((side * 3 // 8, side * 3 // 8, side * 7 // 8, side * 7 // 8), outline="white", width=width)
    return ControlPicture(SAMPLE, "", image)


def control_pictures(given: Any) -> tuple[ControlPicture, ...]:
    """Returns one control picture or several, which are a list, as a tuple; () for None.

    Raises UsageError as ControlPicture.of does.
    """
    if given is None:
        return ()
    several = given if isinstance(given, list | tuple) else (given,)
    return tuple(ControlPicture.of(one) for one in several)


def find_control(told: Sequence[ControlPicture], folder: Path) -> tuple[ControlPicture, ...]:
    """Returns the control pictures that a saved picture tells, from their files.

    They are looked for by name in `folder` and in the current one. Raises UsageError if one is not there, or
    if the file there is another picture now.
    """
    found = []
    for one in told:
        if not one.file:
            raise UsageError(
                "it was drawn with a control picture from Python, which has no file",
                "name it: --control FILE",
            )
        name = Path(one.file).name
        paths = [path for path in (folder / name, Path(name)) if path.is_file()]
        if not paths:
            raise UsageError(
                f"it was drawn with the control picture {name}, which is neither in {folder} nor in the "
                "current folder",
                "name it: --control FILE",
            )
        here = [ControlPicture.read(path) for path in paths]
        same = next((picture for picture in here if picture.sha256 == one.sha256), None)
        if same is None:
            raise UsageError(
                f"{paths[0]} is not the control picture that it was drawn with: the sha256 was "
                f"{one.sha256[:12]}… and is {here[0].sha256[:12]}…",
                "name the right one, or draw with this one: --control FILE",
            )
        found.append(same)
    return tuple(found)


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


def without_pixels(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the fields of a dataclass as a dict without pixels: the `dict_factory` of `asdict` for JSON."""
    return {name: value for name, value in items if name != "pixels"}


def for_each(values: Sequence[float], count: int, default: float) -> list[float]:
    """Returns a value for each of `count` ControlNets: its own, the only one, or the default."""
    return [*values] if len(values) == count else [*(values or (default,))] * count
