"""What torch's compiler needs for a GPU besides Triton: CUDA's headers, and libcuda for the linker.

Torch takes the folder above that of `nvcc` for the toolkit, and links with `-lcuda`, which it finds in a
toolkit's folder of stubs only. Neither need be there: `nvcc` may be a script elsewhere, pip's packages have
no stubs, and a driver comes with `libcuda.so.1` but often without `libcuda.so`. Both would show only after
minutes of compiling. So both are tried here first, with the compiler itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lcm_compile.engines.gpu import driver_library, torch_cuda

# What the C++ code that torch generates includes. They include others in turn, which pip has in packages of
# their own.
HEADERS = ("cuda.h", "cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "cuda_fp8.h")
PIP_PACKAGES = ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")
USUAL_PLACES = ("/usr/local/cuda", "/usr/local/cuda-*", "/opt/cuda", "/usr/lib/cuda")
# The folders of a toolkit in which a libcuda may be that linkers can read and nothing can run.
STUBS = ("lib64/stubs", "lib/stubs", "targets/x86_64-linux/lib/stubs", "targets/sbsa-linux/lib/stubs")


def missing_toolkit() -> str | None:
    """Returns what torch's compiler lacks here of CUDA, or None. It runs the C++ compiler."""
    toolkit = find_toolkit()
    if toolkit is None:
        return (
            f"torch's compiler needs CUDA's headers ({', '.join(HEADERS)} and what they include), and no "
            f"usual place has all of them; {pip_install()}, or set CUDA_HOME to a CUDA toolkit"
        )
    with tempfile.TemporaryDirectory() as scratch:
        if library_folder(toolkit, Path(scratch)) is None:
            return (
                "the linker finds no libcuda.so, and the driver's libcuda.so.1 can't be loaded; set "
                "LIBRARY_PATH to the folder that has one, such as a CUDA toolkit's lib64/stubs"
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


def library_folder(toolkit: Path, scratch: Path) -> Path | None:
    """Returns the folder in which the linker finds libcuda, or None if there is none.

    If the linker needs no such folder, that is `scratch`, which is empty then. If it finds none but the
    driver's own library, `scratch` has a link to that one under the name that linkers look for.
    """
    stubs = [folder for name in STUBS if (folder := toolkit / name).is_dir()]
    for folder in (scratch, *stubs):
        if links_with_cuda(folder):
            return folder
    if driver := driver_library():
        (scratch / "libcuda.so").symlink_to(driver)
        if links_with_cuda(scratch):
            return scratch
    return None


def links_with_cuda(folder: Path) -> bool:
    """Returns whether `-lcuda` can be linked with, if the linker looks into this folder too."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["-shared", "-o", f"{scratch}/tried.so", "-lcuda"]
        return compiler_accepts(arguments, "", library_path(folder))


def compiler_accepts(arguments: Sequence[str], source: str, libraries: str | None = None) -> bool:
    """Returns whether the C++ compiler that torch uses succeeds. `libraries` is its LIBRARY_PATH."""
    command = [os.environ.get("CXX", "g++"), "-x", "c++", "-", "-x", "none", *arguments]
    environment = os.environ if libraries is None else {**os.environ, "LIBRARY_PATH": libraries}
    done = subprocess.run(command, input=source, env=environment, text=True, capture_output=True)
    return done.returncode == 0


def library_path(folder: Path) -> str:
    """Returns the variable LIBRARY_PATH, with a folder before those that it names already."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("LIBRARY_PATH"))))


@contextlib.contextmanager
def toolkit_for_torch(scratch: Path) -> Iterator[None]:
    """Lets torch's compiler find the toolkit and libcuda during a block. missing_toolkit has returned None.

    `scratch` is an empty folder, which must last until the block ends.
    """
    toolkit = find_toolkit()
    assert toolkit is not None, "missing_toolkit was not called"
    folder = library_folder(toolkit, scratch)
    assert folder is not None, "missing_toolkit was not called"
    own = {"CUDA_HOME": str(toolkit), "LIBRARY_PATH": library_path(folder)}
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
