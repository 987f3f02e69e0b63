"""Files that several bundles of the store hold are stored once: hard links between equal files."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from lcm_compile.system.cache import Digests


def share(folder: Path, store: Path) -> None:
    """Makes the files of the bundle in `folder` one with equal files of the bundles in `store`.

    A file there counts if it holds what its manifest says, and not where it was changed since. A link moves
    its ctime, so its digest is computed anew once. Where no link can be made, the files stay two.
    """
    stored: dict[str, list[Path]] = {}
    for other in sorted(store.glob("[!.]*/")):
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
    """sha256 by name, as the bundle's manifest has it; nothing where that can't be read."""
    try:
        return {
            str(k): str(v) for k, v in json.loads((folder / "manifest.json").read_bytes())["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def link(path: Path, name: Path) -> None:
    """Gives a file another name, in the place of what has it; OSError leaves that as it was."""
    new = name.with_name(f".{name.name}.link")
    os.link(path, new)
    new.replace(name)
