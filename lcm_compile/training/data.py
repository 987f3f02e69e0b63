"""The captioned pictures to train on: new scenes of the demo world, or a folder of files.

The pictures of a training are numbered. With the same seed, picture n always shows the same and gets the same
noise. So a resumed training needs no saved random state, and processes share a batch by sharing its numbers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.system.files import read_lines, user_path

DEMO = "demo"
METADATA = "metadata.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LAYOUT = f"a folder of pictures needs a caption next to each (cat.png, cat.txt), or one {METADATA}"

# The purposes of random numbers. Each purpose has its own generators, so that none influences another.
ORDER = 1  # order of a folder's pictures
SCENES = 2  # scenes of the demo world
NOISE = 3  # noise, timesteps and guidance of the pictures
PRIOR_NOISE = 4  # noise and timesteps of the class pictures

# A uint8 picture (height, width, 3) and its caption
Sample = tuple[NDArray[np.uint8], str]


def generator(purpose: int, seed: int, n: int) -> np.random.Generator:
    """Returns the random generator of a purpose for picture `n`, or of ORDER for epoch `n`."""
    return np.random.default_rng([purpose, seed, n])


class Data(Protocol):
    """An endless sequence of captioned pictures, each with a number."""

    def sample(self, n: int) -> Sample:
        """Returns picture number `n` and its caption."""

    def digest(self) -> str:
        """Returns a text that differs between different sets of pictures."""


@dataclass(frozen=True)
class Captioned:
    """A picture file and its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class DemoWorld:
    """Scenes of the demo world, a new one for every number, drawn as squares and cropped."""

    height: int
    width: int
    seed: int

    def sample(self, n: int) -> Sample:
        """Returns scene number `n`, cropped to the centre, and its caption."""
        from lcm_compile.demo.world import caption, render, sample_scene

        scene = sample_scene(generator(SCENES, self.seed, n))
        side = max(self.height, self.width)
        top, left = (side - self.height) // 2, (side - self.width) // 2
        return render(scene, side)[top : top + self.height, left : left + self.width], caption(scene)

    def digest(self) -> str:
        """Returns `demo`, because with one seed every demo world has the same scenes."""
        return DEMO


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder in random order, then all of them again in another order, without end."""

    examples: Sequence[Captioned]
    height: int
    width: int
    seed: int

    def index(self, n: int) -> int:
        """Returns the index in `examples` of picture number `n`."""
        epoch, position = divmod(n, len(self.examples))
        return int(order(self.seed, epoch, len(self.examples))[position])

    def read(self, index: int) -> Sample:
        """Reads the picture at `index` in `examples`, and returns it with its caption."""
        example = self.examples[index]
        return read_picture(example.path, self.height, self.width), example.caption

    def sample(self, n: int) -> Sample:
        """Returns picture number `n` and its caption."""
        return self.read(self.index(n))

    def digest(self) -> str:
        """Returns a digest of file names, sizes in bytes and captions. It is cheap: no picture is read."""
        rows = [(e.path.name, e.path.stat().st_size, e.caption) for e in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Returns a random permutation of `count` pictures, which differs in every epoch. Shape (count,)."""
    return generator(ORDER, seed, epoch).permutation(count)


def open_data(
    data: str, height: int, width: int, seed: int, prompt: str | None = None, option: str = "--data"
) -> Data:
    """Opens `data`, which is `demo` or a folder of pictures.

    `prompt` is the caption of pictures that have none, and `option` is the option that errors name. Every
    picture of a folder is read once before this returns, so that a damaged one can't end a long training.
    Raises UsageError if there is no such folder, and LcmCompileError if something in it is missing or
    damaged.
    """
    if data == DEMO:
        return DemoWorld(height, width, seed)
    folder = Folder(list_folder(user_path(data), prompt, option), height, width, seed)
    for i in range(len(folder.examples)):
        folder.read(i)
    return folder


def list_folder(folder: Path, prompt: str | None = None, option: str = "--data") -> list[Captioned]:
    """Lists the pictures of a folder with their captions, in the order of their names or of metadata.jsonl.

    Raises UsageError if `folder` is not a folder. Raises LcmCompileError if it holds no pictures or if a
    caption is missing, empty or unreadable; the error names the file.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"{option} {folder} {what}", f"give {DEMO!r} or a folder; {LAYOUT}")
    metadata = folder / METADATA
    examples = read_metadata(metadata) if metadata.is_file() else read_captions(folder, prompt)
    if not examples:
        raise LcmCompileError(f"{folder} holds no pictures ({', '.join(PICTURES)})", LAYOUT)
    empty = [example.path.name for example in examples if not example.caption]
    if empty:
        raise LcmCompileError(
            f"{folder}: the caption of {empty[0]} is empty; empty captions in all: {len(empty)}", LAYOUT
        )
    return examples


def list_pictures(folder: Path) -> list[Path]:
    """Lists the files of a folder that have a picture's suffix, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def read_captions(folder: Path, prompt: str | None) -> list[Captioned]:
    """Pairs every picture of a folder with the text file next to it, or with `prompt` if there is none.

    Raises LcmCompileError if a picture has no text file and `prompt` is None.
    """
    pictures = list_pictures(folder)
    bare = [path for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare and prompt is None:
        raise LcmCompileError(
            f"{folder}: {len(bare)} of {len(pictures)} pictures have no caption, first {bare[0].name}", LAYOUT
        )
    captions = [
        (prompt or "") if path in bare else "\n".join(read_text(path.with_suffix(".txt"))).strip()
        for path in pictures
    ]
    return [Captioned(path, caption) for path, caption in zip(pictures, captions, strict=True)]


def read_metadata(path: Path) -> list[Captioned]:
    """Reads the lines `{"file_name": …, "text": …}` of metadata.jsonl, as in an image folder of `datasets`.

    Raises LcmCompileError if a line is not of this form or names a file that does not exist.
    """
    examples = []
    for number, line in enumerate(read_text(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            hint = 'each line is a JSON object such as {"file_name": "cat.png", "text": "a cat"}'
            raise LcmCompileError(
                f"{path}, line {number}: no JSON object with the strings file_name and text", hint
            ) from None
        if not (path.parent / name).is_file():
            raise LcmCompileError(f"{path}, line {number}: {name} does not exist", "correct its file_name")
        examples.append(Captioned(path.parent / name, text.strip()))
    return examples


def read_text(path: Path) -> list[str]:
    """Returns the lines of a text file. Raises LcmCompileError if it can't be read."""
    try:
        return read_lines(path)
    except OSError as error:
        raise LcmCompileError(f"{path} can't be read: {error.strerror}", "ls -l shows who may") from error


def read_picture(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """Reads a picture, scaled to cover height × width and cropped to its centre. Shape (height, width, 3).

    Raises LcmCompileError if it can't be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
            return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
    # PIL raises SyntaxError for some broken PNGs, and refuses pictures made to exhaust memory.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LcmCompileError(
            f"the picture {path} can't be read: {error}", "replace it, or remove it from the folder"
        ) from error
