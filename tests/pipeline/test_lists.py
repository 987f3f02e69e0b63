"""Lists of prompts and of seeds: diffusers' pictures, in as few calls of the engines as they fit into."""

from __future__ import annotations

from collections import Counter

import factories
import numpy as np
import pytest
import torch
from diffusers_reference import FLOOR, reference

from lcm_compile import BuildSpec, build, load
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import MOST_IMAGES

PROMPTS = ["a large red star on white", "a small blue ring", "two green crosses on a striped wall"]
NEGATIVES = ["blue", "a dark wall", "stripes, and a ring"]
SIDE = 32


@pytest.fixture(scope="module")
def bundles(sdxl_checkpoint, sd15_checkpoint, tmp_path_factory):
    """By name: a checkpoint and its bundle. The batches divide none of the tests' numbers of pictures."""
    folder = tmp_path_factory.mktemp("lists")
    full = factories.write_sd15(folder / "full base", factor=4, time_cond_proj_dim=16)
    made = {}

    def made_once(name):
        base, batch, backend = {
            "sdxl": (sdxl_checkpoint, 2, "torchscript"),
            "sd15": (sd15_checkpoint, 4, "torchscript"),
            "alone": (sd15_checkpoint, 1, "torchscript"),
            "full": (full, 2, "torchscript"),
            "one graph": (sdxl_checkpoint, 2, "torchscript"),
        }[name]
        if name not in made:
            spec = BuildSpec(
                str(base),
                no_lcm=True,
                few_step="lcm",
                height=SIDE,
                width=SIDE,
                batch=batch,
                backend=backend,
                whole_loop=name == "one graph",
            )
            made[name] = build(spec, folder / name), reference(base)
        return made[name]

    return made_once


@pytest.fixture
def open_pair(bundles):
    """Opens a bundle, and gives its pipeline, diffusers' and a count of its engines' calls."""
    opened = []

    def open_one(name):
        bundle, theirs = bundles(name)
        ours, calls = load(bundle), Counter()
        opened.append(ours)
        for runner in ours.runners.values():
            runner.__class__ = counted(type(runner), calls)
        return ours, theirs, calls

    yield open_one
    for pipeline in opened:
        pipeline.close()


def counted(kind, calls):
    """A class of runners whose calls are counted by stage."""

    class Counted(kind):
        def __call__(self, inputs):
            calls[self.contract.name] += 1
            return super().__call__(inputs)

    return Counted


def generators(seeds):
    """diffusers' generators: one, or a list of them."""
    if isinstance(seeds, int):
        return torch.Generator("cpu").manual_seed(seeds)
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def assert_diffusers_draws(images, theirs, prompt, seed, num_images=1, guidance_scale=1.0, **options):
    expected = theirs(
        prompt,
        num_inference_steps=4,
        num_images_per_prompt=num_images,
        guidance_scale=guidance_scale,
        generator=generators(seed),
        height=SIDE,
        width=SIDE,
        output_type="np",
        **options,
    ).images
    assert len(images) == len(expected)
    assert len({image.tobytes() for image in images}) == len(images)
    for image, picture in zip(images, eight_bits(expected), strict=True):
        assert psnr_db(np.asarray(image), picture) >= FLOOR


