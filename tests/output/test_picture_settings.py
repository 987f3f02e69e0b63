"""A picture's file holds all that draws the picture again, and other programs read it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lcm_compile import load
from lcm_compile.output.images import save_picture
from lcm_compile.output.picture_settings import Origin, parameters, read_origin
from lcm_compile.pipeline.request import Request

ODD = "a large red star, größer 赤い 🦀\nNegative prompt: none\nSteps: 3, Seed: 9\n\x01 <&\"'> end "
ORIGIN = Origin(
    Request(ODD, 7, "a 'blue' ring: {x}", 4, 1.23456789, 4, 2),
    "ef77390324480be4",
    'a, "b": c',
    "lcm-compile 1",
)


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_each_of_several_pictures_is_drawn_again(command, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        command("run", "a star", "--bundle", pairs, "--num-images", 5, "--seed", 3, "--out", "five")[0] == 0
    )
    for index in (0, 3, 4):
        code, out, err = command("run", "--again", f"five/00{index}.png")
        assert (code, out) == (0, f"00{index}-again.png\n"), err
        np.testing.assert_array_equal(pixels(f"00{index}-again.png"), pixels(f"five/00{index}.png"))
        # And again from the second, which tells of the same picture.
        command("run", "--again", f"00{index}-again.png", "--out", "b.png")
        np.testing.assert_array_equal(pixels("b.png"), pixels(f"five/00{index}.png"))


def test_a_picture_of_several_is_that_of_the_request(sdxl_bundle):
    with load(sdxl_bundle) as pipeline:
        asked = Request("a star", 3, num_images=3)
        shown = []
        drawn = pipeline.draw(asked, show=shown.append).pictures
        np.testing.assert_array_equal(np.concatenate(shown), drawn)
        assert [len(pictures) for pictures in shown] == [1, 1, 1]
        for index in range(3):
            np.testing.assert_array_equal(pipeline.draw(replace(asked, index=index)).pictures, drawn[[index]])


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("negative", [None, "", "blue"])
def test_no_negative_prompt_is_not_an_empty_one(command, sdxl_bundle, tmp_path, ending, negative):
    first, second, plain = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}", tmp_path / "c.png"
    words = () if negative is None else ("--negative-prompt", negative)
    scale = ("--guidance-scale", 1.23456789)
    command("run", ODD, "--bundle", sdxl_bundle, *scale, *words, "--seed", 5, "--out", first)
    code, out, _ = command("run", "--again", first, "--bundle", sdxl_bundle, "--out", second)
    assert (code, out) == (0, f"{second}\n")
    np.testing.assert_array_equal(pixels(first), pixels(second))
    assert read_origin(first) == read_origin(second)
    assert read_origin(first).request == Request(ODD, 5, negative, guidance_scale=1.23456789, index=0)
    command("run", "--again", first, "--bundle", sdxl_bundle, "--negative-prompt", "red", "--out", plain)
    assert read_origin(plain).request.negative_prompt == "red" and (pixels(plain) != pixels(first)).any()


def test_again_with_another_seed_and_bundle(command, pairs, sdxl_bundle, tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    command("run", "a star", "--bundle", pairs, "--seed", 5, "--out", first)
    code, _, err = command("run", "--again", first, "--bundle", sdxl_bundle, "--seed", 6, "--out", second)
    assert code == 0 and f"another bundle drew {first}" in err
    assert (read_origin(second).request.seed, read_origin(second).request.prompt) == (6, "a star")


@pytest.mark.parametrize("words", [["--stdin"], ["--grid", "steps=1"], ["--num-images", "2"]])
def test_again_draws_one_picture(refused, tmp_path, words):
    refused(2, ["--again", words[0]], "run", "--again", tmp_path / "a.png", *words)


def test_files_that_tell_no_settings(refused, command, sdxl_bundle, tmp_path):
    picture = Image.new("RGB", (8, 8))
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "plain.jpg")
    (tmp_path / "text.png").write_text("a star")
    (tmp_path / "folder.png").mkdir()
    for name, told in {
        "plain.png": "does not hold the settings",
        "plain.jpg": "does not hold the settings",
        "text.png": "can't be read as a picture",
        "missing.png": "No such file",
        "folder.png": "Is a directory",
    }.items():
        refused(1, [tmp_path / name, told], "run", "--again", tmp_path / name)
    good = asdict(ORIGIN)
    for settings, told in [
        ("[1]", "can't be read"),
        ("{broken", "can't be read"),
        ("[" * 100_000, "can't be read"),
        (json.dumps({**good, "request": {**good["request"], "seed": 7.5}}), "request.seed is of type float"),
        (json.dumps({**good, "request": {**good["request"], "index": 4}}), "picture 4 is not one of 0 to 3"),
        (json.dumps({"grid": "steps=1..2"}), "is a sheet of many pictures"),
        (json.dumps(good), ["not on this machine", "--bundle"]),
    ]:
        info = PngImagePlugin.PngInfo()
        info.add_text("lcm-compile", settings)
        picture.save(tmp_path / "odd.png", pnginfo=info)
        refused(1, told, "run", "--again", tmp_path / "odd.png")


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_all_settings_come_back(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    save_picture(Image.new("RGB", (96, 64)), path, asdict(ORIGIN), parameters(ORIGIN, 96, 64))
    assert read_origin(path) == ORIGIN


def test_a_jpeg_has_no_room_for_a_long_prompt(capsys, tmp_path):
    origin = replace(ORIGIN, request=Request("star " * 20_000, 7))
    for name in ("a.jpg", "a.webp", "a.png"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / name, asdict(origin), parameters(origin, 8, 8))
    assert "a.jpg holds no settings" in capsys.readouterr().err
    assert read_origin(tmp_path / "a.webp") == read_origin(tmp_path / "a.png") == origin


def text_of(path):
    """The text where A1111's web UI has it: in a PNG, or in EXIF's UserComment in UTF-16."""
    with Image.open(path) as picture:
        if picture.format == "PNG":
            assert "prompt" not in picture.info, "with that, readers take the picture for ComfyUI's"
            return picture.info["parameters"]
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def read_as_the_web_ui(text):
    """Prompt, negative prompt and values, by the rules of parse_generation_parameters in A1111's web UI."""
    prompt, negative, in_negative = "", "", False
    *lines, last = text.strip().split("\n")
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line[16:].strip()
        if in_negative:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    return prompt, negative, dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))


