"""Saves pictures as files. A PNG holds the settings that it was drawn with."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_compile.errors import UsageError
from lcm_compile.system.files import replacing_output

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def slug(prompt: str, longest: int = 48) -> str:
    """Returns a prompt as the stem of a file name: lower case, of at most `longest` characters."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:longest].rstrip("-") or "picture"


def picture_paths(out: Path | None, prompt: str, seed: int, count: int) -> list[Path]:
    """Returns the paths of `count` pictures of one request, after making their folder.

    One picture goes to the file `out`, or into it if it is a folder; several go into the folder `out`.
    Raises UsageError if the pictures can't be written there.
    """
    name = f"{slug(prompt)}-{seed}"
    if count == 1:
        return [one_path(out, f"{name}.png")]
    folder = Path(name) if out is None else out
    if folder.suffix.lower() in SUFFIXES or folder.is_file():
        raise UsageError(
            f"--out {folder} is a file name, and {count} pictures need a folder", "give a folder to --out"
        )
    paths = [folder / f"{i:03d}.png" for i in range(count)]
    make_room(paths)
    return paths


def sheet_path(out: Path | None, prompt: str) -> Path:
    """Returns the path of a grid's sheet, after making its folder. Raises UsageError as one_path does."""
    return one_path(out, f"{slug(prompt)}-grid.png")


def one_path(out: Path | None, name: str) -> Path:
    """Returns the path `out`, or `name` in the folder `out` or in the current folder.

    Raises UsageError if `out` is neither a folder nor a picture's file, or can't be written.
    """
    if out is None:
        path = Path(name)
    elif out.is_dir():
        path = out / name
    elif out.suffix.lower() in SUFFIXES:
        path = out
    else:
        raise UsageError(
            f"--out {out} is neither a folder nor a {', '.join(SUFFIXES)} file",
            "for example --out picture.png",
        )
    make_room([path])
    return path


def make_room(paths: list[Path]) -> None:
    """Makes the folder that all these files are in. Raises UsageError if they can't be written there."""
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} can't be made: {error.strerror}", "give another --out") from error
    blocked = [p for p in (folder, *paths) if p.exists() and not os.access(p, os.W_OK)]
    if blocked or paths[0].is_dir():
        raise UsageError(f"--out {(blocked or paths)[0]} can't be written", "give another --out")


def save_picture(image: Image, path: Path, settings: Mapping[str, str]) -> None:
    """Saves a picture as PNG, JPEG or WebP, by its suffix; `settings` become text chunks of a PNG.

    After an error the file is as it was before.
    """
    from PIL.PngImagePlugin import PngInfo

    with replacing_output(path) as partial:
        if path.suffix.lower() == ".png":
            info = PngInfo()
            for key, value in settings.items():
                # A lone surrogate, from undecodable bytes on a command line, is no text.
                info.add_itxt(key, value.encode("utf-8", "replace").decode("utf-8"))
            image.save(partial, format="PNG", pnginfo=info)
        else:
            image.save(partial, format={".webp": "WEBP"}.get(path.suffix.lower(), "JPEG"), quality=95)
