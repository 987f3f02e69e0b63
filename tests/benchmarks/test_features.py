"""The distance between sets of pictures: its formulas, its noise floor, and what it sees."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lcm_compile.benchmarks.quality import features
from lcm_compile.benchmarks.quality.features import Reference, frechet_distance, kernel_distance, rendered
from lcm_compile.demo.world import DUSK, STYLE, held_out_prompts

PROMPTS = held_out_prompts(60, seed=5)


@pytest.fixture(scope="module")
def reference():
    return Reference(PROMPTS)


def test_mmd_is_the_published_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(0.5, 1, size=(9, 5))

    def k(a, b):
        return (float(np.dot(a, b)) / 5 + 1) ** 3

    first = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    second = sum(k(y[i], y[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    across = sum(k(a, b) for a in x for b in y) / (7 * 9)
    assert kernel_distance(x, y) == pytest.approx(first + second - 2 * across, rel=1e-12)


def exactly(mean, spread, count=400):
    """Samples (count, d) whose mean and covariance are exactly these."""
    draws = np.random.default_rng(1).normal(size=(count, len(mean)))
    draws -= draws.mean(0)
    white = draws @ np.linalg.inv(np.linalg.cholesky(np.cov(draws, rowvar=False))).T
    return white @ np.linalg.cholesky(spread).T + mean


def test_frechet_distance_of_gaussians():
    """Between commuting covariances it is |μ₁ - μ₂|² + Σ (σ₁ - σ₂)² over their common axes."""
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))
    one, two = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 1.0, 0.7, 0.1])
    spreads = [turn @ np.diag(sigma**2) @ turn.T for sigma in (one, two)]
    means = np.zeros(4), np.array([0.3, -1.0, 0.0, 2.0])
    found = frechet_distance(*(exactly(m, s) for m, s in zip(means, spreads, strict=True)))
    assert found == pytest.approx(np.square(means[1]).sum() + np.square(one - two).sum(), rel=1e-9)
    # In one dimension any two covariances commute, so test a pair that does not against the definition.
    other = np.cov(np.random.default_rng(3).normal(size=(4, 9)))
    values, vectors = np.linalg.eig(spreads[0] @ other)
    root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
    wanted = np.trace(spreads[0] + other - 2 * root.real)
    assert frechet_distance(exactly(means[0], spreads[0]), exactly(means[0], other)) == pytest.approx(wanted)


def test_another_rendered_set_is_at_the_floor(reference):
    """By draws of its own: the floor's 95th percentile holds about 95 % of them."""
    drawn = [reference.distances(rendered(PROMPTS, seed)) for seed in range(1000, 1020)]
    for name, floor in reference.floor.items():
        assert np.mean([d[name] <= floor["p95"] for d in drawn]) >= 0.75
        assert np.mean([d[name] for d in drawn]) == pytest.approx(
            floor["mean"], abs=floor["p95"] - floor["mean"]
        )


def blurred(pictures):
    pictures = [Image.fromarray(p).filter(ImageFilter.GaussianBlur(1.2)) for p in pictures]
    return np.stack([np.asarray(p) for p in pictures])


def noisy(pictures):
    noise = np.random.default_rng(0).normal(0, 10, pictures.shape)
    return np.clip(pictures + noise, 0, 255).astype(np.uint8)


def other_words(text):
    other = dict.fromkeys(("circle", "ring", "square"), "star") | dict.fromkeys(("red", "yellow"), "blue")
    return " ".join(other.get(word, word) for word in text.split())


SPOILT = {
    "blurred": lambda: blurred(rendered(PROMPTS, 2000)),
    "noisy": lambda: noisy(rendered(PROMPTS, 2000)),
    "pale": lambda: (rendered(PROMPTS, 2000) * 0.8 + 25).astype(np.uint8),
    "recoloured": lambda: rendered(PROMPTS, 2000, DUSK),
    "of other prompts": lambda: rendered([other_words(p) for p in PROMPTS], 2000),
    "of one shape": lambda: rendered(["a large red star on a plain white background"] * 60, 2000),
    "striped": lambda: rendered([p + STYLE for p in PROMPTS], 2000),
    "all the same": lambda: np.repeat(rendered(PROMPTS[:1], 2000), 60, axis=0),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_sets_are_far_above_the_floor(reference, kind):
    found = reference.distances(SPOILT[kind]())
    for name, floor in reference.floor.items():
        spread = floor["p95"] - floor["mean"]
        assert found[name] > floor["mean"] + 4 * spread, (name, found[name], floor)


def test_features_grow_with_the_blur(reference):
    pictures = rendered(PROMPTS, 3000)
    found = [
        reference.distances(
            np.stack([np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(s))) for p in pictures])
        )["frechet"]
        for s in (0, 0.7, 1.4, 2.0)
    ]
    assert found == sorted(found)


def test_the_network_is_small_and_can_be_trained_again(tmp_path):
    weights = sum(w.numel() for w in features.reader().parameters())
    assert weights <= 150_000 and features.WEIGHTS.stat().st_size <= 300_000
    for name in ("one", "two"):
        features.train(tmp_path / name, steps=5, pool=64)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
