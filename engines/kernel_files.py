"""Where the kernels lie that a GPU compiles for a bundle's engines: in a folder beside the bundle."""

from __future__ import annotations

import contextlib
from pathlib import Path

# The folder beside a bundle, and the files in it.
KERNEL_FOLDER_SUFFIX, KERNEL_FILE_SUFFIX = ".cache", ".kernels"


def is_bundle(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def kernels_folder(bundle: Path) -> Path:
    """Beside a bundle, whose manifest lists all that lies in it: what GPUs compile when they first run it."""
    return bundle.with_name(f"{bundle.name}{KERNEL_FOLDER_SUFFIX}")


def kernel_files(bundle: Path) -> list[Path]:
    """Whole ones, and what a killed process left of one. Other files there are not ours."""
    return sorted(path for path in kernels_folder(bundle).glob(f"*{KERNEL_FILE_SUFFIX}*") if path.is_file())


def drop_kernels(bundle: Path) -> None:
    with contextlib.suppress(OSError):
        for path in kernel_files(bundle):
            path.unlink(missing_ok=True)
        kernels_folder(bundle).rmdir()  # unless something else lies in it
