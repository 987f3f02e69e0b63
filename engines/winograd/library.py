"""Compiles the kernels to a shared library, which OpenVINO loads as an extension. A bundle contains it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np

from lcm_compile.errors import BackendError
from lcm_compile.system.cache import home, lock
from lcm_compile.system.processor import instruction_set
from lcm_compile.system.versions import installed_version

SOURCES = ("kernel.hpp", "kernel.cpp", "weights.cpp", "openvino_extension.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
# The functions that kernel.cpp is compiled to, one for each instruction set, with the compiler's options.
KERNELS = {
    "winograd_avx2": ("-mavx2", "-mfma"),
    "winograd_avx512": AVX512,
    "winograd_avx512_bf16": (*AVX512, "-mavx512bf16"),
}
# What every processor needs that runs a kernel; the kernel for it is chosen when it is called.
LEAST = {"avx2", "fma"}


def cannot_compile() -> str | None:
    """Returns why the kernels can't be compiled or run on this machine, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the kernels are for Linux on x86-64"
    if reason := cannot_run():
        return reason
    if shutil.which(compiler()) is None:
        return f"it needs a C++ compiler, and {compiler()} is not installed; apt install g++, or set CXX"
    if not (openvino_folder() / "include" / "openvino").is_dir():
        return "this installation of openvino has no C++ headers; the wheel from PyPI has them"
    return None


def cannot_run() -> str | None:
    """Returns why this processor can't run the kernels, or None."""
    lacking = sorted(LEAST - set(instruction_set()))
    return f"this processor has no {' and no '.join(lacking)}" if lacking else None


def compiler() -> str:
    """Returns the C++ compiler's command: CXX, or g++."""
    return os.environ.get("CXX", "g++")


def openvino_folder() -> Path:
    """Returns the folder of the installed package openvino, without importing it."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        raise BackendError("openvino is not installed", "pip install 'lcm-compile[openvino]'")
    return Path(spec.submodule_search_locations[0])


def digest() -> str:
    """Returns 16 hex digits of the sources, the compiler's options and OpenVINO, which is linked with."""
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in SOURCES)
    settings = repr((FLAGS, KERNELS, installed_version(("openvino",)), compiler()))
    return hashlib.sha256(sources + settings.encode()).hexdigest()[:16]


def library() -> Path:
    """Returns the compiled library, which the cache folder keeps.

    Raises BackendError if it can't be compiled.
    """
    path = home() / "winograd" / f"{digest()}.so"
    if not path.is_file():
        with lock(path.with_suffix(".lock")):
            if not path.is_file():
                compile_library(path)
    return path


def compile_library(path: Path) -> None:
    """Compiles the library, in a few seconds. Raises BackendError if the compiler reports an error."""
    folder, openvino = Path(__file__).parent, openvino_folder()
    part = path.with_suffix(f".{os.getpid()}")
    part.mkdir(parents=True)
    try:
        objects = []
        for name, options in KERNELS.items():
            objects.append(str(part / f"{name}.o"))
            source = str(folder / "kernel.cpp")
            call_compiler(*FLAGS, *options, f"-DWINOGRAD_FUNCTION={name}", "-c", source, "-o", objects[-1])
        libraries = [
            f"-l:{next(iter(sorted((openvino / 'libs').glob(pattern)))).name}"
            for pattern in ("libopenvino.so*", "libtbb.so*")
        ]
        linked = part / "winograd.so"
        call_compiler(
            *FLAGS, "-shared", f"-I{openvino / 'include'}",
            str(folder / "weights.cpp"), str(folder / "openvino_extension.cpp"), *objects,
            f"-L{openvino / 'libs'}", *libraries, "-s", "-o", str(linked),
        )  # fmt: skip
        linked.rename(path)
    finally:
        shutil.rmtree(part)


def call_compiler(*options: str) -> None:
    """Runs the C++ compiler. Raises BackendError with the first line of its errors if it fails."""
    done = subprocess.run([compiler(), *options], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BackendError(
            f"{compiler()} can't compile the Winograd kernels: {errors[0] if errors else done.returncode}",
            "another compiler by CXX, or --without winograd",
        )


def digest_of(path: Path) -> str:
    """Returns the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def packer(path: Path) -> ctypes._NamedFuncPointer:
    """Returns the library's function winograd_pack. OpenVINO must be imported: the library needs it."""
    function = ctypes.CDLL(str(path)).winograd_pack
    function.restype = None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, number, number, number, ctypes.c_int, pointer]
    return function


def packed(kernels: Path, weights: np.ndarray, tile: int, bf16: bool) -> np.ndarray:
    """Returns weights, transformed and packed for the kernels of a library, as 32-bit words.

    They are (outputs, inputs, 3, 3), or for tile 3 (4·outputs, inputs, 2, 2): see weights.cpp. In bf16 a word
    has two values, and the number of inputs must be even.
    """
    outputs, inputs = weights.shape[:2]
    weights = np.ascontiguousarray(weights, np.float32)
    words = np.empty((tile + 2) ** 2 * outputs * inputs // (2 if bf16 else 1), np.int32)
    packer(kernels)(weights.ctypes.data, outputs, inputs, tile, bf16, words.ctypes.data)
    return words
