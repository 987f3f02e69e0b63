"""Pictures that clients send."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Sequence

from PIL import Image, ImageChops

from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.pipeline.control_picture import control_pictures
from lcm_compile.pipeline.source_picture import SourcePicture

# What is opened: formats without scripts, links or other files in them.
ALLOWED = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Pillow's modes of what these formats hold. Those with colours that were multiplied by alpha convert to few.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B", "I;16L", "F")
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def image_of(data: bytes, called: str, most_pixels: int) -> Image.Image:
    """Returns the picture in a file's bytes. Raises UsageError if it is none, or has too many pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=ALLOWED)
            if image.width * image.height > most_pixels:
                raise UsageError(
                    f"the {called} has {image.width * image.height} pixels, and may have {most_pixels}"
                )
            image.load()
            if image.mode in PREMULTIPLIED:
                image = image.convert(PREMULTIPLIED[image.mode])
            elif image.mode not in MODES:
                image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"the {called} can't be read as a picture ({type(error).__name__})", "send a PNG, JPEG or WebP"
        ) from error
    return image


def image_of_base64(text: str, called: str, most_pixels: int) -> Image.Image:
    """Returns the picture of a base64 text or a data: URL. Raises UsageError; no other URL is opened."""
    head, comma, tail = text.partition(",")
    if "://" in text[:16] or (comma and not head.startswith("data:")):
        raise UsageError(f"the {called} must be the picture itself in base64; no URL is opened here")
    try:
        data = base64.b64decode(tail if comma else text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"the {called} is not base64: {error}") from error
    return image_of(data, called, most_pixels)


def guiding(
    pictures: Sequence[Image.Image], detectors: str | Sequence[str] | None
) -> tuple[SourcePicture, ...]:
    """Returns pictures for ControlNets and T2I-Adapters, as detectors make them: see `control_pictures`.

    Raises UsageError also for a detector that can't run here.
    """
    try:
        return control_pictures([*pictures], detectors)
    except UsageError:
        raise
    except LcmCompileError as error:  # no OpenCV
        raise UsageError(error.message, error.hint) from error


def mask_of_alpha(mask: Image.Image) -> Image.Image:
    """Returns what OpenAI's clients send as a mask as one that is white where the picture is repainted.

    That is where its alpha is 0. A mask without transparency is one already, as other servers take it.
    """
    if not mask.has_transparency_data:
        return mask
    return ImageChops.invert(mask.convert("RGBA").getchannel("A"))