@pytest.mark.parametrize("name", ["sdxl", "sd15", "alone", "full", "one graph"])
@pytest.mark.parametrize("seed", [7, [7, 2**40 + 3, 7]])
def test_prompts_are_those_of_diffusers(open_pair, name, seed):
    ours, theirs, calls = open_pair(name)
    images = ours(PROMPTS, seed=seed, guidance_scale=1.0)
    assert_diffusers_draws(images, theirs, PROMPTS, seed)
    batches = -(-3 // ours.settings.shape.batch)
    if name == "one graph":
        assert calls == {"draw": batches}
    else:
        assert calls == {"encode": batches, "context": batches, "step": 4 * batches, "decode": batches}


@pytest.mark.parametrize("name", ["sdxl", "sd15", "alone"])
@pytest.mark.parametrize("negative", [None, "", "blue", NEGATIVES], ids=["none", "empty", "one", "list"])
def test_guided_prompts_are_those_of_diffusers(open_pair, name, negative):
    ours, theirs, calls = open_pair(name)
    images = ours(PROMPTS, seed=3, guidance_scale=1.5, negative_prompt=negative)
    listed = [negative] * 3 if isinstance(negative, str) else negative  # as SD1.5 wants it
    assert_diffusers_draws(images, theirs, PROMPTS, 3, guidance_scale=1.5, negative_prompt=listed)
    batches = -(-3 // ours.settings.shape.batch)
    zeros = negative is None and name == "sdxl"
    encoded = batches if negative == NEGATIVES else 0 if zeros else 1
    assert calls["encode"] == batches + encoded and calls["step"] == 8 * batches


def test_a_prompt_may_be_the_negative_of_the_next(open_pair):
    ours, theirs, calls = open_pair("alone")
    pairs = {"prompt": ["a star", "a ring", "a ring"], "negative_prompt": ["a ring", "a star", "a ring"]}
    images = ours(seed=3, guidance_scale=1.5, **pairs)
    assert_diffusers_draws(images, theirs, seed=3, guidance_scale=1.5, **pairs)
    assert calls["encode"] == 2


@pytest.mark.parametrize("name", ["sdxl", "sd15", "one graph"])
@pytest.mark.parametrize("seed", [5, [5, 6, 7, 8, 9, 4]])
def test_several_pictures_of_each_prompt(open_pair, name, seed):
    ours, theirs, calls = open_pair(name)
    images = ours(tuple(PROMPTS), seed=seed, num_images=2)
    assert_diffusers_draws(images, theirs, PROMPTS, seed, num_images=2)
    assert calls["draw" if name == "one graph" else "decode"] == {2: 3, 4: 2}[ours.settings.shape.batch]


@pytest.mark.parametrize("name", ["sdxl", "sd15", "alone", "one graph"])
def test_seeds_draw_what_each_draws_alone(open_pair, name):
    ours, theirs, calls = open_pair(name)
    seeds = [1, 2**64 - 1, 0]
    images = ours("a red star", seed=seeds)
    batches = -(-3 // ours.settings.shape.batch)
    assert calls["draw" if name == "one graph" else "decode"] == batches
    assert calls["encode"] == (name != "one graph")
    assert [image.tobytes() for image in images] == [
        ours("a red star", seed=seed)[0].tobytes() for seed in seeds
    ]
    assert_diffusers_draws(images, theirs, ["a red star"] * 3, seeds)


@pytest.mark.parametrize("name", ["sdxl", "sd15", "one graph"])
def test_each_picture_of_a_list_can_be_drawn_alone(open_pair, name):
    ours, _, _ = open_pair(name)
    images = ours(PROMPTS, seed=7, num_images=2)
    for i, image in enumerate(images):
        [alone] = ours(PROMPTS, seed=7, num_images=2, index=i)
        assert alone.tobytes() == image.tobytes()
        # Which prompts the others had does not matter.
        [alone] = ours(PROMPTS[i // 2], seed=7, num_images=6, index=i)
        assert alone.tobytes() == image.tobytes()


@pytest.mark.parametrize("name", ["sdxl", "one graph"])
def test_requests_of_any_kind_share_calls_of_the_engines(open_pair, name):
    ours, _, calls = open_pair(name)
    requests = [
        Request("a star", 3, num_images=2),
        Request("a ring", 3, num_images=4, index=3),
        Request("a cross", 9),
        Request("a star", 9),
    ]
    shown, reported = [], []
    drawing = ours.draw(requests, lambda *passes: reported.append(passes), shown.append)
    assert calls["draw" if name == "one graph" else "decode"] == 3
    assert reported[-1][0] == reported[-1][1]
    assert [len(pictures) for pictures in shown] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(shown), drawing.pictures)
    alone = [ours.draw(request).pictures for request in requests]
    np.testing.assert_array_equal(np.concatenate(alone), drawing.pictures)


def test_prompts_of_a_list_that_are_drawn_again_are_not_encoded_again(open_pair):
    ours, _, calls = open_pair("sdxl")
    ours(PROMPTS, seed=1, guidance_scale=1.5, negative_prompt=NEGATIVES)
    encoded, context = calls["encode"], calls["context"]
    ours(PROMPTS, seed=2, guidance_scale=1.5, negative_prompt=NEGATIVES)
    assert (calls["encode"], calls["context"]) == (encoded, context)


def test_the_longest_cut_of_a_list_is_told(open_pair):
    ours, _, _ = open_pair("sdxl")
    long = ["red star " * 37 + end for end in ("blue circle", "blue circle on white", "")]
    assert ours.draw([Request(prompt, 1) for prompt in long]).cut == "circle on white"


def test_numbers_of_other_libraries_are_seeds(open_pair):
    ours, _, _ = open_pair("sd15")
    first = [image.tobytes() for image in ours("a star", seed=[1, 2])]
    for seeds in ((1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), 2]):
        assert [image.tobytes() for image in ours("a star", seed=seeds)] == first
    assert len(ours("a star", seed=[1, 2], num_images=2)) == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": []}, "a list of prompts must have from 1 to 10000, not 0"),
        ({"prompt": ["a", 7]}, "the list's prompt 1 must be text, a str, not 7 (int)"),
        ({"prompt": [["a"], "b"]}, "the list's prompt 0 must be text"),
        ({"prompt": ["a", "gr\udcf6"]}, "the list's prompt 1 is not Unicode text"),
        ({"prompt": {"a"}}, "the prompt must be text, a str"),
        ({"prompt": ["a"] * 3, "num_images": MOST_IMAGES // 2}, "from 1 to 10000, not 15000"),
        ({"prompt": ["a"] * 2, "num_images": 0}, "from 1 to 10000, not 0"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "1 negative prompts for 2 prompts"),
        ({"prompt": ["a", "b"], "negative_prompt": []}, "a list of negative prompts must have"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c", None]}, "the list's negative prompt 1 must be text"),
        ({"negative_prompt": ["c"]}, "the negative prompt must be text"),
        ({"seed": []}, "a list of seeds must have from 1 to 10000, not 0"),
        ({"seed": range(2**40)}, "a list of seeds must have from 1 to 10000"),
        ({"seed": [1, 2, 1]}, "seed 1 is given 2 times"),
        ({"seed": [1, -1]}, "seed must be from 0 to 2⁶⁴ − 1, not -1"),
        ({"seed": [1, 2**64]}, "seed must be from 0"),
        ({"seed": [1, 2.0]}, "seed must be a whole number, not 2.0"),
        ({"seed": [[1, 2]]}, "seed must be a whole number, not [1, 2]"),
        ({"seed": [1, None]}, "seed must be a whole number, not None"),
        ({"seed": "1,2"}, "seed must be a whole number, not '1,2'"),
        ({"seed": [1, 2, 3], "num_images": 2}, "3 seeds for 2 pictures"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "3 seeds for 2 pictures"),
        ({"prompt": ["a", "b"], "seed": [1, 2], "num_images": 2}, "2 seeds for 4 pictures"),
        ({"seed": [1, 2], "index": 1}, "takes no index"),
        ({"prompt": ["a", "b"], "index": 2}, "picture 2 is not one of 0 to 1"),
        ({"prompt": ["a", "b"], "index": 1.0}, "must be a whole number"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_drawn(open_pair, given, told):
    ours, _, calls = open_pair("sdxl")
    with pytest.raises(UsageError) as caught:
        ours(**{"prompt": "a star", "seed": 7, **given})
    assert told in caught.value.message and not calls


@pytest.mark.parametrize(
    ("requests", "told"),
    [
        ([], "there is no request"),
        ([Request("a", 1), Request("a", 2, steps=5)], "the same number of steps, not "),
        ([Request("a", 1), Request("a", 2, guidance_scale=1.5)], "the same guidance scale"),
        ([Request("a", 1), Request("a", 2, sampler="euler")], "the same sampler"),
        ([Request("a", 1), Request("a", 2, "b")], "all have a negative prompt, or none"),
        ([Request("a", 1, num_images=MOST_IMAGES), Request("a", 2)], "from 1 to 10000, not 10001"),
    ],
)
def test_requests_that_can_not_share_a_drawing(open_pair, requests, told):
    ours, _, calls = open_pair("sdxl")
    with pytest.raises(UsageError) as caught:
        ours.draw(requests)
    assert told in caught.value.message and not calls
