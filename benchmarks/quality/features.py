"""Measures how far a set of pictures is from rendered ones, in the features of a small trained network.

The features are learnt, so this distance is independent of the rule-based judge. The network was trained on
rendered pictures to read everything in a scene, including what its caption leaves open, and how each picture
was degraded. The distance is between sets of pictures; whether a picture fits its own prompt is for the judge
to say. `python -m lcm_compile.benchmarks.quality.features --train` trains the network again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from lcm_compile.demo.world import (
    COLOURS,
    DAY,
    DUSK,
    PATTERNS,
    SHAPES,
    STRIPE_ANGLES,
    Look,
    Scene,
    parse_caption,
    place,
    render,
    sample_scene,
)

Pictures = NDArray[np.uint8]
Array = NDArray[np.float64]

WEIGHTS = Path(__file__).with_name("features.safetensors")
SIDE = 64  # pixels
WIDTH = 32  # features of a picture
RENDERS = 4  # renderings of each prompt in the reference set
DRAWS = 50  # rendered sets that the noise floor is measured with
STEPS = 3000  # of training
BATCH = 64  # pictures
POOL = 12288  # rendered pictures for training
# The largest amount of each degradation.
BLUR = 2.0  # standard deviation in pixels
NOISE = 0.15  # standard deviation as a share of the full range of values
CONTRAST = 0.5  # share of the contrast that is lost
THINGS = ("none", *SHAPES)
PLACED = 5  # numbers of a placement: x, y, radius, and the tilt as cosine and sine
# The number of classes in each classification that the network makes: the picture's look, background,
# pattern, stripe angle and zebra style, then the shape and the colour of each of two things from left to
# right.
CLASSES = (2, 4, len(PATTERNS), len(STRIPE_ANGLES), 2, *(2 * (len(THINGS), len(COLOURS))))
# How many numbers the network estimates: two placements, two phases as cosine and sine, three degradations.
NUMBERS = 2 * PLACED + 4 + 3


class SceneReader(nn.Module):
    """A convolutional network that reads a scene. `features` are the inputs of its last layer."""

    features: nn.Sequential

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, WIDTH))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, sum(CLASSES) + NUMBERS))

    def forward(self, pictures: Tensor) -> Tensor:
        """Returns logits and numbers (n, sum(CLASSES) + NUMBERS) for pictures (n, 3, 64, 64) in -1…1."""
        return self.head(self.features(pictures))


def classes_and_numbers(scene: Scene, look: Look) -> tuple[list[int], list[float]]:
    """Returns a scene's classes and numbers, in the order of CLASSES and NUMBERS without the degradations.

    What can't be seen in the picture is -1 among the classes and NaN among the numbers.
    """
    words = scene.description
    names, phases = list(look.backgrounds), [math.nan] * 4
    if words.pattern != "plain":
        phases = [f(math.pi * phase) for phase in scene.phase for f in (math.cos, math.sin)]
    if words.pattern == "striped":
        phases[2:] = [math.nan] * 2
    angle = STRIPE_ANGLES.index(scene.stripe_angle) if words.pattern == "striped" else -1
    classes = [look is DUSK, names.index(words.background), PATTERNS.index(words.pattern), angle, words.zebra]
    numbers = []
    for thing, spot in zip(words.things, scene.placements, strict=True):
        classes += [THINGS.index(thing.shape), list(COLOURS).index(thing.colour)]
        turn = math.nan if thing.shape in ("circle", "ring") else 4 * spot.tilt
        numbers += [spot.x, spot.y, 2 * spot.radius, math.cos(turn), math.sin(turn)]
    missing = 2 - len(words.things)
    return classes + missing * [0, -1], numbers + missing * PLACED * [math.nan] + phases


def degraded(pictures: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns pictures (n, 3, 64, 64) with random degradations, and the amount of each, 0 to 1: (n, 3).

    Each picture is blurred, made noisy and faded, independently with a probability of one half each.
    """
    count = len(pictures)
    amount = torch.rand(count, 3, generator=random) * (torch.rand(count, 3, generator=random) < 0.5)
    blur, noise, faded = (amount * torch.tensor([BLUR, 2 * NOISE, CONTRAST])).T
    apart = (torch.arange(SIDE)[:, None] - torch.arange(SIDE)).square()
    weights = torch.softmax(-apart / (2 * blur[:, None, None].square() + 1e-3), -1)  # rows are Gaussians
    pictures = torch.einsum("nij,ncjk,nlk->ncil", weights, pictures, weights)
    pictures = pictures * (1 - faded[:, None, None, None])
    return (pictures + noise[:, None, None, None] * torch.randn(pictures.shape, generator=random)), amount


def loss_of(output: Tensor, classes: Tensor, numbers: Tensor) -> Tensor:
    """Returns the training loss: cross-entropies and squared errors of what can be seen."""
    logits = output[:, : sum(CLASSES)].split(CLASSES, 1)
    losses = [functional.cross_entropy(x, y, ignore_index=-1) for x, y in zip(logits, classes.T, strict=True)]
    seen = ~numbers.isnan()
    error = (output[:, sum(CLASSES) :] - numbers.nan_to_num()).square()
    return torch.stack(losses).sum() + 20 * error[seen].mean() + 20 * error[:, -3:].mean()