OPENED = []  # sd-parsers 0.6 remembers pictures by their addresses, which must not be used again


def read_by_sd_parsers(path):
    parsers = pytest.importorskip("sd_parsers")
    OPENED.append(Image.open(path))
    found = parsers.ParserManager().parse(OPENED[-1])
    (sampler,) = found.samplers
    texts = [[prompt.value for prompt in prompts] for prompts in (sampler.prompts, sampler.negative_prompts)]
    told = sampler.parameters
    values = {"Sampler": sampler.name, "Steps": told["steps"], "Seed": told["seed"]}
    values |= {"CFG scale": told["cfg_scale"], "Model": sampler.model.name, **found.metadata}
    return *("".join(text) for text in texts), values


def read_by_sd_prompt_reader(path):
    reader = pytest.importorskip("sd_prompt_reader.image_data_reader")
    with path.open("rb") as file:
        found = reader.ImageDataReader(file)
    assert found.status.name == "READ_SUCCESS"
    told = found.parameter
    values = {"Sampler": told["sampler"], "Steps": told["steps"], "Seed": told["seed"]}
    values |= {"CFG scale": told["cfg"], "Model": told["model"], "Size": told["size"]}
    return found.positive, found.negative, values


# Three programs: the web UI's rules, and two readers that are used where they are installed.
READERS = [
    lambda path: read_as_the_web_ui(text_of(path)),
    read_by_sd_parsers,
    read_by_sd_prompt_reader,
]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("read", READERS, ids=["web ui", "sd-parsers", "sd-prompt-reader"])
@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("a red star", None),
        ("a red star, 赤い: {large|small} (big:1.2) <lora:x:1>", 'blue, ugly: "bad"'),
        ("{red|blue} star", ""),
        ("a star\nof two lines", "no ring\nno cross"),
        ("a star. Negative prompt: none", "Negative prompt: a"),
        ("a\0star", "no\0ring"),
        ("a star\nSteps: 30, Sampler: Euler, Seed: 1, CFG scale: 7", None),
    ],
)
def test_other_programs_read_the_settings(tmp_path, read, ending, prompt, negative):
    path = tmp_path / f"a.{ending}"
    origin = replace(ORIGIN, request=Request(prompt, 2**64 - 1, negative, 3, 1.5))
    save_picture(Image.new("RGB", (96, 64)), path, asdict(origin), parameters(origin, 96, 64))
    positive, other, values = read(path)
    shown = [
        re.sub("(Negative prompt|^Steps):", r"\1", text or "", flags=re.MULTILINE).replace("\0", " ")
        for text in (prompt, negative)
    ]
    assert [positive, other] == shown
    told = {"Sampler": "LCM", "Steps": "3", "Seed": str(2**64 - 1), "CFG scale": "1.5", "Size": "96x64"}
    assert {**told, "Model": "a b c"}.items() <= values.items()
