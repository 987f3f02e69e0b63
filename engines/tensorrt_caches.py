"""What TensorRT finds out about a GPU once. Losing it costs time alone.

Kernels' timings, which serve any build, are in the user's store; an engine's own kernels beside its bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcm_compile.engines.kernel_files import KERNEL_FILE_SUFFIX, is_bundle, kernels_folder
from lcm_compile.system.cache import Digests, home
from lcm_compile.system.files import write_atomically


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


def kernels_path(trt: Any, engine: Path, gpu: str) -> Path | None:
    """The file for an engine's kernels on a GPU, or None where the engine is in no bundle."""
    bundle = engine.absolute().parent.parent
    if not is_bundle(bundle):
        return None
    name = f"{engine.stem}-{Digests().sha256(engine)[:16]}-{plain(gpu)}-{trt.__version__}{KERNEL_FILE_SUFFIX}"
    return kernels_folder(bundle) / name


class KernelCache:
    """The kernels that TensorRT for RTX compiles on the GPU when an engine is first used there.

    They are kept in a file behind their sha256, as what a damaged file does to the library is not told.
    Without a place to write they are compiled again each time.
    """

    def __init__(self, engine: Any, path: Path | None) -> None:
        self._path = path
        self.config = engine.create_runtime_config()
        self._cache = self.config.create_runtime_cache()
        self._kept = b"" if path is None else read_kernels(path)
        if self._kept:
            self._cache.deserialize(self._kept)  # refuses what is for another GPU, and stays empty
        self.config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Writes the cache, if it holds something else than what was read."""
        if self._path is None:
            return
        held = self._cache.serialize()
        kernels = b"" if held is None else bytes(memoryview(held))
        if kernels not in (b"", self._kept):
            with contextlib.suppress(OSError):
                write_atomically(self._path, hashlib.sha256(kernels).digest() + kernels)


def read_kernels(path: Path) -> bytes:
    """What keep() wrote, or nothing where that can't be read or is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    digest, kernels = content[:32], content[32:]
    return kernels if hashlib.sha256(kernels).digest() == digest else b""
