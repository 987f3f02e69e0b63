"""Names pictures, and saves them as files that hold the settings they were drawn with."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.errors import UsageError
from lcm_compile.output.console import note
from lcm_compile.output.picture_settings import save_options
from lcm_compile.system.files import replacing_output

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SLUG_LENGTH = 48  # characters
SLUG_BYTES = 120  # with a seed, a number and the ending of a temporary file, a name stays below 255 bytes


def slug(prompt: str) -> str:
    """Returns a prompt as the stem of a file name: its letters and digits of any script, in lower case.

    A longer prompt is cut, and ends with digits of its sha256 that tell it from others with the same start.
    """
    text = unicodedata.normalize("NFC", prompt.lower())
    text = text.encode(sys.getfilesystemencoding(), "ignore").decode(sys.getfilesystemencoding())
    # Letters, numbers, and the marks that scripts such as Devanagari write vowels with.
    words = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text).split()
    words = [word for word in words if any(unicodedata.category(c)[0] != "M" for c in word)]
    whole = "-".join(words)
    cut = whole[:SLUG_LENGTH].encode()[:SLUG_BYTES].decode(errors="ignore").rstrip("-")
    if cut != whole:
        cut = f"{cut}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}"
    return cut or "picture"


class Names:
    """Gives the pictures of one command their names. No name is given twice."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._numbers: dict[str, int] = {}  # the next number to try after each name

    def name(self, prompt: str, seed: int, image: str = "") -> str:
        """Returns a file name without its suffix, with a number from the second of the same name on.

        `image` is the SHA-256 of the image that the picture begins at, if there is one: so a picture is not
        saved in the place of the one that it begins at, which may be of the same prompt and seed.
        """
        first = f"{slug(prompt)}-{seed}" + (f"-from-{image[:6]}" if image else "")
        for number in itertools.count(self._numbers.get(first, 1)):
            name = first if number == 1 else f"{first}-{number}"
            if name not in self._given:
                break
        self._numbers[first] = number + 1
        self._given.add(name)
        return name


def picture_paths(out: Path | None, name: str, count: int) -> list[Path]:
    """Returns the paths of `count` pictures of one request, after making their folder.

    One picture goes to the file `out`, or into it if it is a folder; several go into the folder `out`. The
    file or folder is called `name` if `out` does not name it. Raises UsageError if the pictures can't be
    written there.
    """
    if count == 1:
        return [one_path(out, f"{name}.png")]
    return paths_in(Path(name) if out is None else out, [f"{i:03d}" for i in range(count)])


def paths_in(folder: Path, names: Sequence[str]) -> list[Path]:
    """Returns the paths of several pictures of these names, after making their folder.

    Raises UsageError if the pictures can't be written there.
    """
    if folder.suffix.lower() in FORMATS or folder.is_file():
        raise UsageError(
            f"--out {folder} is a file name, and {len(names)} pictures need a folder",
            "give a folder to --out",
        )
    paths = [folder / f"{name}.png" for name in names]
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
    elif out.suffix.lower() in FORMATS:
        path = out
    else:
        raise UsageError(
            f"--out {out} is neither a folder nor a {', '.join(FORMATS)} file",
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


def save_picture(image: Image, path: Path, settings: Mapping[str, Any], parameters: str = "") -> None:
    """Saves a picture as PNG, JPEG or WebP, by its suffix, with both texts of `picture_settings`.

    After an error the file is as it was before.
    """
    form = FORMATS[path.suffix.lower()]
    try:
        options = save_options(form, settings, parameters)
    except ValueError as error:
        note(f"warning: {path} holds no settings: {error}; a PNG has room for them", always=True)
        options = {}
    if form != "PNG":
        options["quality"] = 95
    with replacing_output(path) as partial:
        image.save(partial, format=form, **options)
