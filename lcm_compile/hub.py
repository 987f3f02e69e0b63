"""Files from the Hugging Face hub, or from its cache where the hub can't be reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SECONDS = 10.0


def fetch(repository: str, files: Sequence[str]) -> Path:
    """The folder of a repository's newest revision, with the files of these patterns.

    ConnectionError, with the reason, where neither the hub nor the cache has it.
    """
    from huggingface_hub import HfApi, snapshot_download

    revision, reason = None, ""
    # The client raises what its HTTP library does, which is another one in each of its major versions.
    try:
        # snapshot_download asks for the revision too, but waits for ever for the answer.
        revision = HfApi().model_info(repository, timeout=SECONDS).sha
    except Exception as error:
        reason = first_line(error)
    try:
        patterns = list(files)
        if revision is None:
            return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ConnectionError(reason or first_line(error)) from error


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
