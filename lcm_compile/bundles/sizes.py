"""Further sizes of a bundle: for each, a complete bundle of its own in the folder `sizes` of the first one.

What does not depend on the size, such as the text encoders' engines, is stored once, by hard links.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lcm_compile.bundles.manifest import BundleManifest, read_manifest
from lcm_compile.engines.kernel_files import is_bundle
from lcm_compile.errors import UsageError

SIZES = "sizes"
# A folder of a size: height and width in pixels. Other folders there are being built, or hold kernels.
NAME = re.compile(r"[1-9]\d*x[1-9]\d*")


def size_folder(bundle: Path, height: int, width: int) -> Path:
    """Returns the folder of a size of a bundle, which may not exist."""
    return bundle / SIZES / f"{height}x{width}"


def further_sizes(bundle: Path) -> list[Path]:
    """Returns the folders of a bundle's further sizes, sorted by their names."""
    return sorted(
        folder for folder in (bundle / SIZES).glob("*") if NAME.fullmatch(folder.name) and is_bundle(folder)
    )


def first_of(folder: Path) -> Path:
    """Returns the bundle that a folder is a size of, or the folder itself."""
    main = folder.parent.parent
    return main if folder.parent.name == SIZES and NAME.fullmatch(folder.name) and is_bundle(main) else folder


def folder_of_size(bundle: Path, height: int | None, width: int | None) -> Path:
    """Returns the folder of a bundle, or of one of its sizes, that draws pictures of this size in pixels.

    None stands for the bundle's own height or width. Raises UsageError if it has no such size, and
    BundleError if a manifest can't be read.
    """
    manifest = read_manifest(bundle)[0]
    own = manifest.pipeline.shape
    height, width = height or own.height, width or own.width
    if (height, width) == (own.height, own.width):
        return bundle
    folder = size_folder(bundle, height, width)
    if is_bundle(folder):
        return folder
    raise UsageError(
        f"{bundle} draws no pictures of height {height} and width {width}, but of "
        f"{', '.join(sizes_of(bundle, manifest))}",
        f"lcm-compile build --into {shlex.quote(str(bundle))} --size {height}x{width}",
    )


def sizes_of(bundle: Path, manifest: BundleManifest) -> list[str]:
    """Returns the sizes that a bundle draws, as HEIGHTxWIDTH, its own first."""
    own = manifest.pipeline.shape
    return [f"{own.height}x{own.width}", *(folder.name for folder in further_sizes(bundle))]
