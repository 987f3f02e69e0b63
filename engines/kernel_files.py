"""The files of kernels that GPUs compile for a bundle's engines, in a folder next to the bundle."""

from __future__ import annotations

import contextlib
from pathlib import Path

KERNEL_FOLDER_SUFFIX = ".cache"
KERNEL_FILE_SUFFIX = ".kernels"


def is_bundle(folder: Path) -> bool:
    """Returns whether the folder holds a bundle's manifest."""
    return (folder / "manifest.json").is_file()


def kernels_folder(bundle: Path) -> Path:
    """Returns the folder for the kernels that GPUs compile when they first run a bundle's engines.

    It is next to the bundle, because the manifest lists every file inside the bundle.
    """
    return bundle.with_name(f"{bundle.name}{KERNEL_FOLDER_SUFFIX}")


def kernel_files(bundle: Path) -> list[Path]:
    """Lists a bundle's kernel files, with the incomplete ones that a killed process left.

    Other files in that folder are not listed: they are not ours.
    """
    return sorted(path for path in kernels_folder(bundle).glob(f"*{KERNEL_FILE_SUFFIX}*") if path.is_file())


def drop_kernels(bundle: Path) -> None:
    """Deletes a bundle's kernel files, and their folder if it is then empty. File errors are ignored."""
    with contextlib.suppress(OSError):
        for path in kernel_files(bundle):
            path.unlink(missing_ok=True)
        kernels_folder(bundle).rmdir()  # fails if other files are in it
