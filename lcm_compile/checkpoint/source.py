"""Finds what an option names by a path or on the hub: the folder or the file of one model. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from lcm_compile.checkpoint.diffusers_folder import FULL_FIRST, HALF_FIRST, Variants, needed_files
from lcm_compile.checkpoint.find import hub_id
from lcm_compile.checkpoint.hub import fetch
from lcm_compile.errors import CheckpointError, UsageError
from lcm_compile.system.files import user_path


def locate_model(source: str, what: str, option: str, half: bool) -> tuple[Path, Variants]:
    """Returns the folder or file of a model, downloaded if need be, and which variants of weights to prefer.

    `source` is a path, `OWNER/NAME` or `OWNER/NAME:FILE` on the hub. `what` is the kind of model, and
    `option` the one that names it. With `half`, fp16 weights are preferred on the hub. Raises UsageError if
    nothing has this name, and CheckpointError if it can't be downloaded.
    """
    path = user_path(source)
    if path.exists():
        return path, FULL_FIRST
    repository, _, file = source.partition(":")
    if not (hub := hub_id(repository)):
        raise UsageError(
            f"{option} {source} does not exist",
            "give a diffusers folder, a file, or OWNER/NAME or OWNER/NAME:FILE on the hub",
        )
    variants = HALF_FIRST if half else FULL_FIRST
    try:
        files = [file] if file else lambda names: needed_files(names, variants, ("",))
        folder = fetch(hub[0], files, hub[1])
    except ConnectionError as error:
        raise CheckpointError(
            f"the {what} {source} is neither a path nor in the hub cache, and can't be downloaded: {error}",
            f"check the network (or HF_HOME, HF_TOKEN), or give a folder or a file to {option}",
        ) from error
    if not file:
        return folder, variants
    if not (folder / file).is_file():
        raise CheckpointError(
            f"{hub[0]} has no {file} on the hub", f"https://huggingface.co/{hub[0]}/tree/main lists its files"
        )
    return folder / file, variants
