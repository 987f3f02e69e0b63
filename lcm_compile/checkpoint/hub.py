"""Files from the Hugging Face hub, or from its cache where the hub can't be reached."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lcm_compile.errors import first_line

SECONDS = 10.0
Files = Sequence[str] | Callable[[list[str]], list[str]]


def fetch(repository: str, files: Files, revision: str | None = None) -> Path:
    """The folder of a repository's revision (its newest one), with the files of these names or patterns.

    `files` may choose among the repository's file names. ConnectionError, with the reason, where neither the
    hub nor the cache has it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    info, reason = None, ""
    # The client raises what its HTTP library does, which is another one in each of its major versions.
    try:
        # snapshot_download asks for the revision too, but waits for ever for the answer.
        info = HfApi().model_info(repository, revision=revision, timeout=SECONDS)
    except Exception as error:
        reason = first_line(error)
    try:
        if info is None:
            return from_cache(repository, revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        patterns = files(names) if callable(files) else list(files)
        # By its name, not by the commit just told: only then is the name in the cache for later.
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ConnectionError(reason or first_line(error)) from error


def from_cache(repository: str, revision: str | None = None) -> Path:
    """A revision's folder in the cache, whatever it holds; raises where there is none. Asks no hub."""
    from huggingface_hub import snapshot_download

    # No pattern: a snapshot of some of the files, as fetch leaves it, is not incomplete.
    return Path(snapshot_download(repository, revision=revision, allow_patterns=[], local_files_only=True))
