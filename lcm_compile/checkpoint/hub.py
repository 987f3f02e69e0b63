"""Fetches files from the Hugging Face hub, or from its cache if the hub can't be reached."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lcm_compile.errors import first_line

SECONDS = 10.0  # to wait for the hub's first answer
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"  # OWNER/NAME
# File names or patterns, or a function that chooses among the repository's file names.
Files = Sequence[str] | Callable[[list[str]], list[str]]


def fetch(repository: str, files: Files, revision: str | None = None) -> Path:
    """Returns the folder of a repository's revision, with the files of these names or patterns.

    The default revision is the newest. Raises ConnectionError, with the reason, if neither the hub nor the
    cache has it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    info, reason = None, ""
    # The client raises the errors of its HTTP library, which differs between its major versions.
    try:
        # snapshot_download asks for the revision too, but without a timeout.
        info = HfApi().model_info(repository, revision=revision, timeout=SECONDS)
    except Exception as error:
        reason = first_line(error)
    try:
        if info is None:
            return from_cache(repository, revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        patterns = files(names) if callable(files) else list(files)
        # The revision's name is given, not the commit in `info`: only then does the cache store the name.
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ConnectionError(reason or first_line(error)) from error


def from_cache(repository: str, revision: str | None = None) -> Path:
    """Returns a revision's folder in the cache, without asking the hub. The folder may lack files.

    Raises an error of the hub's client if there is none.
    """
    from huggingface_hub import snapshot_download

    # Without patterns, because `fetch` leaves snapshots with some of the files, and these must count.
    return Path(snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=True))
