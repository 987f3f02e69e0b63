"""Pictures as the bytes of a file."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from lcm_compile.output.picture_settings import Origin, parameters, save_options, settings_of

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
# zlib's level: 6, the default, takes four times as long as 1 for files a tenth smaller.
PNG_LEVEL = 1
QUALITY = 95  # of JPEG and WebP, by default


def encoded(pixels: np.ndarray, form: str, origin: Origin | None = None, quality: int | None = None) -> bytes:
    """Returns a picture (height, width, 3) as a `png`, `jpeg` or `webp`.

    It holds its settings, if an `origin` tells them, as the files that `lcm-compile run` saves.
    """
    image = Image.fromarray(pixels)
    options = {}
    if origin is not None:
        try:
            options = save_options(FORMATS[form], settings_of(origin), parameters(origin, *image.size))
        except ValueError:  # too long for a JPEG
            options = {}
    if form == "png":
        options["compress_level"] = PNG_LEVEL
    else:
        options["quality"] = QUALITY if quality is None else quality
    file = io.BytesIO()
    image.save(file, FORMATS[form], **options)
    return file.getvalue()
