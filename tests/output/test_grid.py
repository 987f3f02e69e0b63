"""`run --grid`: the pictures on a sheet are those that `run` draws one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from lcm_compile.errors import UsageError
from lcm_compile.output.grid import parse_grid, requests
from lcm_compile.output.sheet import grid_sheet
from lcm_compile.pipeline.request import Request

GAP, SHOWN = 10, 128  # between pictures, and a picture of 64×64 at twice its size


def cell(sheet: Image.Image, from_right: int, from_bottom: int) -> np.ndarray:
    """A picture of a sheet at its own 64×64 pixels, counted from the last one."""
    right = sheet.width - GAP - from_right * (SHOWN + GAP)
    bottom = sheet.height - GAP - from_bottom * (SHOWN + GAP)
    return np.asarray(sheet.convert("RGB"))[bottom - SHOWN : bottom : 2, right - SHOWN : right : 2]


def test_a_cell_is_the_picture_of_its_settings(command, sdxl_bundle, tmp_path):
    sheet, single = tmp_path / "sheet.png", tmp_path / "single.png"
    engine = ("--engine", sdxl_bundle)
    code, out, _ = command(
        *("run", "a red star", *engine, "--grid", "steps=1..2,seed=3,5,guidance=1,1.5", "--out", sheet)
    )
    assert (code, out.strip()) == (0, str(sheet))
    drawn = Image.open(sheet)
    # Across: the first axis. Down: every combination of the others, the last one changing fastest.
    for at, (steps, seed, guidance) in {
        (0, 0): (2, 5, 1.5),
        (1, 0): (1, 5, 1.5),
        (0, 1): (2, 5, 1),
        (0, 2): (2, 3, 1.5),
        (1, 3): (1, 3, 1),
    }.items():
        settings = ("--steps", steps, "--seed", seed, "--guidance-scale", guidance)
        command("run", "a red star", *engine, *settings, "--out", single)
        assert np.array_equal(cell(drawn, *at), np.asarray(Image.open(single))), (at, settings)


def test_prompts_come_from_a_file(command, sdxl_bundle, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\n\n  a blue circle on white \n", encoding="utf-8-sig")
    out = tmp_path / "sheet.png"
    grid = f"seed=1..3,prompt={tmp_path / 'prompts.txt'}"
    code, stdout, _ = command("run", "--engine", sdxl_bundle, "--grid", grid, "--out", out, "--json")
    data = json.loads(stdout)
    assert (code, data["sheet"], data["engine"]) == (0, str(out), str(sdxl_bundle))
    assert [(p["prompt"], p["seed"]) for p in data["pictures"]] == [
        *(("a red star", seed) for seed in (1, 2, 3)),
        *(("a blue circle on white", seed) for seed in (1, 2, 3)),
    ]
    assert all(p["ms"]["total"] > 0 and p["steps"] == 4 for p in data["pictures"])
    command(
        "run", "a blue circle on white", "--engine", sdxl_bundle, "--seed", 2, "--out", tmp_path / "b.png"
    )
    assert np.array_equal(cell(Image.open(out), 1, 0), np.asarray(Image.open(tmp_path / "b.png")))
    told = json.loads(Image.open(out).text["lcm-compile"])
    assert (told["grid"], told["request"]["steps"]) == (grid, 4)
    assert not {"seed", "prompt"} & set(told["request"]), "what varies has no single value"


def test_without_out_the_sheet_is_named_after_the_prompt(command, sdxl_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("run", "a Red star!", "--engine", sdxl_bundle, "--grid", "steps=1")
    assert [path.name for path in tmp_path.iterdir()] == ["a-red-star-grid.png"]


def test_every_combination_once_the_first_axis_across():
    fixed = Request("p", 7, "no", 4, 1.25)
    asked = requests(parse_grid("guidance=1,1.5,seed=0..1,steps=8,1"), fixed)
    assert [(r.guidance_scale, r.seed, r.steps) for r in asked] == [
        *((1.0, 0, 8), (1.5, 0, 8), (1.0, 0, 1), (1.5, 0, 1)),
        *((1.0, 1, 8), (1.5, 1, 8), (1.0, 1, 1), (1.5, 1, 1)),
    ]
    assert {(r.prompt, r.negative_prompt, r.num_images) for r in asked} == {("p", "no", 1)}


def ink(sheet: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    return np.asarray(sheet.crop(box).convert("L")) < 128


def test_every_row_and_column_has_its_own_label():
    pictures = [Image.new("RGB", (64, 64), "white")] * 6
    sheet = grid_sheet(pictures, (64, 64), ["steps 1", "steps 2", "steps 8"], ["seed 1", "seed 2"], "a star")
    left = sheet.width - 3 * (SHOWN + GAP)
    top = sheet.height - 2 * (SHOWN + GAP)
    over = [ink(sheet, (x, 30, x + SHOWN, top)) for x in (left, left + 138, left + 276)]
    beside = [ink(sheet, (0, y, left, y + SHOWN)) for y in (top, top + 138)]
    assert ink(sheet, (0, 0, sheet.width, 30)).any(), "no title"
    for labels in (over, beside):
        assert all(label.any() for label in labels)
        assert len({label.tobytes() for label in labels}) == len(labels)


def test_large_pictures_are_shrunk_to_a_sheet_one_can_open():
    one = Image.new("RGB", (1024, 768), "red")
    sheet = grid_sheet((one for _ in range(50)), (1024, 768), ["label"] * 50, [""], "")
    assert sheet.width < 9000
    assert grid_sheet([one], (1024, 768), ["label"], [""], "").width < 600


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("", "NAME=VALUES"),
        ("4", "NAME=VALUES"),
        ("x,steps=1", "NAME=VALUES"),
        ("steps=", "is no value of steps"),
        ("steps=1,,2", "is no value of steps"),
        ("steps=8..1", "is no value of steps"),
        ("steps=1.5", "is no value of steps"),
        ("steps=0..3", "steps must be from 1"),
        ("steps=1,51", "steps must be from 1"),
        ("seed=-1", "seed must be"),
        ("seed=0..99999999999999999999", "is no value of seed"),
        ("seed=0..2000", "is no value of seed"),
        ("seed=0..99,steps=1..50", "5000 pictures"),
        ("guidance=1..2", "is no value of guidance"),
        ("guidance=nan", "guidance scale must be"),
        ("guidance=1,guidance=2", "guidance twice"),
        ("guidence=1", "Did you mean 'guidance'"),
        ("prompt=missing.txt", "missing.txt can't be read"),
    ],
)
def test_bad_grids_are_usage_errors(refused, sdxl_bundle, tmp_path, monkeypatch, grid, told):
    monkeypatch.chdir(tmp_path)
    refused(2, told, "run", "--engine", sdxl_bundle, "--grid", grid)
    assert not list(tmp_path.iterdir())


def test_an_empty_prompt_file_is_an_error(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="holds no prompt"):
        parse_grid(f"prompt={tmp_path / 'prompts.txt'}")


@pytest.mark.parametrize(
    ("words", "grid", "told"),
    [
        (["--steps", 4], "steps=1..2", "--steps"),
        (["--seed", 4], "seed=1..2", "--seed"),
        (["--guidance-scale", 1], "guidance=1,2", "--guidance-scale"),
        (["a star"], "prompt=p.txt", "PROMPT"),
        (["--num-images", 2], "seed=1,2", "--num-images"),
    ],
)
def test_an_option_and_an_axis_for_the_same_thing(
    refused, sdxl_bundle, tmp_path, monkeypatch, words, grid, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a star")
    refused(2, [told, "--grid"], "run", *words, "--engine", sdxl_bundle, "--grid", grid)
