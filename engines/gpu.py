"""The GPU of this machine, as torch sees it."""

from __future__ import annotations

import ctypes
from pathlib import Path

from lcm_compile.targets import GpuTarget

DRIVER = Path("/sys/module/nvidia/version")  # the version of the kernel module
LIBRARY = "libcuda.so.1"
# The oldest driver for each major CUDA version, from the table in NVIDIA's CUDA toolkit release notes.
LEAST_DRIVERS = {12: 525, 13: 580}


class OldDriver(str):
    """A reason that a driver update resolves. `update` is the hint that tells the user to do so."""

    update: str


def cannot_run_on_gpu(target: GpuTarget, cuda: int | None = None) -> str | None:
    """Returns why engines for a GPU can't run here, or None.

    `cuda` is the major version of CUDA that the engines' library is linked with, if it is known.
    """
    here = gpu_here()
    if here is None:
        # Torch sees no GPU if the driver is too old.
        return old_driver(cuda) or old_driver(torch_cuda()) or f"no NVIDIA GPU here ({why_no_gpu()})"
    name, capability = here
    if capability not in target.capabilities:
        return (
            f"the GPU here is {name} (compute capability {capability}), "
            f"{target.name} is {', '.join(target.capabilities)}"
        )
    return old_driver(cuda)


def gpu_here() -> tuple[str, str] | None:
    """Returns the name and the compute capability of the first CUDA device, or None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return torch.cuda.get_device_name(0), f"{major}.{minor}"


def gpu_memory() -> int:
    """Returns the memory of the first CUDA device in bytes, or 0 without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def why_no_gpu() -> str:
    """Returns what is missing where torch sees no GPU: the driver, torch's CUDA support or the device."""
    import torch

    if not DRIVER.is_file():
        return "there is no NVIDIA driver"
    driver = f"the NVIDIA driver is {DRIVER.read_text().strip()}"
    if torch.version.cuda is None:
        return f"{driver}, but torch {torch.__version__} was built without CUDA"
    return f"{driver}, but torch {torch.__version__} for CUDA {torch.version.cuda} sees no device"


def torch_cuda() -> int | None:
    """Returns the major version of CUDA that torch was built with, or None for a CPU build."""
    import torch

    return None if torch.version.cuda is None else int(torch.version.cuda.partition(".")[0])


def driver_cuda() -> int | None:
    """Returns the newest major version of CUDA that this machine's driver supports, or None without a driver.

    The version is read from the driver's library, not from the kernel module: a cuda-compat package may have
    installed a newer library, and containers hide the module's version. cuDriverGetVersion returns
    1000 × major + 10 × minor.
    """
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value // 1000


def old_driver(cuda: int | None) -> OldDriver | None:
    """Returns why the driver here is too old for that major version of CUDA, or None."""
    here = driver_cuda()
    if cuda is None or here is None or here >= cuda:
        return None
    least = f"{LEAST_DRIVERS[cuda]} or newer" if cuda in LEAST_DRIVERS else f"one for CUDA {cuda}"
    driver = DRIVER.read_text().strip() if DRIVER.is_file() else f"one for CUDA {here}"
    reason = OldDriver(f"the NVIDIA driver here is {driver}, and CUDA {cuda} needs {least}")
    reason.update = f"update the NVIDIA driver to {least} (nvidia.com/drivers), then run this command again"
    return reason
