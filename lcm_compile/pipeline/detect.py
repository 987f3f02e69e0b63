"""What makes the picture that a ControlNet reads out of a photo."""

from __future__ import annotations

import importlib.util
import re

import numpy as np

from lcm_compile.errors import LcmCompileError, UsageError, unknown_name

CANNY = "canny"
NONE = "none"  # for a picture that is read as it is
THRESHOLDS = (100, 200)  # those of diffusers' documentation


def check_detector(detector: str) -> None:
    """Raises UsageError for a detector that is not known, and LcmCompileError if it can't run here."""
    thresholds_of(detector)
    if importlib.util.find_spec("cv2") is None:
        raise LcmCompileError(
            "the detector canny is OpenCV's, which is not installed", "pip install 'lcm-compile[detect]'"
        )


def thresholds_of(detector: str) -> tuple[int, int]:
    """Returns the two thresholds of `canny` or `canny:LOW,HIGH`. Raises UsageError for all else."""
    name, colon, numbers = detector.partition(":")
    if name != CANNY:
        raise unknown_name("control detector", name, (CANNY, NONE))
    if not colon:
        return THRESHOLDS
    found = re.fullmatch(r"\s*(\d{1,5})\s*,\s*(\d{1,5})\s*", numbers)
    if found is None:
        raise UsageError(f"{detector!r} is not canny:LOW,HIGH", "for example canny:100,200")
    return int(found[1]), int(found[2])


def detected(pixels: np.ndarray, detector: str) -> np.ndarray:
    """Returns what a detector finds in pixels (h, w, 3) of 8 bits, white on black and of that shape."""
    import cv2

    edges = cv2.Canny(np.ascontiguousarray(pixels), *thresholds_of(detector))
    return np.repeat(edges[..., None], 3, axis=2)
