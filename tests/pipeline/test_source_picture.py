"""The pictures that a drawing begins with: of every kind and size, and broken ones."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lcm_compile.errors import UsageError
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.source_picture import check_mask, find_again, source_picture

RED = (200, 30, 60)


def file_of(image, path, **options):
    image.save(path, **options)
    return path


def halves(left=RED, right=(10, 200, 90), size=(40, 20)):
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def shown(given, height=20, width=40):
    return (source_picture(given).pixels(height, width) * 255).round().astype(int)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "LA", "CMYK", "I;16", "YCbCr"])
def test_every_kind_is_read_as_what_it_shows(tmp_path, mode):
    grey = Image.fromarray(np.tile(np.asarray([0, 255], np.uint8).repeat(20), (20, 1)))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = grey if mode in ("L", "1", "LA") else halves()
        image = image.quantize(8) if mode == "P" else image.convert(mode)
    suffix = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    found = shown(file_of(image, tmp_path / f"a.{suffix}"))
    expected = np.asarray((grey if mode in ("L", "1", "LA", "I;16") else halves()).convert("RGB"), int)
    assert np.abs(found - expected).max() <= (2 if mode in ("P", "YCbCr") else 0)


def test_what_is_transparent_is_on_white_and_can_be_the_mask(tmp_path):
    image = halves().convert("RGBA")
    image.putalpha(Image.new("L", image.size))  # all transparent
    image.paste((*RED, 255), (0, 0, 20, 20))
    found = source_picture(file_of(image, tmp_path / "a.png"))
    pixels = (found.pixels(20, 40) * 255).round()
    assert (pixels[:, :20] == RED).all() and (pixels[:, 20:] == 255).all()
    mask = Request("a star", 1, image=found, mask="alpha").mask
    assert (mask.mask(20, 40) == np.repeat([0, 1], 20)).all()
    palette = halves().quantize(8)
    palette.info["transparency"] = palette.getpixel((30, 5))
    assert (shown(file_of(palette, tmp_path / "p.png"))[:, 20:] == 255).all()
    with pytest.raises(UsageError, match=r"transparency, and b\.png has none"):
        Request("a star", 1, image=str(file_of(halves(), tmp_path / "b.png")), mask="alpha")


def test_exif_turns_it_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    path = file_of(halves(size=(40, 20)), tmp_path / "a.png", exif=exif)
    found = shown(path, 40, 20)
    assert (found[:20] == RED).all() and (found[20:] == (10, 200, 90)).all()


@pytest.mark.parametrize(("size", "box"), [((120, 40), (20, 0, 100, 40)), ((40, 120), (0, 50, 40, 70))])
def test_it_covers_the_size_and_is_cropped_around_its_centre(size, box):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8))
    expected = noise.resize((40, 20), Image.Resampling.LANCZOS, box=box)
    assert (shown(noise) == np.asarray(expected)).all()
    assert (shown(noise, *size[::-1]) == np.asarray(noise)).all()  # of its own size it is left as it is


def test_a_mask_is_black_or_white(tmp_path):
    values = np.tile(np.asarray([0, 127, 128, 255], np.uint8).repeat(10), (20, 1))
    mask = source_picture(Image.fromarray(values), "mask")
    assert (mask.mask(20, 40)[0] == np.asarray([0, 0, 1, 1]).repeat(10)).all()
    drawn = Image.new("RGBA", (40, 20))
    ImageDraw.Draw(drawn).rectangle((20, 0, 39, 19), "white")  # on what is transparent, as in an editor
    assert (source_picture(drawn).mask(20, 40)[0] == np.asarray([0, 1]).repeat(20)).all()
    image = source_picture(halves())
    check_mask(image, source_picture(Image.new("L", (21, 10), 255)))  # scaled down, to whole pixels
    with pytest.raises(UsageError, match="20×20 pixels, and the image 40×20"):
        check_mask(image, source_picture(Image.new("L", (20, 20), 255)))
    with pytest.raises(UsageError, match="repaints nothing"):
        check_mask(image, source_picture(Image.new("L", (40, 20), 127)))


def bomb():
    """A PNG of a few bytes that says that it is of 40,000 × 40,000 pixels."""
    head = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png():
    data = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(data, "PNG")
    return data.getvalue()


def test_a_picture_may_be_in_memory(tmp_path):
    path = file_of(halves().convert("RGBA"), tmp_path / "a.png")
    data, array = path.read_bytes(), np.asarray(Image.open(path))
    of_path, of_bytes, of_array = (source_picture(given) for given in (path, data, array))
    assert (of_path.name, of_bytes.name, of_array.name) == ("a.png", "", "")
    assert of_path.sha256 == of_bytes.sha256 == hashlib.sha256(data).hexdigest()
    with Image.open(path) as opened:  # a file's name, but it may have been changed since
        of_image = source_picture(opened)
    assert (of_image.name, of_image.sha256) == ("a.png", of_array.sha256)
    for one in (of_bytes, of_array, of_image):
        assert (one.pixels(20, 40) == of_path.pixels(20, 40)).all()
    for named in (of_path, of_image):
        assert (find_again(named, [tmp_path], "image").pixels(20, 40) == of_path.pixels(20, 40)).all()
    file_of(halves(left=(1, 2, 3)), path)
    for named in (of_path, of_image, of_bytes):
        with pytest.raises(UsageError, match=r"SHA-256 differs|without a name"):
            find_again(named, [tmp_path], "image")
    grey = source_picture(array[..., 0])
    assert (grey.pixels(20, 40)[..., 1] * 255 == array[..., 0]).all()
    wrong = (b"", b"text", array[None], array[..., :2], array / 255, array[:0], Image.new("RGB", (0, 5)))
    for given in wrong:
        with pytest.raises(UsageError, match="the image"):
            source_picture(given)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        ("folder", "Is a directory"),
        (b"", "cannot identify"),
        (b"a text", "cannot identify"),
        (png()[:3000], "truncated|broken|broke"),
        (bomb(), "decompression bomb"),
    ],
    ids=["missing", "folder", "empty", "text", "truncated", "bomb"],
)
def test_what_is_no_picture_is_refused(tmp_path, content, why):
    path = tmp_path / "a.png"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    for field in ("image", "control"):
        with pytest.raises(UsageError, match=why) as refused:
            Request("a star", 1, **{field: path})
        assert str(path) in str(refused.value) and "BytesIO" not in str(refused.value)


def test_what_is_given_wrongly_is_refused(tmp_path):
    float_picture = file_of(Image.new("F", (8, 8)), tmp_path / "a.tiff")
    for field, called in (("image", "the image"), ("control", "the control picture")):
        with pytest.raises(UsageError, match=f"{called} .*a.tiff is in floating point"):
            Request("a star", 1, **{field: float_picture})
        with pytest.raises(UsageError, match=f"{called} must be a path, .*, not int"):
            Request("a star", 1, **{field: 7})
    for field in ({"strength": 0.5}, {"mask": halves()}):
        with pytest.raises(UsageError, match="without the image"):
            Request("a star", 1, **field)
    for strength in (-0.1, 1.1, "0.5"):
        with pytest.raises(UsageError, match="strength must be"):
            Request("a star", 1, image=halves(), strength=strength)


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 49])
def test_a_strength_that_draws_nothing_is_refused_with_the_least(steps):
    with pytest.raises(UsageError, match=f"none of {steps} steps") as refused:
        Request("a star", 1, image=halves(), strength=0.9 / steps, steps=steps)
    least = float(refused.value.hint.removeprefix("give a strength of ").split()[0])
    request = Request("a star", 1, image=halves(), strength=least, steps=steps)
    assert request.first_step == steps - 1
