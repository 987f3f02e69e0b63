"""Second prompts and SDXL's sizes, against diffusers' pictures with the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers_reference import FLOOR, reference

from lcm_compile import BuildSpec, build, load
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db

PROMPT = "a large red star on white"
# Requests, in our names.
ASKED = {
    "sizes": {"original_size": (1024, 768), "crop": (256, 16), "target_size": (512, 640)},
    "one size": {"original_size": (333, 4096)},
    "a crop": {"crop": (0, 200)},
    "a second prompt": {"prompt_2": "a small blue circle"},
    "guided": {
        "prompt_2": "a small blue circle",
        "negative_prompt": "white background",
        "negative_prompt_2": "a red circle",
        "guidance_scale": 1.5,
        "target_size": (2048, 1024),
    },
    "without a negative prompt": {"guidance_scale": 1.5, "original_size": (64, 32), "crop": (9, 5)},
}
NAMES = {"crop": "crops_coords_top_left"}  # diffusers' names where they are others


@pytest.fixture(scope="module")
def theirs(sdxl_checkpoint):
    return reference(sdxl_checkpoint)


def build_sdxl(checkpoint, folder, **options):
    return build(
        BuildSpec(str(checkpoint), no_lcm=True, few_step="lcm", backend="torchscript", **options),
        folder / "bundle",
    )


@pytest.fixture(scope="module", params=[(), ("context", "lcm-step")], ids=["context", "no context"])
def ours(request, sdxl_checkpoint, tmp_path_factory):
    bundle = build_sdxl(sdxl_checkpoint, tmp_path_factory.mktemp("sizes"), without=request.param, batch=2)
    with load(bundle) as pipeline:
        pipeline.folder = bundle.folder
        yield pipeline


def picture(pipe, guidance_scale=1.0, **asked):
    images = pipe(
        PROMPT,
        **{NAMES.get(name, name): value for name, value in asked.items()},
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(7),
        height=64,
        width=64,
        output_type="np",
    ).images
    return eight_bits(images)[0]


@pytest.mark.parametrize("asked", ASKED)
def test_pictures_are_those_of_diffusers(ours, theirs, asked):
    expected, own = picture(theirs, **ASKED[asked]), ours.draw(Request(PROMPT, 7, **ASKED[asked])).pictures[0]
    assert psnr_db(expected, own) >= FLOOR
    scale = {"guidance_scale": ASKED[asked].get("guidance_scale", 1.0)}
    assert psnr_db(expected, ours.draw(Request(PROMPT, 7, **scale)).pictures[0]) < FLOOR


def test_the_picture_s_own_size_is_the_default(ours):
    given = {"original_size": [64, 64], "crop": (0, 0), "target_size": (np.int64(64), 64)}
    plain, told = ours(PROMPT, seed=7)[0], ours(PROMPT, seed=7, prompt_2=PROMPT, **given)[0]
    assert plain.tobytes() == told.tobytes()


def test_one_graph(sdxl_checkpoint, theirs, tmp_path):
    with load(build_sdxl(sdxl_checkpoint, tmp_path, whole_loop=True)) as pipeline:
        for asked in ("sizes", "a second prompt"):
            drawn = pipeline.draw(Request(PROMPT, 7, **ASKED[asked])).pictures[0]
            assert psnr_db(picture(theirs, **ASKED[asked]), drawn) >= FLOOR


def test_on_the_command_line(ours, command, refused, tmp_path):
    words = ["run", PROMPT, "--bundle", ours.folder, "--seed", 7, "--out", tmp_path / "a.png"]
    sizes = ["--original-size", "1024x768", "--crop", "256,16", "--target-size", "512x640"]
    second = ["--prompt-2", "a circle", "--negative-prompt", "", "--negative-prompt-2", "red"]
    code, _, err = command(*words, *sizes, *second, "--guidance-scale", 1.5)
    assert code == 0, err
    given = {"prompt_2": "a circle", "negative_prompt": "", "negative_prompt_2": "red", "guidance_scale": 1.5}
    expected = ours(PROMPT, seed=7, **ASKED["sizes"], **given)[0]
    from PIL import Image

    with Image.open(tmp_path / "a.png") as image:
        assert image.tobytes() == expected.tobytes()
        told = json.loads(image.info["lcm-compile"])["request"]
    assert told["original_size"] == [1024, 768] and told["negative_prompt_2"] == "red"
    again = ["run", "--bundle", ours.folder, "--again", tmp_path / "a.png", "--out", tmp_path / "b.png"]
    assert command(*again)[0] == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert command(*again, "--crop", "0,0")[0] == 0
    assert (tmp_path / "b.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    for option, value in (("--crop", "5"), ("--original-size", "1024"), ("--target-size", "-1x5")):
        refused(2, value, *words, option, value)
    refused(2, "original size must be from 1", *words, "--original-size", "0x64")


BAD = [
    {"original_size": (64,)},
    {"original_size": 64},
    {"original_size": "64x64"},
    {"original_size": (0, 64)},
    {"original_size": (64.0, 64)},
    {"target_size": (64, True)},
    {"target_size": (64, 10**9)},
    {"crop": (-1, 0)},
    {"prompt_2": 5},
    {"negative_prompt_2": "a", "negative_prompt": None},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_values_of_no_use(bad):
    with pytest.raises(UsageError) as refusal:
        Request("a", 0, **bad)
    assert next(iter(bad)).split("_")[0] in refusal.value.message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt-2", "a"], "one text encoder"),
        (["--negative-prompt", "a", "--negative-prompt-2", "a"], "one text encoder"),
        (["--original-size", "64x64"], "told no sizes"),
        (["--crop", "0,0"], "told no sizes"),
        (["--target-size", "64x64"], "told no sizes"),
    ],
)
def test_sd15_has_neither(sd15_bundle, refused, words, told):
    refused(2, told, "run", "a", "--bundle", sd15_bundle, *words)


@pytest.fixture(scope="module")
def sd15_bundle(sd15_checkpoint, tmp_path_factory):
    spec = BuildSpec(str(sd15_checkpoint), no_lcm=True, few_step="lcm", backend="torchscript")
    return build(spec, tmp_path_factory.mktemp("sd15") / "bundle").folder


def test_from_python_sd15_has_neither(sd15_bundle):
    with load(sd15_bundle) as pipeline:
        with pytest.raises(UsageError, match="one text encoder"):
            pipeline("a", prompt_2="b")
        with pytest.raises(UsageError, match="told no sizes"):
            pipeline("a", crop=(0, 0))
