"""build --image, and run --image, --strength and --mask: what they say, save, draw again and refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lcm_compile import BuildSpec, build, load
from lcm_compile.builder.estimate import estimate_plan
from lcm_compile.builder.plan import make_plan
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.errors import UsageError
from lcm_compile.output.picture_settings import read_origin
from lcm_compile.pipeline.request import Request


@pytest.fixture(scope="module")
def reader(sdxl_checkpoint, tmp_path_factory):
    """The folder of a bundle that reads pictures, for two at a time."""
    spec = BuildSpec(
        str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="torchscript", batch=2, image=True
    )
    return build(spec, tmp_path_factory.mktemp("reader") / "b").folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A picture and a mask of it in the current folder."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(2).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize((96, 80), Image.Resampling.BICUBIC).save("in.png")
    Image.fromarray(np.tile(np.asarray([0, 255], np.uint8).repeat(48), (80, 1))).save("mask.png")
    return tmp_path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_tells_what_it_began_at_and_is_drawn_again(command, refused, reader, files):
    words = ["a red star", "--bundle", reader, "--seed", 5]
    words += ["--image", "in.png", "--mask", "mask.png", "--strength", 0.5, "--out", "a.png"]
    code, out, err = command("run", *words, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["image"] == {
        "name": "in.png",
        "sha256": sha256(files / "in.png"),
        "alpha": False,
        "border": [],
    }
    assert told["mask"]["name"] == "mask.png" and told["strength"] == 0.5
    assert len(told["ms"]["step"]) == 2 and told["ms"]["encode-image"] > 0
    assert "Denoising strength: 0.5," in Image.open("a.png").text["parameters"]
    assert read_origin(files / "a.png").request.image.name == "in.png"

    again = "run", "--again", "a.png", "--out"
    assert command(*again, "b.png")[0] == 0
    assert (pixels("a.png") == pixels("b.png")).all()
    (files / "far").mkdir()
    shutil.move("a.png", "far/a.png")
    assert command("run", "--again", "far/a.png", "--out", "c.png")[0] == 0  # in.png is in the current folder
    assert command("run", "--again", "far/a.png", "--strength", 1, "--out", "c.png")[0] == 0
    assert (pixels("c.png") != pixels("b.png")).any()
    shutil.move("in.png", "other.png")
    refused(2, ["image in.png", "is not here", "--image"], "run", "--again", "far/a.png", "--out", "d.png")
    assert command("run", "--again", "far/a.png", "--image", "other.png", "--out", "d.png")[0] == 0
    assert (pixels("d.png") == pixels("b.png")).all()
    shutil.copy("mask.png", "in.png")
    refused(2, ["in.png", "SHA-256 differs"], "run", "--again", "far/a.png", "--out", "e.png")
    assert not (files / "e.png").exists()


def test_transparency_as_the_mask_is_drawn_again(command, refused, reader, files):
    image = Image.open("in.png")
    image.putalpha(Image.open("mask.png").point(lambda value: 255 - value))
    image.save("cut.png")
    words = ["run", "a red star", "--bundle", reader, "--seed", 5, "--image"]
    assert command(*words, "cut.png", "--mask", "alpha", "--out", "a.png")[0] == 0
    assert command("run", "--again", "a.png", "--out", "b.png")[0] == 0
    assert (pixels("a.png") == pixels("b.png")).all()
    assert command(*words, "cut.png", "--mask", "mask.png", "--out", "c.png")[0] == 0
    assert (pixels("a.png") == pixels("c.png")).all()
    refused(2, "in.png has none", *words, "in.png", "--mask", "alpha")


def test_what_is_around_a_picture_is_drawn(command, refused, reader, files):
    words = ["run", "a red star", "--bundle", reader, "--seed", 5, "--image", "in.png", "--out"]
    image = pixels("in.png").astype(np.uint8)
    canvas = np.pad(image, ((0, 16), (16, 0), (0, 0)), mode="edge")
    white = np.pad(np.zeros(image.shape[:2], np.uint8), ((0, 16), (16, 0)), constant_values=255)
    assert command(*words, "a.png", "--outpaint", "16,0,0,16", "--strength", 0.5)[0] == 0
    with load(reader) as pipeline:
        by_hand = {"image": Image.fromarray(canvas), "mask": Image.fromarray(white), "strength": 0.5}
        assert (pixels("a.png") == pipeline("a red star", seed=5, **by_hand)[0]).all()
        by_border = {"image": "in.png", "outpaint": (16, 0, 0, 16), "strength": 0.5}
        assert (pixels("a.png") == pipeline("a red star", seed=5, **by_border)[0]).all()
    assert command("run", "--again", "a.png", "--out", "b.png")[0] == 0
    assert (pixels("a.png") == pixels("b.png")).all()
    assert command("run", "--again", "a.png", "--outpaint", "8,8,8,8", "--out", "c.png")[0] == 0
    assert (pixels("c.png") != pixels("b.png")).any()
    shutil.copy("in.png", "other.png")
    assert command("run", "--again", "a.png", "--image", "other.png", "--out", "d.png")[0] == 0
    assert (pixels("d.png") == pixels("b.png")).all()
    refused(2, "would be lost", "run", "--again", "a.png", "--out", "in.png")
    refused(2, "is not LEFT,TOP,RIGHT,BOTTOM", *words, "e.png", "--outpaint", "16,0")
    refused(2, "four numbers", *words, "e.png", "--outpaint", "0,0,0,0")
    refused(2, "pixels", *words, "e.png", "--outpaint", "999999999,0,0,0")
    refused(2, "no mask", *words, "e.png", "--outpaint", "8,0,0,0", "--mask", "mask.png")
    refused(2, "takes an image", *words[:6], "--out", "e.png", "--outpaint", "8,0,0,0")


def test_what_a_picture_begins_at_is_never_lost(command, refused, reader, files):
    words = ["run", "a red star", "--bundle", reader, "--seed", 5]
    first = command(*words)[1].strip()
    before = sha256(files / first)
    refused(2, "would be lost", *words, "--image", first, "--out", first)
    second = command(*words, "--image", first)[1].strip()
    assert first != second and sha256(files / first) == before
    several = command(*words[:-1], "5,6", "--image", first)[1].split()
    assert first not in several and several[0] == second
    assert len(command(*words, "--image", first, "--num-images", 3, "--out", "all")[1].split()) == 3
    grid = "--image", first, "--grid", "steps=2,4,strength=0.5,1", "--out", "sheet.png"
    refused(2, "would be lost", *words, *grid[:-1], first)
    told = json.loads(command(*words, *grid, "--json")[1])
    shown = [(one["steps"], one["strength"], len(one["ms"]["step"])) for one in told["pictures"]]
    assert shown == [(2, 0.5, 1), (4, 0.5, 2), (2, 1, 2), (4, 1, 4)]


def test_what_can_not_be_drawn_is_refused(command, refused, reader, sdxl_bundle, files):
    words = ["run", "a red star", "--bundle", reader, "--out", "a.png"]
    refused(2, ["strength of 0.2", "none of 4 steps", "0.25"], *words, "--image", "in.png", "--strength", 0.2)
    refused(2, "without the image", *words, "--strength", 0.2)
    refused(2, "without the image", *words, "--mask", "mask.png")
    refused(2, "missing.png can't be read", *words, "--image", "missing.png")
    refused(2, "strength must be from 0 to 1", *words, "--image", "in.png", "--strength", 2)
    words[3] = sdxl_bundle
    base = read_manifest(sdxl_bundle)[0].spec.base
    err = refused(2, "no stage that encodes an image", *words, "--image", "in.png")
    assert f"lcm-compile build --base {base}" in err and "--image" in err.partition("build --base")[2]
    refused(2, "exclude each other", "build", "--base", base, "--gpu", "cpu", "--image", "--whole-loop")
    assert not (files / "a.png").exists()
    with load(sdxl_bundle) as pipeline, pytest.raises(UsageError, match="no stage"):
        pipeline("a red star", image="in.png", strength=0.5)


def test_pictures_of_several_seeds_and_prompts_are_those_drawn_alone(reader, files):
    asked = {"image": files / "in.png", "strength": 0.75}
    with load(reader) as pipeline:
        several = pipeline("a red star", seed=[3, 4, 5], **asked)
        for seed, picture in zip([3, 4, 5], several, strict=True):
            assert (np.asarray(picture) == np.asarray(pipeline("a red star", seed=seed, **asked)[0])).all()
        both = pipeline(["a red star", "a blue circle"], seed=[3, 4], **asked)
        alone = pipeline("a blue circle", seed=4, **asked)[0]
        assert (np.asarray(both[1]) == np.asarray(alone)).all()
        other = Image.open(files / "mask.png")
        requests = [Request("a red star", 3, image=one, strength=0.75) for one in (asked["image"], other)]
        pictures = pipeline.draw(requests).pictures
        assert (pictures[0] == np.asarray(several[0])).all() and (pictures[1] != pictures[0]).any()
        plain = Request("a red star", 3)
        with pytest.raises(UsageError, match="all have an image, or none"):
            pipeline.draw([plain, replace(requests[0], strength=None)])
        newer = Request("a red star", 3, image=Image.open(files / "in.png").rotate(90))
        for asked_now, encoded in ((newer, 1), (newer, 0), (replace(newer, seed=4), 0), (requests[0], 0)):
            progress = list(pipeline.progress(asked_now))
            assert progress[-1] == (len(progress), len(progress))
            assert len(progress) == 6 + encoded


def test_the_stage_is_proven_and_shown(command, reader):
    _, out, _ = command("verify", reader, "--json")
    assert json.loads(out)["parity"]["encode-image"]["db"] >= 80
    _, out, _ = command("inspect", reader, "--json")
    assert [stage["name"] for stage in json.loads(out)["stages"]][-1] == "encode-image"
    manifest = read_manifest(reader)[0]
    assert manifest.key["pictures"] == "encoded" and "--image" in manifest.spec.command()


def test_only_a_bundle_that_reads_pictures_has_another_key(sdxl_checkpoint):
    spec = BuildSpec(str(sdxl_checkpoint), no_lcm=True, backend="torchscript")
    plain, reading = (make_plan(one) for one in (spec, BuildSpec(**{**vars(spec), "image": True})))
    assert not any("image" in name or "picture" in name for name in plain.key)
    assert {*reading.key} - {*plain.key} == {"pictures", "precision of encode-image"}
    assert estimate_plan(reading).bundle_bytes > estimate_plan(plain).bundle_bytes
