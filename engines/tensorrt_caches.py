"""TensorRT's caches of kernel timings and of compiled kernels. Losing them only costs time.

Kernel timings serve every build, and are in the user's store. Compiled kernels belong to one engine, and are
next to its bundle.
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
    """Returns a GPU's name in a form that can be part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in text)


def timings_path(trt: Any, gpu: str) -> Path:
    """Returns the file of kernel timings for a GPU and this version of TensorRT."""
    return home() / "timing-cache" / f"{plain(gpu)}-{trt.__version__}.bin"


@contextlib.contextmanager
def keeping_timings(config: Any, path: Path) -> Iterator[None]:
    """Gives a build the kernel timings in `path`, and adds to the file the timings that the build measures.

    File errors are ignored when the timings are written.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None:  # the file's content is no timing cache
        cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    yield
    if timings := content_of(cache):
        with contextlib.suppress(OSError):
            write_atomically(path, timings)


def content_of(cache: Any) -> bytes:
    """Returns the content of one of TensorRT's caches, or b"" if TensorRT can't give it."""
    held = cache.serialize()
    return b"" if held is None else bytes(memoryview(held))


def kernels_path(trt: Any, engine: Path, gpu: str) -> Path | None:
    """Returns the file of an engine's compiled kernels for a GPU, or None if the engine is in no bundle."""
    bundle = engine.absolute().parent.parent
    if not is_bundle(bundle):
        return None
    digest = Digests().sha256(engine)[:16]
    name = f"{engine.stem}-{digest}-{plain(gpu)}-{trt.__version__}{KERNEL_FILE_SUFFIX}"
    return kernels_folder(bundle) / name


class KernelCache:
    """The kernels that TensorRT for RTX compiles when an engine is first used on a GPU.

    The engine's execution context is created with a config that has the cache. In the file, the kernels'
    sha256 precedes the kernels, because NVIDIA does not document what TensorRT does with a damaged cache. If
    the file can't be written, the kernels are compiled again every time.
    """

    def __init__(self, config: Any, path: Path | None) -> None:
        """Gives a runtime config a cache, with the kernels in `path` if that is given and intact."""
        self._path = path
        self._cache = config.create_runtime_cache()
        self._kept = b"" if path is None else read_kernels(path)
        if self._kept:
            self._cache.deserialize(self._kept)  # refuses kernels for another GPU, and stays empty
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Writes the kernels to the file, if they are not the ones that it has already."""
        if self._path is None:
            return
        kernels = content_of(self._cache)
        if kernels not in (b"", self._kept):
            with contextlib.suppress(OSError):
                write_atomically(self._path, hashlib.sha256(kernels).digest() + kernels)
                self._kept = kernels


def read_kernels(path: Path) -> bytes:
    """Returns the kernels that keep() wrote, or b"" if the file can't be read or is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    digest, kernels = content[:32], content[32:]
    return kernels if hashlib.sha256(kernels).digest() == digest else b""
