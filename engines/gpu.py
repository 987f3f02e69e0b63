"""The GPU of this machine, as torch sees it."""

from __future__ import annotations

from pathlib import Path

from lcm_compile.targets import GpuTarget

DRIVER = Path("/sys/module/nvidia/version")
# The least driver for each CUDA version: the table in NVIDIA's CUDA toolkit release notes.
LEAST_DRIVERS = {12: 525, 13: 580}


def cannot_run_on_gpu(target: GpuTarget) -> str | None:
    """Why what was built for a GPU can't run on this machine, or None."""
    here = gpu_here()
    if here is None:
        return f"no NVIDIA GPU here ({why_no_gpu()})"
    name, capability = here
    if capability != target.compute_capability:
        return (
            f"the GPU here is {name} (compute capability {capability}), "
            f"{target.name} is {target.compute_capability}"
        )
    return None


def gpu_here() -> tuple[str, str] | None:
    """Name and compute capability of the first CUDA device, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return torch.cuda.get_device_name(0), f"{major}.{minor}"


def why_no_gpu() -> str:
    """Whether it is the driver, torch or the GPU that is missing."""
    import torch

    if not DRIVER.is_file():
        return "there is no NVIDIA driver"
    driver = f"the NVIDIA driver is {DRIVER.read_text().strip()}"
    if torch.version.cuda is None:
        return f"{driver}, but torch {torch.__version__} was built without CUDA"
    return f"{driver}, but torch {torch.__version__} for CUDA {torch.version.cuda} sees no device"


def driver_too_old(cuda: int) -> str | None:
    """Why the driver here can't run what was linked with that major version of CUDA, or None."""
    if not DRIVER.is_file():
        return None
    driver, least = DRIVER.read_text().strip(), LEAST_DRIVERS[cuda]
    if int(driver.partition(".")[0]) >= least:
        return None
    return f"the NVIDIA driver here is {driver}, and CUDA {cuda} needs {least} or newer"
