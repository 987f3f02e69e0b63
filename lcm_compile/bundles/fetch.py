"""Bundles that machines fetch by their digest, from a shared folder or over HTTP.

A bundle lies at `PLACE/DIGEST`, where the digest is the sha256 of its manifest, which has those of all other
files. So whoever knows the digest needs to trust neither the place nor the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import quote

from lcm_compile.bundles.bundle import EngineBundle, open_bundle
from lcm_compile.bundles.manifest import MANIFEST, read_manifest
from lcm_compile.errors import BundleError
from lcm_compile.system.cache import home, lock
from lcm_compile.system.files import replacing, user_path

CHUNK = 1 << 20  # bytes that are read at once
TIMEOUT = 60.0  # seconds without a byte


def fetch_bundle(digest: str, place: str) -> EngineBundle:
    """Returns the bundle of a digest, which is fetched if this machine does not have it yet.

    `place` is a folder, or an http(s) URL. Of several processes that want it at the same time one fetches,
    and the others wait. It is kept in the cache folder. Raises BundleError if it can't be fetched, or is not
    what the digest says; then nothing of it is kept.
    """
    folder = home() / "fetched" / digest
    with lock(home() / "locks" / f"fetch-{digest}"):
        with contextlib.suppress(BundleError):  # missing, or damaged since it was fetched
            return open_bundle(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = f"{place.rstrip('/')}/{digest}"
        with replacing(folder) as partial:
            partial.mkdir()
            fetch(source, MANIFEST, partial, digest)
            for name, own in read_manifest(partial)[0].files.items():
                fetch(source, name, partial, own)
        return open_bundle(folder)


def fetch(source: str, name: str, folder: Path, digest: str) -> None:
    """Fetches one file into a folder. Raises BundleError if it can't be fetched or has another sha256."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    found = hashlib.sha256()
    try:
        with opened(source, name) as file, path.open("wb") as copy:
            while chunk := file.read(CHUNK):
                found.update(chunk)
                copy.write(chunk)
    except (OSError, HTTPException) as error:
        why = getattr(error, "strerror", None) or error
        raise BundleError(
            f"{source}/{name} can't be fetched: {why}",
            "the bundle lies there under the sha256 of its manifest.json: cp -r BUNDLE PLACE/DIGEST",
        ) from error
    if found.hexdigest() != digest:
        raise BundleError(f"{source}/{name} is not what its sha256 says", "copy the bundle there again")


def opened(source: str, name: str) -> IO[bytes]:
    """Returns a file of a folder or of a URL, open to be read."""
    if source.startswith(("http://", "https://")):
        file: IO[bytes] = urllib.request.urlopen(f"{source}/{quote(name)}", timeout=TIMEOUT)
        return file
    return (user_path(source) / name).open("rb")
