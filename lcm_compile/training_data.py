"""Pictures with captions to train on: the demo world, drawn afresh, or a folder of files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lcm_compile.errors import LcmCompileError, UsageError

DEMO = "demo"
METADATA = "metadata.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LAYOUT = f"a folder of pictures needs a caption beside each (cat.png, cat.txt), or one {METADATA}"

# uint8 pictures (batch, height, width, 3) and their captions
Batch = tuple[NDArray[np.uint8], list[str]]


@dataclass(frozen=True)
class Captioned:
    """A picture file and what it shows."""

    path: Path
    caption: str


def open_data(data: str, batch: int, height: int, width: int, seed: int) -> Iterator[Batch]:
    """Endless batches of `data`, which is `demo` or a folder, the same for the same seed.

    A folder is read whole once before this returns, so that no picture can end a long training.
    UsageError where there is no such folder; LcmCompileError for what is wrong in it.
    """
    if data == DEMO:
        return demo_batches(batch, height, width, seed)
    examples = list_folder(Path(data).expanduser())
    for example in examples:
        read_picture(example.path, height, width)
    return folder_batches(examples, batch, height, width, seed)


def demo_batches(batch: int, height: int, width: int, seed: int) -> Iterator[Batch]:
    from lcm_compile.demo.world import caption, render, sample_scene

    rng = np.random.default_rng(seed)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    while True:
        scenes = [sample_scene(rng) for _ in range(batch)]
        pictures = np.stack([render(scene, side) for scene in scenes])
        yield pictures[:, top : top + height, left : left + width], [caption(scene) for scene in scenes]


def folder_batches(
    examples: Sequence[Captioned], batch: int, height: int, width: int, seed: int
) -> Iterator[Batch]:
    """Every picture once in random order, then again in another."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch:
            queue += rng.permutation(len(examples)).tolist()
        chosen, queue = [examples[i] for i in queue[:batch]], queue[batch:]
        pictures = np.stack([read_picture(example.path, height, width) for example in chosen])
        yield pictures, [example.caption for example in chosen]


def list_folder(folder: Path) -> list[Captioned]:
    """The captioned pictures of a folder, by name. Errors name the file that is wrong."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"--data {folder} {what}", f"give {DEMO!r} or a folder; {LAYOUT}")
    metadata = folder / METADATA
    examples = read_metadata(metadata) if metadata.is_file() else read_captions(folder)
    if not examples:
        raise LcmCompileError(f"{folder} holds no pictures ({', '.join(PICTURES)})", LAYOUT)
    empty = [example.path.name for example in examples if not example.caption]
    if empty:
        raise LcmCompileError(f"{folder}: the caption of {empty[0]} is empty ({len(empty)} such)", LAYOUT)
    return examples


def read_captions(folder: Path) -> list[Captioned]:
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    bare = [path.name for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare:
        raise LcmCompileError(
            f"{folder}: {len(bare)} of {len(pictures)} pictures have no caption, first {bare[0]}", LAYOUT
        )
    return [Captioned(path, read_text(path.with_suffix(".txt")).strip()) for path in pictures]


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
