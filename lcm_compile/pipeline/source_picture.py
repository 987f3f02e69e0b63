"""The pictures that a drawing begins with: reading them, and bringing them to the size of a bundle."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

ALPHA = "alpha"  # the mask that is the picture's own transparency
# Modes of more than 8 bits, with what their values are divided by.
DEEP = {"I;16": 257, "I;16L": 257, "I;16B": 257, "I;16N": 257, "I": 257}
MOST_PIXELS = 1 << 27  # of a picture with a border
WHITE = 127.5  # half of 255: what is as bright as this in a mask, or brighter, is repainted
HINT = "give a PNG, JPEG or WebP, or another picture that Pillow opens"


@dataclass(frozen=True)
class SourcePicture:
    """A picture or a mask that was given: the name of its file, and the SHA-256 of the file's bytes.

    A PIL image without a file has the name "" and the SHA-256 of its pixels. `alpha` says that it is the
    mask which the transparency of that file is, and `border` that it was extended by so many pixels at the
    left, top, right and bottom, or is the mask of that. Two of them are equal if these are.
    """

    name: str
    sha256: str
    alpha: bool = False
    border: tuple[int, ...] = ()

    @property
    def image(self) -> Image:
        """The picture in RGB or RGBA, turned upright."""
        image: Image | None = vars(self).get("_image")
        if image is None:
            raise UsageError(
                f"the picture {self.name} was named, but not opened", "open it with source_picture"
            )
        return image

    def pixels(self, height: int, width: int) -> np.ndarray:
        """Returns the picture as float32 (height, width, 3) from 0 to 1; what is transparent is on white."""
        image = on(self.image, (255, 255, 255))
        return np.asarray(fitted(image, height, width), np.float32) / 255

    def mask(self, height: int, width: int) -> np.ndarray:
        """Returns the mask as float32 (height, width): 1 is repainted, 0 is kept, and nothing is between."""
        return (np.asarray(fitted(self.grey(), height, width)) >= WHITE).astype(np.float32)

    def grey(self) -> Image:
        """Returns the mask in grey before it is split into black and white; transparency is black."""
        from PIL import ImageOps

        if self.alpha:
            return ImageOps.invert(self.image.getchannel("A"))
        return on(self.image, (0, 0, 0)).convert("L")

    def as_mask(self) -> SourcePicture:
        """Returns the mask that repaints what is transparent. Raises UsageError if nothing can be so."""
        if self.image.mode != "RGBA":
            raise UsageError(
                f"the mask is to be the image's transparency, and {self.name or 'the image'} has none",
                "give a mask of its own, whose white parts are repainted",
            )
        return made(self.name, self.sha256, self.image, alpha=True)


def source_picture(given: Any, called: str = "image") -> SourcePicture:
    """Returns the picture at a path, or a PIL image, or a SourcePicture as it is.

    `called` is its name in messages. Raises UsageError if it is none, or can't be read.
    """
    from PIL import Image

    if isinstance(given, SourcePicture):
        return given
    if isinstance(given, Image.Image):
        image = converted(given, called)
        pixels = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
        return made(Path(str(getattr(given, "filename", ""))).name, pixels, image)
    if not isinstance(given, str | Path):
        raise UsageError(f"the {called} must be a path or a PIL image, not {type(given).__name__}")
    path = Path(given).expanduser()
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"the {called} {path} can't be read: {why}", HINT) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                image = converted(opened, called)
    # Pillow raises many kinds of errors for broken files, and refuses pictures made to exhaust memory.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        why = str(error).replace("<_io.BytesIO object at ", "<").partition(" <")[0]
        raise UsageError(f"the {called} {path} can't be read as a picture: {why}", HINT) from error
    return made(path.name, hashlib.sha256(data).hexdigest(), image)


def made(
    name: str, sha256: str, image: Image, alpha: bool = False, border: tuple[int, ...] = ()
) -> SourcePicture:
    """Returns a SourcePicture that holds its image, which is no field: it is no part of its settings."""
    source = SourcePicture(name, sha256, alpha, border)
    object.__setattr__(source, "_image", image)
    return source


def outpainted(given: Any, border: Sequence[int]) -> dict[str, SourcePicture]:
    """Returns the `image` and the `mask` of a request that draws what is around a picture.

    `border` is the pixels of the picture that it is extended by at the left, top, right and bottom. It is
    filled with the colours of the picture's edge. Raises UsageError if the border is none or too large, or as
    source_picture does.
    """
    from PIL import Image

    picture = source_picture(given)
    sides = tuple(border)
    if len(sides) != 4 or not all(type(side) is int and side >= 0 for side in sides) or not any(sides):
        raise UsageError(
            f"the border to outpaint must be four numbers of pixels, not {border!r}",
            "left, top, right and bottom, for example 64,0,64,0",
        )
    left, top, right, bottom = sides
    inner = np.asarray(on(picture.image, (255, 255, 255)))
    if (inner.shape[0] + top + bottom) * (inner.shape[1] + left + right) > MOST_PIXELS:
        raise UsageError(f"with that border the image has over {MOST_PIXELS} pixels", "give a smaller one")
    around = (top, bottom), (left, right)
    canvas = Image.fromarray(np.pad(inner, (*around, (0, 0)), mode="edge"))
    repainted = np.pad(np.zeros(inner.shape[:2], np.uint8), around, constant_values=255)
    mask = Image.fromarray(repainted).convert("RGB")
    return {
        name: made(picture.name, picture.sha256, image, border=sides)
        for name, image in (("image", canvas), ("mask", mask))
    }


def begun_at(image: Any, mask: Any, border: Sequence[int] | None) -> dict[str, Any]:
    """Returns the `image` and the `mask` of a request, opened once for all its pictures.

    Raises UsageError if a border is given with a mask or without an image, or as outpainted does.
    """
    if border is None:
        return {"image": None if image is None else source_picture(image), "mask": mask}
    if image is None or mask is not None:
        raise UsageError("outpainting takes an image, and no mask: the border is what is repainted")
    return outpainted(image, border)


def find_again(named: SourcePicture, folders: Iterable[Path], called: str) -> SourcePicture:
    """Returns a picture, of which the name and the SHA-256 are known, opened from one of these folders.

    Raises UsageError if no folder has it, or only another of its name.
    """
    again = f"give it with --{called}, which may be another"
    paths = [path for folder in folders if named.name and (path := folder / named.name).is_file()]
    for path in paths:
        found = source_picture(path, called)
        if found.sha256 == named.sha256:
            if named.border:
                return outpainted(found, named.border)[called]
            return found.as_mask() if named.alpha else found
    if paths:
        raise UsageError(f"{paths[0]} is not the {called} that was drawn from: its SHA-256 differs", again)
    raise UsageError(f"the {called} {named.name or 'without a name'} that was drawn from is not here", again)


def converted(image: Image, called: str) -> Image:
    """Returns a picture of any mode as one of 8 bits in RGB or RGBA, turned upright as its EXIF says.

    Raises UsageError for floating point, whose range nobody knows.
    """
    from PIL import Image as Images
    from PIL import ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.int64) // DEEP[image.mode]
        return Images.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UsageError(f"the {called} is in floating point, of a range that it does not tell", HINT)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def on(image: Image, colour: tuple[int, int, int]) -> Image:
    """Returns a picture in RGB; what is transparent shows the colour."""
    from PIL import Image as Images

    if image.mode == "RGB":
        return image
    return Images.alpha_composite(Images.new("RGBA", image.size, colour), image).convert("RGB")


def fitted(image: Image, height: int, width: int) -> Image:
    """Returns a picture scaled to cover this size, and cropped around its centre."""
    from PIL import Image as Images
    from PIL import ImageOps

    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Images.Resampling.LANCZOS)


def check_mask(image: SourcePicture, mask: SourcePicture) -> None:
    """Raises UsageError if a mask is not of its image's proportions, or repaints nothing."""
    (width, height), (mask_width, mask_height) = image.image.size, mask.image.size
    # A mask that was scaled down may be off by less than a pixel.
    if abs(mask_width * height - mask_height * width) >= max(width, height, mask_width, mask_height):
        raise UsageError(
            f"the mask is {mask_width}×{mask_height} pixels, and the image {width}×{height}",
            "give a mask of the image's size, or proportions",
        )
    if np.asarray(mask.grey()).max() < WHITE:
        raise UsageError("the mask repaints nothing: what is white in it is repainted, and it has none")
