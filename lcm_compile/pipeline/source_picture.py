"""The pictures that a drawing is given: the image it begins at, its mask, and what ControlNets read."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lcm_compile.errors import UsageError
from lcm_compile.pipeline.detect import NONE, check_detector, detected
from lcm_compile.spec import Shape
from lcm_compile.system.files import user_path

if TYPE_CHECKING:
    from PIL.Image import Image

# What a picture is given as: a path, the bytes of a picture's file, or what is opened already.
Given: TypeAlias = "str | Path | bytes | np.ndarray | Image | SourcePicture"
ALPHA = "alpha"  # the mask that is the picture's own transparency
CALLED = {"control": "control picture"}  # what the field of a request is called, if not by its name
MOST_PIXELS = 1 << 27  # of a picture with a border
WHITE = 127.5  # half of 255: what is as bright as this in a mask, or brighter, is repainted
HINT = "give a PNG, JPEG or WebP, or another picture that Pillow opens"


@dataclass(frozen=True)
class SourcePicture:
    """A picture that was given: the name of its file, and the SHA-256 of the file's bytes.

    What is given without a file has the name "", and a PIL image or an array the SHA-256 of its pixels.
    `alpha` says that it is the mask which the transparency of that file is, and `border` that it was extended
    by so many pixels at the left, top, right and bottom, or is the mask of that. `detector` is what a
    ControlNet's picture is made of the file with, "" for a picture that is read as it is. Two of them are
    equal if these are.
    """

    name: str
    sha256: str
    alpha: bool = False
    border: tuple[int, ...] = ()
    detector: str = ""

    @property
    def own(self) -> Image:
        """The picture in 8 bits of its own mode, turned upright. Raises UsageError if it is not opened."""
        image: Image | None = vars(self).get("_own")
        if image is None:
            raise UsageError(
                f"the picture {self.name} was named, but not opened", "open it with source_picture"
            )
        return image

    @property
    def image(self) -> Image:
        """The picture in RGB or RGBA. Raises UsageError if it is not opened."""
        return in_colours(self.own)

    @property
    def latent(self) -> np.ndarray | None:
        """The latent (c, h, w) that is begun at, in the place of an image that is encoded."""
        return vars(self).get("_latent")

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

    def planes(self, shape: Shape) -> np.ndarray:
        """Returns what a ControlNet reads (b, 3, h, w), from 0 to 1, for pictures of a shape.

        It is made as diffusers' processor of control images makes it, which does not keep the aspect ratio
        (Lanczos, in 8 bits, with a palette's picture resized before it becomes RGB). A detector reads the
        resized picture.
        """
        from PIL import Image

        resized = self.own.resize((shape.width, shape.height), Image.Resampling.LANCZOS).convert("RGB")
        pixels = np.asarray(resized)
        if self.detector:
            pixels = detected(pixels, self.detector)
        planes = pixels.astype(np.float32).transpose(2, 0, 1) / np.float32(255)
        return np.tile(planes, (shape.batch, 1, 1, 1))

    def as_mask(self) -> SourcePicture:
        """Returns the mask that repaints what is transparent. Raises UsageError if nothing can be so."""
        if self.image.mode != "RGBA":
            raise UsageError(
                f"the mask is to be the image's transparency, and {self.name or 'the image'} has none",
                "give a mask of its own, whose white parts are repainted",
            )
        return made(self.name, self.sha256, self.image, alpha=True)

    def detected_by(self, detector: str) -> SourcePicture:
        """Returns what a detector makes of the picture for a ControlNet: see detect, `none` makes nothing.

        Raises UsageError for a detector that is not known, and LcmCompileError if it can't run here.
        """
        detector = "" if detector == NONE else detector
        if detector:
            check_detector(detector)
        return made(self.name, self.sha256, self.own, self.alpha, self.border, detector)


def source_picture(given: Any, field: str = "image") -> SourcePicture:
    """Returns a picture that was given: a path, the bytes of a picture's file, a PIL image or an array.

    An array is of 8 bits, and (height, width) in grey or (height, width, 3 or 4). `field` is the field of the
    request that it is for. Raises UsageError if it is none of these, or can't be read.
    """
    from PIL import Image

    called = CALLED.get(field, field)
    if isinstance(given, SourcePicture):
        return given
    if is_array_of_pixels(given):
        given = Image.fromarray(given)
    if isinstance(given, Image.Image):
        own = upright(given, called)
        return made(Path(str(getattr(given, "filename", ""))).name, digest_of(own), own)
    if isinstance(given, bytes):
        name, data = "", given
    elif isinstance(given, str | Path):
        path = user_path(str(given))
        name, called = path.name, f"{called} {path}"
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"the {called} can't be read: {why}", HINT) from error
    else:
        raise UsageError(
            f"the {called} must be a path, a PIL image, an array of 8 bits or a file's bytes, not "
            f"{type(given).__name__}",
            HINT,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                own = upright(opened, called)
    # Pillow raises many kinds of errors for broken files, and refuses pictures made to exhaust memory.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        why = str(error).replace("<_io.BytesIO object at ", "<").partition(" <")[0]
        raise UsageError(f"the {called} can't be read as a picture: {why}", HINT) from error
    return made(name, hashlib.sha256(data).hexdigest(), own)


def is_array_of_pixels(given: Any) -> bool:
    """Returns whether something is an array of pixels in 8 bits, in grey, RGB or RGBA."""
    if not isinstance(given, np.ndarray) or given.dtype != np.uint8 or not given.size:
        return False
    return given.ndim == 2 or given.shape[2:] in ((3,), (4,))


def digest_of(own: Image) -> str:
    """Returns the SHA-256 of a picture's size and pixels."""
    image = in_colours(own)
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def made(
    name: str,
    sha256: str,
    image: Image,
    alpha: bool = False,
    border: tuple[int, ...] = (),
    detector: str = "",
) -> SourcePicture:
    """Returns a SourcePicture that holds its image, which is no field: it is no part of its settings."""
    source = SourcePicture(name, sha256, alpha, border, detector)
    object.__setattr__(source, "_own", image)
    return source


def source_latent(latent: np.ndarray) -> SourcePicture:
    """Returns a latent (c, h, w), scaled as the UNet takes it, as a picture to begin at."""
    source = SourcePicture("", hashlib.sha256(latent.tobytes()).hexdigest())
    object.__setattr__(source, "_latent", latent)
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


def find_again(named: SourcePicture, folders: Iterable[Path], field: str) -> SourcePicture:
    """Returns a picture, of which the name and the SHA-256 are known, opened from one of these folders.

    `field` is the field of the request that it was for. Raises UsageError if no folder has it, or only
    another of its name.
    """
    called, again = CALLED.get(field, field), f"give it with --{field}, which may be another"
    paths = [path for folder in folders if named.name and (path := folder / named.name).is_file()]
    for path in paths:
        found = source_picture(path, field)
        if named.sha256 in (found.sha256, digest_of(found.own)):
            if named.border:
                return outpainted(found, named.border)[field]
            return found.as_mask() if named.alpha else found.detected_by(named.detector)
    if paths:
        raise UsageError(f"{paths[0]} is not the {called} that was drawn from: its SHA-256 differs", again)
    raise UsageError(f"the {called} {named.name or 'without a name'} that was drawn from is not here", again)


def upright(image: Image, called: str) -> Image:
    """Returns a picture in 8 bits of its own mode, turned upright as its EXIF says.

    Pillow itself would turn all above 255 of 16 bits, as depth maps have, into white. Raises UsageError for
    floating point, whose range nobody knows.
    """
    from PIL import Image as Images
    from PIL import ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UsageError(f"the {called} is in floating point, of a range that it does not tell", HINT)
    if not all(image.size):
        raise UsageError(f"the {called} has no pixels", HINT)
    if image.mode.startswith("I"):
        return Images.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    in_colours(image)  # now, where an error is told as the file's
    return image


def in_colours(image: Image) -> Image:
    """Returns a picture of 8 bits in RGB, or in RGBA if any of it may be transparent."""
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


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
