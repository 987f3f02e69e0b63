"""Takes an engine from a bundle that has the same: those of text encoders and VAEs often are, of one base."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lcm_compile.bundles.hard_links import link_or_copy
from lcm_compile.bundles.manifest import BundleManifest, read_manifest
from lcm_compile.bundles.sizes import further_sizes
from lcm_compile.bundles.store import recent
from lcm_compile.errors import BundleError
from lcm_compile.system.cache import Digests


def find_engine(made_of: str) -> Path | None:
    """Returns a bundle used here that has an engine made of this, or None.

    `made_of` is the digest that StageFile.made_of has. The engine's files still have the digests of the
    bundle's manifest.
    """
    digests = Digests()
    for first in recent():
        for folder in (first, *further_sizes(first)):
            with contextlib.suppress(BundleError, OSError):
                manifest, _ = read_manifest(folder)
                for stage in manifest.stages:
                    if stage.made_of == made_of and all(
                        digests.sha256(folder / file) == manifest.files[file]
                        for file in engine_files(manifest, stage.contract.name)
                    ):
                        digests.save()
                        return folder
    return None


def take_engine(bundle: Path, name: str, folder: Path) -> Path:
    """Makes hard links in the folder of a new bundle to the files of another's engine, and returns its path.

    Raises OSError if a file is gone, or if one that all stages share is there already and is another. Then
    nothing is taken: a build that wrote over a link would write into the other bundle.
    """
    manifest, _ = read_manifest(bundle)
    digests, taken = Digests(), list[Path]()
    try:
        for file in engine_files(manifest, name):
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                taken.append(path)
                link_or_copy(str(bundle / file), str(path))
            elif digests.sha256(path) != manifest.files[file]:
                raise FileExistsError(path)
    except OSError:
        for path in taken:
            path.unlink(missing_ok=True)
        raise
    return folder / next(stage.file for stage in manifest.stages if stage.contract.name == name)


def engine_files(manifest: BundleManifest, name: str) -> list[str]:
    """Returns the paths of the files of a stage's engine in the bundle, with those that all stages share."""
    others = [stage.contract.name for stage in manifest.stages if stage.contract.name != name]
    return [
        file
        for file in manifest.files
        if (path := Path(file)).parts[0] == "engines"
        and not any(path.name.startswith(f"{other}.") for other in others)
    ]
