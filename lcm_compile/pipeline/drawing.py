"""The result of a request: its pictures, which are checked for NaN, and the time that each stage took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import BackendError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Drawing:
    """The result of a request: 8-bit pictures (n, height, width, 3), and milliseconds by stage.

    `ms` has a number for each stage, a list for "step", the host's "total", and "load", the time that loading
    took. `cut` is the end of the prompt that did not fit. `cuda_graph` is "used" if the stages were launched
    as CUDA graphs on a GPU, or says why they were not.
    """

    pictures: np.ndarray
    ms: dict[str, Any]
    cut: str
    cuda_graph: str

    def images(self) -> list[Image]:
        """Returns the pictures as PIL images."""
        from PIL import Image

        return [Image.fromarray(picture) for picture in self.pictures]


class Clock:
    """Measures the stages on the engines' own device, because the host does not wait for a GPU."""

    def __init__(self, runner: Runner, stages: Sequence[str]) -> None:
        self._runner = runner
        self._stages = stages
        self._marks = [("", runner.mark())]
        self._start = self._end = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Assigns the device's time since the last lap to this stage, or to none if it is ""."""
        self._marks.append((stage, self._runner.mark()))
        self._end = time.perf_counter()

    def ms(self) -> dict[str, Any]:
        """Waits for the device; returns milliseconds by stage, a list for "step", and the host's "total"."""
        passed: dict[str, list[float]] = {name: [] for name in (*self._stages, "")}
        for (_, start), (stage, end) in pairwise(self._marks):
            passed[stage].append(self._runner.between(start, end))
        stages = {name: passed[name] if name == "step" else sum(passed[name]) for name in self._stages}
        return {**stages, "total": (self._end - self._start) * 1000}


def batches_of(count: int, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the indices (batch,) of the pictures of each call of the engines, and how many of them count.

    The last index is repeated if fewer than `batch` pictures are left.
    """
    for first in range(0, count, batch):
        yield np.minimum(np.arange(first, first + batch), count - 1), min(batch, count - first)


class Pictures:
    """Collects the pictures of a request. They are checked at the end, so that drawing does not wait."""

    def __init__(self) -> None:
        self._pictures: list[np.ndarray] = []
        self._floats: list[np.ndarray] = []

    def add(self, pictures: np.ndarray) -> None:
        """Copies pictures (n, height, width, 3) as 8 bits, because an engine may reuse its memory."""
        self._pictures.append(np.array(eight_bits(pictures)))

    def watch(self, *arrays: Array) -> None:
        """Keeps a copy of host arrays, to check them for NaN; it skips 8-bit arrays, which can't hold NaN."""
        self._floats += [np.array(array) for array in arrays if array.dtype != np.uint8]

    def checked(self) -> np.ndarray:
        """Returns all pictures (n, height, width, 3). Raises BackendError if the engines returned NaN.

        In 8 bits, which can't hold NaN, a picture of NaN has one colour.
        """
        pictures = np.concatenate(self._pictures)
        finite = all(np.isfinite(array).all() for array in self._floats)
        if not finite or any(is_of_one_colour(picture) for picture in pictures):
            raise BackendError(
                "the engines drew NaN: they overflow their precision on this machine",
                "lcm-compile verify BUNDLE; then build with --precision fp32 or bf16",
            )
        return pictures


def is_of_one_colour(picture: np.ndarray) -> bool:
    """Returns whether all pixels of a picture (height, width, channels) are equal.

    A few pixels are compared first: for a million of them NumPy takes a tenth of the time in which a fast GPU
    draws the picture.
    """
    return all((pixels == picture[0, 0]).all() for pixels in (picture[::16, ::16], picture))


def eight_bits(pictures: np.ndarray) -> np.ndarray:
    """Returns float pictures of 0 to 1 as 8 bits, and 8-bit pictures unchanged."""
    return pictures if pictures.dtype == np.uint8 else (pictures * 255).round().astype(np.uint8)
