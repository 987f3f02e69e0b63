"""What torch's compiler needs for a GPU besides Triton: CUDA's headers, and libcuda for the linker.

Torch takes the folder above that of `nvcc` for the toolkit, and links with `-lcuda`, which it finds in a
toolkit's folder of stubs only. Neither need be there: `nvcc` may be a script elsewhere, pip's packages have
no stubs, and a driver comes with `libcuda.so.1` but often without `libcuda.so`. Both would show only after
minutes of compiling. So the headers are tried here first, with the compiler itself, and a stub is made.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from lcm_compile.engines.gpu import torch_cuda

# What the C++ code that torch generates includes. They include others in turn, which pip has in packages of
# their own.
HEADERS = ("cuda.h", "cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "cuda_fp8.h")
PIP_PACKAGES = ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")
USUAL_PLACES = ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda", "/usr/lib/cuda")
# A library by which a linker notes that libcuda.so.1 is needed, because it defines one of its functions. The
# others are found when an engine is loaded.
STUB = 'extern "C" int cuLaunchKernel() { return 1; }'


def missing_toolkit() -> str | None:
    """Returns what torch's compiler lacks here of CUDA, or None. It runs the C++ compiler."""
    toolkit = find_toolkit()
    if toolkit is None:
        return (
            f"torch's compiler needs CUDA's headers ({', '.join(HEADERS)} and what they include), and no "
            f"usual place has all of them; {pip_install()}, or set CUDA_HOME to a CUDA toolkit"
        )
    return None


def pip_install() -> str:
    """Returns the command that installs the headers, of the version of CUDA that torch was built with."""
    import torch

    version = torch.version.cuda
    suffix = "" if torch_cuda() is None or not version else f"=={version}.*"
    return "pip install " + " ".join(f"'{name}{suffix}'" for name in PIP_PACKAGES)


def find_toolkit() -> Path | None:
    """Returns the first of the toolkits here whose headers compile, or None."""
    return next((toolkit for toolkit in toolkits() if headers_compile(toolkit)), None)


def toolkits() -> Iterator[Path]:
    """Yields folders that may be CUDA toolkits, best first, and some of them more than once.

    What the user names comes first. The headers of pip's packages are of the version that torch was built
    with, which those elsewhere need not be.
    """
    yield from (Path(named) for name in ("CUDA_HOME", "CUDA_PATH") if (named := os.environ.get(name)))
    if spec := importlib.util.find_spec("nvidia"):
        yield from (Path(place, f"cu{torch_cuda()}") for place in spec.submodule_search_locations or ())
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parents[1]
    for pattern in USUAL_PLACES:
        place = Path(pattern)
        yield from sorted(place.parent.glob(place.name), reverse=True)


def headers_compile(toolkit: Path) -> bool:
    """Returns whether the C++ compiler can read CUDA's headers in a toolkit, and all that they include."""
    include = toolkit / "include"
    if not all((include / name).is_file() for name in HEADERS):
        return False
    source = "".join(f"#include <{name}>\n" for name in HEADERS)
    return compiler_accepts(["-fsyntax-only", "-I", str(include)], source)


def compiler_accepts(arguments: Sequence[str], source: str) -> bool:
    """Returns whether the C++ compiler that torch uses succeeds."""
    command = [os.environ.get("CXX", "g++"), "-x", "c++", "-", *arguments]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


@contextlib.contextmanager
def toolkit_for_torch(scratch: Path) -> Iterator[None]:
    """Lets torch's compiler find the toolkit and libcuda during a block. missing_toolkit has returned None.

    `scratch` is an empty folder, which must last until the block ends.
    """
    toolkit = find_toolkit()
    assert toolkit is not None, "missing_toolkit was not called"
    stub = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", f"{scratch}/libcuda.so"]
    made = compiler_accepts(stub, STUB)
    assert made, "the compiler has read the headers"
    libraries = os.pathsep.join(filter(None, (str(scratch), os.environ.get("LIBRARY_PATH"))))
    own = {"CUDA_HOME": str(toolkit), "LIBRARY_PATH": libraries}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    from torch.utils import cpp_extension  # reads the variable at its first import, and never again

    home, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, str(toolkit)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = home
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
