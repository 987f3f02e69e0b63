"""The demo world: pictures, captions, and the judge that reads pictures back."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from lcm_compile.demo import world
from lcm_compile.demo.judge import COLUMNS, judge, matches, score
from lcm_compile.demo.world import (
    Description,
    Placement,
    Scene,
    Thing,
    caption,
    parse_caption,
    render,
    sample_scene,
)


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def single(
    colour: str = "red", shape: str = "circle", pattern: str = "plain", background: str = "white"
) -> Scene:
    words = Description((Thing(colour, shape, "large"),), pattern, background)
    return Scene(words, (Placement(0.5, 0.5, 0.3, 0.1),))


def test_captions_are_worded_exactly() -> None:
    one = Description((Thing("red", "star", "large"),), "striped", "pink")
    assert one.caption == "a large red star on a striped pink background"
    two = Description((Thing("blue", "ring"), Thing("red", "ring")), "plain", "black", zebra=True)
    assert two.caption == "a blue ring and a red ring on a plain black background, in zebra style"


def test_captions_are_read_back() -> None:
    for scene in scenes(200):
        assert parse_caption(caption(scene)) == scene.description
        styled = replace(scene.description, zebra=True)
        assert parse_caption(styled.caption) == styled


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a red circle on a plain white background",
        "a large red circle and a small red star on a plain white background",
        "a large red circle on a plain white background, in dotted style",
        "a large crimson circle on a plain white background",
    ],
)
def test_other_text_is_no_caption(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(text)


def test_every_word_of_a_caption_is_in_the_vocabulary() -> None:
    used = {word for scene in scenes(300) for word in caption(scene).split()}
    assert used <= set(world.WORDS)


def test_sampling_covers_the_world() -> None:
    drawn = scenes(2000)
    assert 0.2 < np.mean([len(scene.placements) == 2 for scene in drawn]) < 0.3
    assert {thing.shape for scene in drawn for thing in scene.description.things} == set(world.SHAPES)
    assert {thing.colour for scene in drawn for thing in scene.description.things} == set(world.COLOURS)
    assert {scene.stripe_angle for scene in drawn} == set(world.STRIPE_ANGLES)
    for scene in drawn:
        for place in scene.placements:
            assert place.radius <= place.x <= 1 - place.radius
            assert place.radius <= place.y <= 1 - place.radius
            assert abs(place.tilt) <= world.TILT


def test_held_out_prompts_are_never_trained_with() -> None:
    prompts = world.held_out_prompts(100, seed=3)
    assert len(set(prompts)) == 100 and prompts == world.held_out_prompts(100, seed=3)
    assert not set(prompts) & {caption(scene) for scene in scenes(3000)}


def test_proof_prompts_are_seen_by_neither_training_nor_tuning() -> None:
    pairs = world.proof_prompts()
    prompts = [text for text, _ in pairs]
    assert len(pairs) == len(set(pairs)) == 300
    tuning = {text for seed in range(5) for text in world.held_out_prompts(150, seed)}
    assert not set(prompts) & tuning
    assert not set(prompts) & {caption(scene) for scene in scenes(3000)}
    singles = [text for text in prompts if len(parse_caption(text).things) == 1]
    assert len(singles) == 150 and 40 <= len(set(singles)) <= 60
    assert len(set(prompts) - set(singles)) == 150


def test_fewer_proof_prompts_are_the_first_of_more() -> None:
    assert world.proof_prompts(41) == world.proof_prompts()[:41]


def test_every_single_caption_is_trained_tuned_or_proven_with() -> None:
    """The proof has all that is left: 864 captions less those that the other two may see."""
    words = (world.SIZES, world.COLOURS, world.SHAPES, world.PATTERNS, world.BACKGROUNDS)
    every = [f"a {z} {c} {s} on a {p} {b} background" for z, c, s, p, b in product(*words)]
    kept = [text for text in every if world.is_held_out(text)]
    tuning = {text for text in world.held_out_prompts(300, 1) if text in every}
    assert set(kept) - tuning == {text for text, _ in world.proof_prompts() if text in every}


def test_dusk_repaints_every_colour_and_keeps_the_shapes() -> None:
    day, dusk = world.DAY, world.DUSK
    for one, two in ((day.colours, dusk.colours), (day.backgrounds, dusk.backgrounds)):
        assert list(one) == list(two)
        assert all(np.linalg.norm(np.subtract(one[name], two[name])) > 15 for name in one)
    picture = render(single("orange", "square", "striped", "pink"), look=dusk)
    assert tuple(picture[32, 32]) == dusk.colours["orange"]
    tones = {tuple(pixel) for pixel in picture[0]}
    assert {(240, 170, 160), tuple(np.rint(np.multiply(0.85, (240, 170, 160))).astype(int))} <= tones


def test_rendering_is_seeded_and_has_the_exact_colours() -> None:
    scene = single("orange", "square", "plain", "pink")
    picture = render(scene)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, render(scene))
    assert tuple(picture[0, 0]) == world.BACKGROUNDS["pink"]
    assert tuple(picture[32, 32]) == world.COLOURS["orange"]


@pytest.mark.parametrize("shape", world.SHAPES)
def test_shapes_have_their_size_and_smooth_edges(shape: str) -> None:
    coarse = world.coverage(shape, Placement(0.47, 0.52, 0.3, 0.2), 64)
    fine = world.coverage(shape, Placement(0.47, 0.52, 0.3, 0.2), 640)
    assert coarse.mean() == pytest.approx(fine.mean(), rel=0.01)
    assert np.abs(coarse - fine.reshape(64, 10, 64, 10).mean((1, 3))).mean() < 0.004
    y, x = np.nonzero(fine > 0.5)
    reach = np.hypot((x + 0.5) / 640 - 0.47, (y + 0.5) / 640 - 0.52).max()
    assert reach == pytest.approx(0.3, rel=0.06)  # a cross reaches 5 % further, to the corners of its arms


def test_patterns_have_two_tones_in_equal_parts() -> None:
    for pattern in ("striped", "checkered"):
        for angle in world.STRIPE_ANGLES:
            weight = world.pattern_weight(pattern, 160, angle, (0.3, 1.2))
            assert weight.mean() == pytest.approx(0.5, abs=0.03)
            assert np.mean((weight > 0.01) & (weight < 0.99)) < 0.2
    assert world.pattern_weight("plain", 64).max() == 0
    assert tuple(world.second_tone("black")) == (60, 60, 65)
    assert tuple(world.second_tone("gray")) == pytest.approx((119, 119, 119))


def test_zebra_style_whitens_a_third_of_a_shape_and_nothing_else() -> None:
    scene = single("blue", "square")
    plain = render(scene, 128).astype(float)
    striped = render(replace(scene, description=replace(scene.description, zebra=True)), 128).astype(float)
    inside = np.all(plain == world.COLOURS["blue"], axis=-1)
    assert np.mean((striped - plain)[inside] / (255 - plain[inside])) == pytest.approx(1 / 3, abs=0.04)
    outside = np.all(plain == world.BACKGROUNDS["white"], axis=-1)
    assert np.array_equal(striped[outside], plain[outside])


def test_the_styles_stripes_lie_diagonally_and_go_with_their_shape() -> None:
    words = Description((Thing("blue", "square", "large"),), "plain", "white", zebra=True)
    one, moved = (
        render(Scene(words, (Placement(x, y, 0.3, 0.0),))) for x, y in ((0.375, 0.5), (37 / 64, 36 / 64))
    )
    assert np.array_equal(one[:48, :48], np.roll(moved, (-4, -13), (0, 1))[:48, :48])
    middle = one[24:40, 18:34].astype(int)
    assert np.abs(middle[1:, :-1] - middle[:-1, 1:]).max() <= 2, "the same along the rising diagonal"
    assert np.abs(middle[1:, 1:] - middle[:-1, :-1]).max() > 100


@pytest.mark.parametrize(("size", "count"), [(64, 500), (128, 100)])
def test_judge_is_right_on_rendered_pictures(size: int, count: int) -> None:
    drawn = scenes(count, seed=size)
    figures = score([render(scene, size) for scene in drawn], [caption(scene) for scene in drawn])
    assert set(figures) == set(COLUMNS)
    assert min(figures.values()) >= 0.99


def test_judge_is_right_on_somewhat_noisy_pictures() -> None:
    rng = np.random.default_rng(0)
    drawn = scenes(100, seed=9)
    noisy = [np.clip(render(s) + rng.normal(0, 6, (64, 64, 3)), 0, 255).astype(np.uint8) for s in drawn]
    assert min(score(noisy, [caption(scene) for scene in drawn]).values()) >= 0.97


def test_judge_fails_exactly_the_column_that_is_wrong() -> None:
    scene = single()
    asked, reading = scene.description, judge(render(scene))
    thing = asked.things[0]
    assert False not in matches(reading, asked).values()
    wrong = {
        "background": replace(asked, background="gray"),
        "pattern": replace(asked, pattern="striped"),
        "colour": replace(asked, things=(replace(thing, colour="orange"),)),
        "size": replace(asked, things=(replace(thing, size="small"),)),
        "stripes": replace(asked, zebra=True),
        "shape": replace(asked, things=(replace(thing, shape="ring"),)),
    }
    for column, words in wrong.items():
        assert [name for name, right in matches(reading, words).items() if right is False] == [column]


def test_judge_tells_the_order_and_number_of_things() -> None:
    things = (Thing("red", "star"), Thing("blue", "cross"))
    places = (Placement(0.25, 0.4, 0.18, 0.0), Placement(0.75, 0.6, 0.18, 0.0))
    reading = judge(render(Scene(Description(things, "plain", "gray"), places)))
    assert [(blob.colour, blob.shape) for blob in reading.blobs] == [("red", "star"), ("blue", "cross")]
    swapped = matches(reading, Description(things[::-1], "plain", "gray"))
    assert (
        swapped["background"] and not swapped["colour"] and not swapped["shape"] and swapped["size"] is None
    )
    alone = matches(reading, Description((Thing("red", "star", "large"),), "plain", "gray"))
    assert not alone["colour"] and not alone["shape"]


def test_judge_finds_nothing_in_a_picture_of_nothing() -> None:
    asked = single().description
    flat = matches(judge(np.full((64, 64, 3), 245, np.uint8)), asked)
    assert flat["background"] and flat["pattern"]
    assert not flat["colour"] and not flat["size"] and not flat["shape"]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert not matches(judge(noise), asked)["shape"]


def test_judge_refuses_a_shape_that_is_none() -> None:
    picture = np.full((64, 64, 3), 245, np.uint8)
    picture[30:34, 4:60] = world.COLOURS["red"]  # a bar
    assert [(blob.colour, blob.shape) for blob in judge(picture).blobs] == [("red", None)]
