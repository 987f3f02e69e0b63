"""Pictures with captions to train on: the demo world, drawn afresh, or a folder of files.

Training counts its pictures: number n shows the same, and gets the same noise, for the same seed. So a
training that resumes needs no generator's state, and processes share a batch by sharing its numbers.
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
from lcm_compile.system.files import user_path

DEMO = "demo"
METADATA = "metadata.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LAYOUT = f"a folder of pictures needs a caption beside each (cat.png, cat.txt), or one {METADATA}"

# What is drawn at random, each from generators of its own.
ORDER, SCENES, NOISE, PRIOR_NOISE = 1, 2, 3, 4

# A uint8 picture (height, width, 3) and its caption
Sample = tuple[NDArray[np.uint8], str]


def generator(purpose: int, seed: int, n: int) -> np.random.Generator:
    return np.random.default_rng([purpose, seed, n])


class Data(Protocol):
    """Pictures without end, by number, and a digest that tells one set of them from another."""

    def sample(self, n: int) -> Sample: ...

    def digest(self) -> str: ...


@dataclass(frozen=True)
class Captioned:
    """A picture file and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class DemoWorld:
    """Scenes of the demo world, a new one for every number."""

    height: int
    width: int
    seed: int

    def sample(self, n: int) -> Sample:
        from lcm_compile.demo.world import caption, render, sample_scene

        scene = sample_scene(generator(SCENES, self.seed, n))
        side = max(self.height, self.width)
        top, left = (side - self.height) // 2, (side - self.width) // 2
        return render(scene, side)[top : top + self.height, left : left + self.width], caption(scene)

    def digest(self) -> str:
        return DEMO


@dataclass(frozen=True)
class Folder:
    """Every picture of a folder once in random order, then again in another."""

    examples: Sequence[Captioned]
    height: int
    width: int
    seed: int

    def index(self, n: int) -> int:
        """Which of the examples the number n stands for."""
        epoch, position = divmod(n, len(self.examples))
        return int(order(self.seed, epoch, len(self.examples))[position])

    def read(self, index: int) -> Sample:
        example = self.examples[index]
        return read_picture(example.path, self.height, self.width), example.caption

    def sample(self, n: int) -> Sample:
        return self.read(self.index(n))

    def digest(self) -> str:
        """Of names, sizes in bytes and captions, which is cheap."""
        rows = [(e.path.name, e.path.stat().st_size, e.caption) for e in self.examples]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return generator(ORDER, seed, epoch).permutation(count)


def open_data(
    data: str, height: int, width: int, seed: int, prompt: str | None = None, option: str = "--data"
) -> Data:
    """The pictures of `data`, which is `demo` or a folder; `prompt` captions those without a caption.

    A folder is read whole once before this returns, so that no picture can end a long training.
    UsageError where there is no such folder; LcmCompileError for what is wrong in it.
    """
    if data == DEMO:
        return DemoWorld(height, width, seed)
    folder = Folder(list_folder(user_path(data), prompt, option), height, width, seed)
    for i in range(len(folder.examples)):
        folder.read(i)
    return folder


def list_folder(folder: Path, prompt: str | None = None, option: str = "--data") -> list[Captioned]:
    """The captioned pictures of a folder, by name. Errors name the file that is wrong."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"{option} {folder} {what}", f"give {DEMO!r} or a folder; {LAYOUT}")
    metadata = folder / METADATA
    examples = read_metadata(metadata) if metadata.is_file() else read_captions(folder, prompt)
    if not examples:
        raise LcmCompileError(f"{folder} holds no pictures ({', '.join(PICTURES)})", LAYOUT)
    empty = [example.path.name for example in examples if not example.caption]
    if empty:
        raise LcmCompileError(f"{folder}: the caption of {empty[0]} is empty ({len(empty)} such)", LAYOUT)
    return examples


def list_pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def read_captions(folder: Path, prompt: str | None) -> list[Captioned]:
    pictures = list_pictures(folder)
    bare = [path for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare and prompt is None:
        raise LcmCompileError(
            f"{folder}: {len(bare)} of {len(pictures)} pictures have no caption, first {bare[0].name}", LAYOUT
        )
    captions = [
        (prompt or "") if path in bare else read_text(path.with_suffix(".txt")).strip() for path in pictures
    ]
    return [Captioned(path, caption) for path, caption in zip(pictures, captions, strict=True)]


def read_metadata(path: Path) -> list[Captioned]:
    """The lines `{"file_name": …, "text": …}` of the layout that `datasets` calls an image folder."""
    examples = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
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
                f"{path}, line {number}: no JSON object with file_name and text", hint
            ) from None
        if not (path.parent / name).is_file():
            raise LcmCompileError(f"{path}, line {number}: {name} does not exist", "correct its file_name")
        examples.append(Captioned(path.parent / name, text.strip()))
    return examples


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LcmCompileError(f"{path} can't be read as UTF-8 text: {error}", "save it again") from error


def read_picture(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """A picture scaled to cover height × width and cut to its centre: (height, width, 3)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
            return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
    # PIL raises SyntaxError for some broken PNGs, and refuses pictures made to exhaust memory.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LcmCompileError(
            f"the picture {path} can't be read: {error}", "replace it, or take it out of the folder"
        ) from error
