"""Pictures to files: PNGs that tell how they were made, and labelled contact sheets."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_compile.errors import LcmCompileError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LABEL_LINES = 4
LINE_HEIGHT = 13


def slug(prompt: str, longest: int = 48) -> str:
    """A file name from a prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:longest].rstrip("-") or "picture"


def picture_paths(out: Path | None, prompt: str, seed: int, count: int) -> list[Path]:
    """Where the pictures of one request go; folders are made. UsageError where they can't be written.

    One picture goes to the file `out`, or into it if it is a folder; several go into the folder `out`.
    """
    name = f"{slug(prompt)}-{seed}"
    if count > 1:
        folder = Path(name) if out is None else out
        if folder.suffix.lower() in SUFFIXES or folder.is_file():
            raise UsageError(
                f"--out {folder} is a file name, and {count} pictures need a folder", "give a folder to --out"
            )
        paths = [folder / f"{i:03d}.png" for i in range(count)]
    elif out is None:
        paths = [Path(f"{name}.png")]
    elif out.is_dir():
        paths = [out / f"{name}.png"]
    elif out.suffix.lower() in SUFFIXES:
        paths = [out]
    else:
        raise UsageError(
            f"--out {out} is neither a folder nor a {', '.join(SUFFIXES)} file",
            "for example --out picture.png",
        )
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} can't be made: {error.strerror}", "give another --out") from error
    blocked = [p for p in (folder, *paths) if p.exists() and not os.access(p, os.W_OK)]
    if blocked or paths[0].is_dir():
        raise UsageError(f"--out {(blocked or paths)[0]} can't be written", "give another --out")
    return paths


def save_picture(image: Image, path: Path, settings: Mapping[str, str]) -> None:
    """Saves whole or not at all, with `settings` as PNG text chunks."""
    from PIL.PngImagePlugin import PngInfo

    part = path.with_name(f".{path.name}.part")
    try:
        if path.suffix.lower() == ".png":
            info = PngInfo()
            for key, value in settings.items():
                # A lone surrogate, from undecodable bytes on a command line, is no text.
                info.add_itxt(key, value.encode("utf-8", "replace").decode("utf-8"))
            image.save(part, format="PNG", pnginfo=info)
        else:
            image.save(part, format={".webp": "WEBP"}.get(path.suffix.lower(), "JPEG"), quality=95)
        part.replace(path)
    except OSError as error:
        raise LcmCompileError(
            f"{path} can't be written: {error.strerror or error}", "give another --out"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def contact_sheet(pictures: Sequence[tuple[Image, str]], columns: int = 4, scale: int = 2) -> Image:
    """Pictures in rows, each with its label under it, on white."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=11)
    width, height = (side * scale for side in pictures[0][0].size)
    gap, label = 12, LABEL_LINES * LINE_HEIGHT + 4
    rows = -(-len(pictures) // columns)
    size = (columns * (width + gap) + gap, rows * (height + label + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    letters = max(8, int(width / font.getlength("n")))
    for i, (picture, text) in enumerate(pictures):
        x = gap + i % columns * (width + gap)
        y = gap + i // columns * (height + label + gap)
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y))
        for line, words in enumerate(textwrap.wrap(text, letters)[:LABEL_LINES]):
            draw.text((x, y + height + 2 + line * LINE_HEIGHT), words, fill=(60, 60, 60), font=font)
    return sheet
