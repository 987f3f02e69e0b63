"""The result of requests: their pictures, which are checked for NaN, and the time that each stage took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.engines.runner import Runner
from lcm_compile.errors import BackendError
from lcm_compile.pipeline.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

# Called with the pictures (n, height, width, 3) of each batch, in 8 bits.
Show = Callable[[np.ndarray], None]
# What shows the pictures that are foreseen after so many steps, the first of which is 1.
Previews = Mapping[int, Show]
NO_PREVIEWS: Previews = MappingProxyType({})


def show_nothing(pictures: np.ndarray) -> None:
    """Is the Show that does nothing."""


@dataclass
class Drawing:
    """The result of requests: 8-bit pictures (n, height, width, 3), and milliseconds by stage.

    `ms` has a number for each stage, a list for "step", the host's "total", and "load", the time that loading
    took. `cut` is the longest end of a prompt that did not fit. `cuda_graph` is "used" if the stages were
    launched as CUDA graphs on a GPU, or says why they were not. `latents` (n, c, h, w) are what the pictures
    are decoded from, or None where one graph draws everything.
    """

    pictures: np.ndarray
    ms: dict[str, Any]
    cut: str
    cuda_graph: str
    latents: np.ndarray | None = None

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

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves the time that the block takes out of the host's "total"."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def ms(self) -> dict[str, Any]:
        """Waits for the device; returns milliseconds by stage, a list for "step", and the host's "total"."""
        passed: dict[str, list[float]] = {name: [] for name in (*self._stages, "")}
        for (_, start), (stage, end) in pairwise(self._marks):
            passed[stage].append(self._runner.between(start, end))
        stages = {name: passed[name] if name == "step" else sum(passed[name]) for name in self._stages}
        return {**stages, "total": (self._end - self._start) * 1000}


def batches_of(pictures: Sequence[Request], batch: int) -> Iterator[tuple[Sequence[Request], slice]]:
    """Yields the `batch` pictures of each call of the engines, and which of them are kept.

    If fewer are left, the last is repeated. A picture alone has the place that it has among all of its seed,
    because an engine may compute its places with other orders of sums.
    """
    before = (pictures[0].index or 0) % batch if len(pictures) == 1 else 0
    for first in range(0, len(pictures), batch):
        some = pictures[first : first + batch]
        rows = [*[some[0]] * before, *some]
        rows += [rows[-1]] * (batch - len(rows))
        yield rows, slice(before, before + len(some))


class Pictures:
    """Collects the pictures of a drawing, and shows each batch as soon as it is drawn."""

    def __init__(self, clock: Clock, show: Show) -> None:
        self._clock = clock
        self._show = show
        self._pictures: list[np.ndarray] = []
        self._latents: list[np.ndarray] = []

    def keep(self, latents: np.ndarray, kept: slice) -> None:
        """Keeps the kept ones of latents (b, c, h, w). Raises BackendError if they hold NaN."""
        check_finite(latents)
        self._latents.append(np.array(latents[kept]))

    def add(self, pictures: np.ndarray, kept: slice) -> None:
        """Adds the kept ones of pictures (b, height, width, 3), as 8 bits, which can't hold NaN.

        Raises BackendError if floats do.
        """
        check_finite(pictures)
        new = np.array(eight_bits(pictures[kept]))  # copied, because an engine may reuse its memory
        self._pictures.append(new)
        with self._clock.stopped():
            self._show(new)

    def all(self) -> np.ndarray:
        """Returns all pictures (n, height, width, 3), which may be none."""
        return np.concatenate(self._pictures) if self._pictures else np.zeros((0, 0, 0, 3), np.uint8)

    def latents(self) -> np.ndarray | None:
        """Returns the latents of all pictures (n, c, h, w), if they were kept."""
        return np.concatenate(self._latents) if self._latents else None


def check_finite(array: np.ndarray) -> None:
    """Raises BackendError if what engines drew holds NaN or infinity."""
    if array.dtype != np.uint8 and not np.isfinite(array).all():
        raise BackendError(
            "the engines drew NaN: they overflow their precision on this machine",
            "lcm-compile verify BUNDLE; then build with --precision fp32 or bf16",
        )


def is_of_one_colour(picture: np.ndarray) -> bool:
    """Returns whether all pixels of a picture (height, width, channels) are equal.

    A few pixels are compared first: for a million of them NumPy takes a tenth of the time in which a fast GPU
    draws the picture.
    """
    return all((pixels == picture[0, 0]).all() for pixels in (picture[::16, ::16], picture))


def warning_of_one_colour(pictures: np.ndarray) -> str | None:
    """Returns a warning if one of the pictures (n, height, width, 3) has one colour, or else None.

    In 8 bits NaN of a decoder is of one colour too.
    """
    if not any(map(is_of_one_colour, pictures)):
        return None
    return (
        "a picture is of one colour; if none was asked for, the engines overflow their precision on this "
        "machine, which lcm-compile verify BUNDLE shows"
    )


def eight_bits(pictures: np.ndarray) -> np.ndarray:
    """Returns float pictures of 0 to 1 as 8 bits, and 8-bit pictures unchanged."""
    return pictures if pictures.dtype == np.uint8 else (pictures * 255).round().astype(np.uint8)
