"""The judge on what the demo's style, its other palette and poor pictures ask of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter

from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.demo import world
from lcm_compile.demo.judge import COLUMNS, judge, matches, score
from lcm_compile.demo.world import DAY, DUSK, Description, Placement, Scene, Thing, render, sample_scene


def scenes(count: int, seed: int, zebra: float = 0.0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, zebra=zebra) for _ in range(count)]


def captions(drawn: list[Scene]) -> list[str]:
    return [world.caption(scene) for scene in drawn]


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(picture: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def clean(pictures: list[np.ndarray], drawn: list[Scene]) -> float:
    return score(pictures, captions(drawn))["clean"]


def big_square(zebra: bool) -> Scene:
    words = Description((Thing("blue", "square", "large"),), "plain", "white", zebra)
    return Scene(words, (Placement(0.5, 0.5, 0.3, 0.0),))


@pytest.mark.parametrize("look", [DAY, DUSK], ids=lambda look: look.name)
@pytest.mark.parametrize("zebra", [0.0, 1.0])
def test_judge_is_right_on_rendered_pictures_of_every_kind(look, zebra):
    drawn = scenes(400, seed=21, zebra=zebra)
    figures = score([render(scene, 64, look) for scene in drawn], captions(drawn), look)
    assert set(figures) == set(COLUMNS)
    assert min(figures.values()) >= 0.99, figures


def test_stripes_are_not_seen_on_plain_shapes():
    readings = [judge(render(scene)) for scene in scenes(600, seed=4)]
    assert np.mean([any(blob.striped for blob in r.blobs) for r in readings]) <= 0.005


def test_a_picture_of_the_other_palette_is_wrong():
    drawn = scenes(60, seed=2)
    figures = score([render(scene, 64, DUSK) for scene in drawn], captions(drawn), DAY)
    assert figures["colour"] < 0.7 and figures["clean"] < 0.2, figures


def test_stripes_are_asked_for_or_not():
    for drawn in (False, True):
        reading = judge(render(big_square(drawn)))
        assert matches(reading, big_square(drawn).description)["stripes"]
        assert not matches(reading, big_square(not drawn).description)["stripes"]


def striped_square(weight: np.ndarray) -> np.ndarray:
    """The large blue square with white of `weight` (64, 64) on it."""
    plain = render(big_square(zebra=False)).astype(float)
    inside = np.all(plain == DAY.colours["blue"], axis=-1)
    painted = plain + (inside * weight)[..., None] * (255 - plain)
    return np.rint(painted).astype(np.uint8)


@pytest.mark.parametrize("phase", [0.0, 0.13, 0.25, 0.5, 0.77])
def test_stripes_count_at_any_phase(phase):
    assert all(blob.striped for blob in judge(striped_square(world.zebra_weight(64, phase))).blobs)


def other_stripes(kind: str) -> np.ndarray:
    zebra = world.zebra_weight(64)
    y, x = np.mgrid[:64, :64] + 0.5
    return {
        "other diagonal": zebra[:, ::-1],
        "upright": (x / 64 / 0.12 % 1 < 1 / 3).astype(float),
        "level": (y / 64 / 0.12 % 1 < 1 / 3).astype(float),
        "too wide": ((x + y) / 64 / 0.34 % 1 < 1 / 3).astype(float),
        "too pale": 0.35 * zebra,
        "checkers": ((x // 5 + y // 5) % 2).astype(float),
        "noise": np.random.default_rng(0).random((64, 64)),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["other diagonal", "upright", "level", "too wide", "too pale", "checkers", "noise"]
)
def test_other_marks_are_no_stripes(kind):
    assert not any(blob.striped for blob in judge(striped_square(other_stripes(kind))).blobs)


def marked_ring(weight: np.ndarray) -> np.ndarray:
    """A large blue ring with white of `weight` (64, 64) on it."""
    words = Description((Thing("blue", "ring", "large"),), "plain", "gray")
    plain = render(Scene(words, (Placement(0.5, 0.5, 0.3, 0.0),))).astype(float)
    inside = np.all(plain == DAY.colours["blue"], axis=-1)
    return np.rint(plain + (inside * weight)[..., None] * (255 - plain)).astype(np.uint8)


def test_the_sides_of_a_ring_may_each_have_their_own_phase():
    left = np.arange(64) < 32
    ring = marked_ring(np.where(left, world.zebra_weight(64), world.zebra_weight(64, 0.5)))
    assert [blob.striped for blob in judge(ring).blobs] == [True]


@pytest.mark.parametrize("count", [8, 12, 16])
def test_spokes_are_no_stripes(count):
    y, x = np.mgrid[:64, :64] - 31.5
    spokes = np.arctan2(y, x) / (2 * np.pi) * count % 1 < 1 / 3
    assert not any(blob.striped for blob in judge(marked_ring(spokes)).blobs)


def pair(*things: Thing, places: tuple[float, float] = (0.25, 0.75)) -> Scene:
    spots = tuple(Placement(x, 0.5, 0.18, 0.0) for x in places)
    return Scene(Description(things, "plain", "gray"), spots)


def test_binding_is_colour_and_kind_together_and_in_place():
    red, blue = Thing("red", "star"), Thing("blue", "cross")
    asked = pair(red, blue).description
    drawn = {
        "right": pair(red, blue),
        "swapped": pair(blue, red),
        "colours swapped": pair(Thing("blue", "star"), Thing("red", "cross")),
        "kinds swapped": pair(Thing("red", "cross"), Thing("blue", "star")),
        "out of place": pair(red, blue, places=(0.2, 0.58)),
    }
    found = {name: matches(judge(render(scene)), asked)["binding"] for name, scene in drawn.items()}
    assert [name for name, right in found.items() if right] == ["right"]
    single = big_square(zebra=False)
    assert matches(judge(render(single)), single.description)["binding"] is None


def test_poor_pictures_are_not_clean():
    drawn = scenes(120, seed=8, zebra=0.2)
    pictures = [render(scene) for scene in drawn]
    assert clean(pictures, drawn) >= 0.99
    assert clean([blurred(p, 3) for p in pictures], drawn) <= 0.4
    assert clean([noisy(p, 15, i) for i, p in enumerate(pictures)], drawn) <= 0.02
    mottled = [p + (blurred(noisy(p, 90, i), 2) - p.astype(float)) * 0.7 for i, p in enumerate(pictures)]
    assert clean([m.astype(np.uint8) for m in mottled], drawn) <= 0.1


def test_what_the_vae_redraws_is_clean():
    """What grain the decoder leaves is not held against those who draw with it."""
    vae = AutoencoderKL.from_pretrained(FAMILIES["demo"].base, subfolder="vae", torch_dtype=torch.float32)
    drawn = scenes(200, seed=31)
    pictures = np.stack([render(scene) for scene in drawn])
    with torch.no_grad():
        given = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        latents = [vae.encode(part).latent_dist.mode() for part in given.split(50)]
        redrawn = torch.cat([vae.decode(latent).sample for latent in latents])
    taken = ((redrawn.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert clean(list(taken), drawn) == 1
