"""Several seeds, and one of several pictures, as people type them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcm_compile.output.picture_settings import read_origin
from lcm_compile.pipeline.request import Request


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_each_seed_draws_the_picture_that_it_draws_alone(command, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("run", "a star", "--bundle", pairs)
    code, out, _ = command(*words, "--seed", "5,2..3")
    assert (code, out.split()) == (0, ["a-star-5.png", "a-star-2.png", "a-star-3.png"])
    for seed in (5, 2, 3):
        assert command(*words, "--seed", seed, "--out", "alone.png")[0] == 0
        np.testing.assert_array_equal(pixels(f"a-star-{seed}.png"), pixels("alone.png"))
        assert read_origin(Path(f"a-star-{seed}.png")) == read_origin(Path("alone.png"))
        assert command("run", "--again", f"a-star-{seed}.png", "--out", "again.png")[0] == 0
        np.testing.assert_array_equal(pixels("again.png"), pixels("alone.png"))


def test_json_and_a_folder(command, sdxl_bundle, tmp_path):
    words = ("run", "a star", "--bundle", sdxl_bundle, "--steps", 1, "--out", tmp_path / "new")
    code, out, err = command(*words, "--seed", "1, 18446744073709551615", "--num-images", 2, "--json")
    data = json.loads(out)
    assert (code, err) == (0, "") and data["prompt"] == "a star"
    assert [(image["seed"], image["index"]) for image in data["images"]] == [(1, 0), (2**64 - 1, 0)]
    paths = [Path(image["path"]) for image in data["images"]]
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)
    assert [read_origin(path).request for path in paths] == [
        Request("a star", seed, steps=1, index=0) for seed in (1, 2**64 - 1)
    ]


def test_one_of_several_pictures_alone(command, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("run", "a star", "--bundle", pairs, "--seed", 4, "--num-images", 4)
    assert command(*words, "--out", "four")[0] == 0
    for index in (0, 1, 2):
        code, out, _ = command(*words, "--index", index, "--json")
        [image] = json.loads(out)["images"]
        assert code == 0 and image == {"path": f"a-star-4-00{index}.png", "seed": 4, "index": index}
        np.testing.assert_array_equal(pixels(image["path"]), pixels(f"four/00{index}.png"))
        assert read_origin(Path(image["path"])) == read_origin(Path(f"four/00{index}.png"))
    assert command("run", "--again", "four/000.png", "--index", 3, "--out", "three.png")[0] == 0
    np.testing.assert_array_equal(pixels("three.png"), pixels("four/003.png"))


def test_each_line_of_stdin_with_each_seed(sdxl_bundle, tmp_path):
    words = [sys.executable, "-m", "lcm_compile", "run", "--stdin", "--bundle", sdxl_bundle, "--steps", "1"]
    lines = "a star\na ring\na star\n"

    def run(*options):
        done = subprocess.run([*words, *options], input=lines, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    drawn = run("--seed", "1..2", "--json")
    assert [(one["prompt"], [image["path"] for image in one["images"]]) for one in drawn] == [
        ("a star", ["a-star-1.png", "a-star-2.png"]),
        ("a ring", ["a-ring-1.png", "a-ring-2.png"]),
        ("a star", ["a-star-1-2.png", "a-star-2-2.png"]),
    ]
    np.testing.assert_array_equal(pixels(tmp_path / "a-star-2.png"), pixels(tmp_path / "a-star-2-2.png"))
    alone = run("--seed", "1", "--num-images", "3", "--index", "1", "--json", "--out", ".")
    assert [one["images"][0]["path"] for one in alone] == [
        "a-star-1-001.png",
        "a-ring-1-001.png",
        "a-star-1-2-001.png",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--seed", "1,1"), "seed 1 is given 2 times"),
        (("--seed", "1,two"), "'two' is not a valid integer, nor a range such as 1..8"),
        (("--seed", "1,"), "'' is not a valid integer"),
        (("--seed", ""), "'' is not a valid integer"),
        (("--seed", "8..1"), "'8..1' is not a valid integer"),
        (("--seed", "0..99999999999"), "is not a valid integer"),
        (("--seed", "1..9000,10000..19999"), "a list of seeds must have from 1 to 10000, not 19000"),
        (("--seed", "3,-1"), "seed must be from 0"),
        (("--seed", f"3,{2**64}"), "seed must be from 0"),
        (("--seed", "1,2,3", "--num-images", 2), "3 seeds for 2 pictures"),
        (("--seed", "1,2", "--index", 0), "takes no index"),
        (("--seed", "1,2", "--out", "star.png"), "2 pictures need a folder"),
        (("--index", 1), ["picture 1 is not one of 0 to 0", "number of images"]),
        (("--num-images", 4, "--index", 4), "picture 4 is not one of 0 to 3"),
        (("--num-images", 4, "--index", -1), "picture -1 is not one of 0 to 3"),
        (("--grid", "steps=1..2", "--seed", "1,2"), "--grid steps=1..2,seed=1,2"),
        (("--grid", "seed=1..2", "--seed", "1,2"), "--seed and --grid"),
        (("--grid", "steps=1..2", "--index", 0), "--index and --grid"),
    ],
)
def test_what_is_wrong_is_told(refused, sdxl_bundle, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    refused(2, told, "run", "a star", "--bundle", sdxl_bundle, *words)
    assert list(tmp_path.iterdir()) == []


def test_again_is_of_one_seed(refused, tmp_path):
    refused(2, "one --seed", "run", "--again", tmp_path / "a.png", "--seed", "1,2")
