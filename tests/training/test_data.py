"""Training data: the demo world and folders of captioned pictures, whole and broken."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcm_compile.demo.world import parse_caption
from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.training_data import list_folder, open_data, read_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def write_folder(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 30), (10 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}\n")
    return folder


def test_demo():
    pictures, captions = next(open_data("demo", 3, 32, 48, 0))
    assert pictures.shape == (3, 32, 48, 3) and pictures.dtype == np.uint8
    assert [parse_caption(text).caption for text in captions] == captions
    again, other = next(open_data("demo", 3, 32, 48, 0)), next(open_data("demo", 3, 32, 48, 1))
    np.testing.assert_array_equal(again[0], pictures)
    assert again[1] == captions != other[1]


def test_every_picture_once_an_epoch(tmp_path):
    folder = write_folder(tmp_path / "pictures")
    batches = list(islice(open_data(str(folder), 2, 16, 16, 0), 5))
    for pictures, captions in batches:
        assert pictures.shape == (2, 16, 16, 3)
        assert [f"picture {red // 10}" for red in pictures[:, 0, 0, 0]] == captions
    seen = [text for _, captions in batches for text in captions]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [f"picture {i}" for i in range(5)]
    assert [captions for _, captions in islice(open_data(str(folder), 2, 16, 16, 1), 5)] != [
        captions for _, captions in batches
    ]
    assert len(next(open_data(str(folder), 12, 16, 16, 0))[1]) == 12  # more than there are


def test_pictures_are_cut_to_their_centre(tmp_path):
    wide = Image.new("RGB", (90, 30), RED)
    wide.paste(BLUE, (30, 0, 60, 30))
    wide.save(tmp_path / "wide.png")
    np.testing.assert_allclose(
        read_picture(tmp_path / "wide.png", 16, 16)[:, 2:-2], [[BLUE] * 12] * 16, atol=9
    )
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by 90°
    wide.save(tmp_path / "turned.png", exif=turned)
    assert read_picture(tmp_path / "turned.png", 90, 30)[0, 0].tolist() == list(RED)
    assert read_picture(tmp_path / "turned.png", 90, 30)[45, 2].tolist() == list(BLUE)
    wide.convert("P").save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png", 8, 8).shape == (8, 8, 3)


def test_metadata(tmp_path):
    folder = write_folder(tmp_path / "pictures", 2)
    rows = [{"file_name": "1.png", "text": " one "}, {"file_name": "0.png", "text": "nought", "more": 1}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [(e.path.name, e.caption) for e in list_folder(folder)] == [("1.png", "one"), ("0.png", "nought")]


def test_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for name, message in (("missing", "does not exist"), ("file", "is a file")):
        with pytest.raises(UsageError, match=message) as caught:
            open_data(str(tmp_path / name), 1, 8, 8, 0)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.md": b"x"}, "holds no pictures"),
        ({"a.png": b"x"}, "1 of 1 pictures have no caption, first a.png"),
        ({"a.png": b"x", "a.txt": b" \n"}, "caption of a.png is empty"),
        ({"a.png": b"x", "a.txt": b"\xff\xfe\xfa"}, "a.txt can't be read as UTF-8"),
        ({"a.png": b"x", "a.txt": b"a cat"}, "a.png can't be read"),
        ({"metadata.jsonl": b"\n{broken"}, "line 2: no JSON object"),
        ({"metadata.jsonl": b'{"file_name": "a.png"}'}, "line 1: no JSON object"),
        ({"metadata.jsonl": b"[1]"}, "line 1: no JSON object"),
        ({"metadata.jsonl": b'{"file_name": "a.png", "text": 3}'}, "line 1: no JSON object"),
        ({"metadata.jsonl": b'{"file_name": "a.png", "text": "a"}'}, "line 1: a.png does not exist"),
        ({"metadata.jsonl": b""}, "holds no pictures"),
    ],
)
def test_broken_folders(files, message, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(LcmCompileError, match=message) as caught:
        open_data(str(tmp_path), 1, 8, 8, 0)
    assert caught.value.hint


def test_a_truncated_picture_is_found_before_training(tmp_path):
    folder = write_folder(tmp_path / "pictures")
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(folder / "4.png")
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LcmCompileError, match=r"4\.png can't be read"):
        open_data(str(folder), 1, 8, 8, 0)