def train(path: Path, steps: int = STEPS, pool: int = POOL) -> None:
    """Trains the network on `pool` rendered pictures and writes its feature layers in half precision."""
    rng, random = np.random.default_rng(0), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    looks = [DUSK if i % 4 == 3 else DAY for i in range(pool)]
    scenes = [sample_scene(rng, zebra=0.2) for _ in looks]
    pictures = as_tensor(np.stack([render(s, SIDE, look) for s, look in zip(scenes, looks, strict=True)]))
    answers = [classes_and_numbers(scene, look) for scene, look in zip(scenes, looks, strict=True)]
    classes, numbers = (torch.tensor([a[i] for a in answers]) for i in (0, 1))
    network = SceneReader()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(1, steps + 1):
        index = torch.randint(pool, (BATCH,), generator=random)
        shown, amount = degraded(pictures[index], random)
        loss = loss_of(network(shown), classes[index], torch.cat([numbers[index], amount], 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"features {step}/{steps} loss {loss.item():.3f}", file=sys.stderr, flush=True)
    whiten(network, pictures)
    save_file({name: weight.half() for name, weight in network.features.state_dict().items()}, path)


@torch.no_grad()
def whiten(network: SceneReader, pictures: Tensor) -> None:
    """Rescales the features in place to mean 0 and identity covariance over undegraded `pictures`.

    So directions that vary little among these pictures, such as blur, count as much as those of their
    content.
    """
    found = torch.cat([network.features(batch) for batch in pictures.split(BATCH)]).double()
    values, vectors = torch.linalg.eigh(found.T.cov())
    scale = (vectors / (values + 1e-3 * values.max()).sqrt() @ vectors.T).float()
    last = network.features[-1]
    assert isinstance(last, nn.Linear)
    last.bias.copy_(scale @ (last.bias - found.mean(0).float()))
    last.weight.copy_(scale @ last.weight)


def as_tensor(pictures: Pictures) -> Tensor:
    """Returns pictures (n, 64, 64, 3) as the network takes them: (n, 3, 64, 64) in -1…1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1


@lru_cache(maxsize=1)
def reader() -> nn.Module:
    """Returns the network that comes with the package.

    It maps pictures (n, 3, 64, 64) in -1…1 to whitened features (n, WIDTH).
    """
    network = SceneReader().features.eval()
    network.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return network


def features(pictures: Pictures) -> Array:
    """Returns the network's features (n, WIDTH) of pictures (n, 64, 64, 3)."""
    with torch.no_grad():
        batches = as_tensor(pictures).split(BATCH)
        return torch.cat([reader()(batch) for batch in batches]).double().numpy()


def kernel_distance(first: Array, second: Array) -> float:
    """Returns the unbiased squared MMD between features (n, d) and (m, d) with the kernel (x·y / d + 1)³.

    This is the KID of Bińkowski et al. 2018, "Demystifying MMD GANs", over all pairs. Its mean is 0 for two
    sets from one distribution, so it may be negative.
    """

    def kernel(x: Array, y: Array) -> Array:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Array) -> float:
        pairs = kernel(x, x)
        return float((pairs.sum() - np.trace(pairs)) / (len(x) * (len(x) - 1)))

    return within(first) + within(second) - 2 * float(kernel(first, second).mean())


def frechet_distance(first: Array, second: Array) -> float:
    """Returns the Fréchet distance |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½) between features (n, d) and (m, d).

    This is the formula of FID, Heusel et al. 2017.
    """
    one, two = (np.cov(x, rowvar=False) for x in (first, second))
    values, vectors = np.linalg.eigh(one)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # (Σ₁Σ₂)^½ has the same trace as (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric.
    shared = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    apart = np.square(first.mean(0) - second.mean(0)).sum()
    return float(apart + np.trace(one) + np.trace(two) - 2 * shared)


def rendered(prompts: Sequence[str], seed: int, look: Look = DAY) -> Pictures:
    """Returns one rendering of each prompt, (n, 64, 64, 3), with what it leaves open drawn from `seed`."""
    rng = np.random.default_rng(seed)
    return np.stack([render(place(parse_caption(text), rng), SIDE, look) for text in prompts])


def distances(first: Array, second: Array) -> dict[str, float]:
    """Returns the MMD and the Fréchet distance between two sets of features."""
    return {"mmd": kernel_distance(first, second), "frechet": frechet_distance(first, second)}


class Reference:
    """The features of renderings of some prompts, and the noise floor of distances from them.

    `floor` holds the mean and the 95th percentile of the distances of DRAWS other rendered sets.
    """

    def __init__(self, prompts: Sequence[str], look: Look = DAY) -> None:
        sets = [features(rendered(prompts, seed, look)) for seed in range(RENDERS + DRAWS)]
        self.features = np.concatenate(sets[:RENDERS])
        draws = [distances(drawn, self.features) for drawn in sets[RENDERS:]]
        self.floor = {
            name: {
                "mean": float(np.mean([draw[name] for draw in draws])),
                "p95": float(np.percentile([draw[name] for draw in draws], 95)),
            }
            for name in draws[0]
        }

    def distances(self, pictures: Pictures) -> dict[str, float]:
        """Returns the distances of pictures (n, 64, 64, 3), one for each prompt, from the renderings."""
        return distances(features(pictures), self.features)


@click.command()
@click.option("--train", "training", is_flag=True, required=True, help="Train the network again.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=WEIGHTS, help="File for the weights."
)
def main(training: bool, out: Path) -> None:
    """Trains the network whose features are compared, and writes its weights to OUT."""
    train(out)


if __name__ == "__main__":
    main()
