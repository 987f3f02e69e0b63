"""What TensorRT finds out about a GPU once, kept in the user's store. Losing it costs time alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcm_compile.store import Digests, home, write_atomically


def plain(text: str) -> str:
    """A name of a GPU as a part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in text)


def timings_path(trt: Any, gpu: str) -> Path:
    return home() / "timing-cache" / f"{plain(gpu)}-{trt.__version__}.bin"


@contextlib.contextmanager
def keeping_timings(config: Any, path: Path) -> Iterator[None]:
    """Builds with the kernels' times in `path`, and adds those that are measured meanwhile."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None:  # what is kept there can't be read
        cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    yield
    with contextlib.suppress(OSError):
        write_atomically(path, bytes(memoryview(cache.serialize())))


def kernels_path(trt: Any, engine: Path, gpu: str) -> Path:
    digests = Digests()
    name = f"{digests.sha256(engine)}-{plain(gpu)}-{trt.__version__}.bin"
    return home() / "runtime-cache" / name


class KernelCache:
    """The kernels that TensorRT for RTX compiles on the GPU when an engine is first used there."""

    def __init__(self, engine: Any, path: Path) -> None:
        self._path = path
        self.config = engine.create_runtime_config()
        self._cache = self.config.create_runtime_cache()
        if path.is_file():
            self._cache.deserialize(path.read_bytes())  # refuses what does not fit, and stays empty
        self.config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Writes the cache, if it holds more or less than what is kept."""
        kernels = bytes(memoryview(self._cache.serialize()))
        with contextlib.suppress(OSError):
            if not self._path.is_file() or self._path.stat().st_size != len(kernels):
                write_atomically(self._path, kernels)
