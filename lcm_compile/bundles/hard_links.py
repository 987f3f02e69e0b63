"""Stores a file that several bundles of the store hold only once, by hard links between equal files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lcm_compile.bundles.manifest import MANIFEST
from lcm_compile.system.cache import Digests


def share(folder: Path, others: Iterable[Path]) -> None:
    """Replaces the files of the bundle in `folder` with hard links to equal files of other bundles.

    A file of these is used only if its content still has the digest in its manifest. A new link changes the
    file's ctime, so its stored digest is computed again once. If no link can be made, both files stay.
    """
    stored: dict[str, list[Path]] = {}
    for other in others:
        for name, digest in listed_files(other).items():
            stored.setdefault(digest, []).append(other / name)
    digests = Digests()
    for name, digest in listed_files(folder).items():
        for path in stored.get(digest, ()):
            with contextlib.suppress(OSError):
                if not path.is_symlink() and digests.sha256(path) == digest:
                    link(path, folder / name)
                    break


def listed_files(folder: Path) -> dict[str, str]:
    """Returns the sha256 of each file by its name, as the manifest lists it. Empty if that can't be read."""
    try:
        return {str(k): str(v) for k, v in json.loads((folder / MANIFEST).read_bytes())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def link_or_copy(path: str, name: str) -> None:
    """Makes a hard link `name` to the file `path`, or copies it where the file system has no links."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def link(path: Path, name: Path) -> None:
    """Replaces the file `name` with a hard link to `path`.

    Raises OSError if no link can be made. Then `name` is unchanged.
    """
    if path.samefile(name):
        return  # rename would do nothing, and leave the new link beside the file
    new = name.with_name(f".{name.name}.link")
    os.link(path, new)
    new.replace(name)
