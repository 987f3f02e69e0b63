"""Training data: the demo world and folders of captioned pictures, whole and broken."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from runs import write_pictures

from lcm_compile.demo.world import parse_caption
from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.training.data import list_folder, open_data, read_picture

RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_demo():
    data = open_data("demo", 32, 48, 0)
    samples = [data.sample(n) for n in range(3)]
    assert all(picture.shape == (32, 48, 3) and picture.dtype == np.uint8 for picture, _ in samples)
    assert all(parse_caption(text).caption == text for _, text in samples)
    again, other = open_data("demo", 32, 48, 0).sample(2), open_data("demo", 32, 48, 1).sample(2)
    np.testing.assert_array_equal(again[0], samples[2][0])
    assert again[1] == samples[2][1] != other[1]
    assert len({text for _, text in samples}) == 3


def test_every_picture_once_an_epoch(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 5)
    seen = []
    for n in range(15):
        picture, text = open_data(str(folder), 16, 16, 0).sample(
            n
        )  # the number decides, not what came before
        assert picture.shape == (16, 16, 3) and text == f"picture {picture[0, 0, 0] // 10}"
        seen.append(text)
    epochs = [seen[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == [f"picture {i}" for i in range(5)] for epoch in epochs)
    assert not epochs[0] == epochs[1] == epochs[2]
    assert [open_data(str(folder), 16, 16, 1).sample(n)[1] for n in range(15)] != seen


def test_digest(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 2)
    before = open_data(str(folder), 16, 16, 0).digest()
    moved = folder.rename(tmp_path / "moved")
    assert open_data(str(moved), 16, 16, 0).digest() == before
    (moved / "1.txt").write_text("another")
    assert open_data(str(moved), 16, 16, 0).digest() != before


def test_a_prompt_captions_what_has_no_caption(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 3)
    (folder / "1.txt").unlink()
    captions = [example.caption for example in list_folder(folder, "a photo of sks dog")]
    assert captions == ["picture 0", "a photo of sks dog", "picture 2"]


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
    folder = write_pictures(tmp_path / "pictures", 2)
    rows = [{"file_name": "1.png", "text": " one "}, {"file_name": "0.png", "text": "nought", "more": 1}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [(e.path.name, e.caption) for e in list_folder(folder)] == [("1.png", "one"), ("0.png", "nought")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_as_any_editor_saves_them(tmp_path, encoding):
    folder = write_pictures(tmp_path / "pictures", 1)
    (folder / "0.txt").write_bytes("größe 赤い\r\n".encode(encoding))
    assert [e.caption for e in list_folder(folder)] == ["größe 赤い"]
    row = json.dumps({"file_name": "0.png", "text": "a\u2028b 赤い"}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_bytes(f"{row}\r\n".encode(encoding))
    assert [e.caption for e in list_folder(folder)] == ["a\u2028b 赤い"]


def test_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for name, message in (("missing", "does not exist"), ("file", "is a file")):
        with pytest.raises(UsageError, match=message) as caught:
            open_data(str(tmp_path / name), 8, 8, 0)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.md": b"x"}, "holds no pictures"),
        ({"a.png": b"x"}, "1 of 1 pictures have no caption, first a.png"),
        ({"a.png": b"x", "a.txt": b" \n"}, "caption of a.png is empty"),
        ({"a.png": b"x", "a.txt": b"\xff\xfe\xfa"}, "a.txt is not UTF-16 text"),
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
        open_data(str(tmp_path), 8, 8, 0)
    assert caught.value.hint


def test_a_truncated_picture_is_found_before_training(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 5)
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(folder / "4.png")
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LcmCompileError, match=r"4\.png can't be read"):
        open_data(str(folder), 8, 8, 0)
