"""How a picture begins at another one, and what a mask keeps of that: image to image, and inpainting.

The order of the draws from a seed, and the noise, are those of diffusers' pipelines of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import UsageError
from lcm_compile.graphs import ENCODE_IMAGE, MASKED, StageContract
from lcm_compile.pipeline.noise import Noise
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.source_picture import SourcePicture, check_mask
from lcm_compile.samplers.step import Schedule, Step
from lcm_compile.spec import BuildSpec, Shape

# An image, and the mask whose white part is taken out of it, if one is.
Source = tuple[SourcePicture, SourcePicture | None]
# The latents of the last images, as the encoder gave them.
Encoded = dict[Source, dict[str, np.ndarray]]
IMAGES_KEPT = 8
GREY = 0.5  # what the VAE reads as 0, in place of what is taken out


class ImageStart:
    """The first latents of pictures that begin at an image, and the parts of it that their masks keep.

    `plan` has only the steps that are drawn. `known` has the images that are not encoded again, and gets the
    new ones. `sources` are those to encode. An inpainting model, whose step takes MASKED, is told what is
    kept; with any other the kept parts are put back after every step.
    """

    def __init__(
        self,
        runners: Mapping[str, Runner],
        shape: Shape,
        plan: Schedule,
        noise: Noise,
        pictures: Sequence[Request],
        known: Encoded,
    ) -> None:
        self._runners, self._step = runners, runners["step"]
        self._shape, self._plan, self._noise = shape, plan, noise
        self._is_told = takes_masked(self._step.contract)
        self._from_noise = begins_at_noise(pictures[0])
        self._encodes_image = encodes_image(self._step.contract, pictures[0])
        images = {"image": self._encodes_image, MASKED: self._is_told}
        sources = dict.fromkeys(source_of(one, name) for one in pictures for name in images if images[name])
        self._known = known
        given = {s: {"mean": s[0].latent[None]} for s in sources if s[0].latent is not None}
        self._latents: Encoded = given | {s: found for s in sources if (found := known.get(s))}
        self.sources = [source for source in sources if source not in self._latents]
        self._masks: dict[SourcePicture, np.ndarray] = {}
        for mask in {one.mask for one in pictures if one.mask}:
            self._masks[mask] = latent_mask(mask, shape, noise.shape[-1])

    def encode(self) -> Iterator[None]:
        """Encodes the sources one after another, and yields after each."""
        size = self._shape.height, self._shape.width
        for image, mask in self.sources:
            runner = self._runners[ENCODE_IMAGE]
            pixels = image.pixels(*size)
            if mask is not None:
                pixels = np.where(mask.mask(*size)[..., None] > 0, np.float32(GREY), pixels)
            given = runner({"image": runner.to_device(pixels[None])})
            encoded = {name: np.array(runner.to_host(given[name])) for name in given}
            self._latents[image, mask] = self._known[image, mask] = encoded
            for old in [*self._known][:-IMAGES_KEPT]:
                self._known.pop(old, None)  # another thread may have done so
            yield

    def clean(self, rows: Sequence[Request], name: str = "image") -> np.ndarray:
        """Returns the latents (b, c, h, w) of the pictures' images, sampled with each picture's seed.

        With the name MASKED they are those without what is repainted.
        """
        found = [self._latents[source_of(row, name)] for row in rows]
        latents = np.concatenate([one["mean"] for one in found])
        if "std" in found[0]:
            latents += np.concatenate([one["std"] for one in found]) * self._noise.posterior(name, rows)
        return latents

    def batch(self, rows: Sequence[Request]) -> BatchStart:
        """Returns how the pictures of one call of the engines begin, whose sources are encoded."""
        noise, steps, put = self._noise.draw(0, rows), self._plan.steps, self._step.to_device
        clean = self.clean(rows) if self._encodes_image else None
        first = self._plan.first(noise) if clean is None or self._from_noise else steps[0].noisy(clean, noise)
        if rows[0].mask is None:
            return BatchStart(first, all_masked(self._step), steps, noise)
        mask = np.stack([self._masks[row.mask] for row in rows if row.mask is not None])
        if self._is_told:
            told = np.concatenate([mask, self.clean(rows, MASKED)], axis=1)
            return BatchStart(first, {MASKED: put(told)}, steps, noise)
        assert clean is not None
        return BatchStart(first, {}, steps, noise, clean, mask, put)


@dataclass(frozen=True)
class BatchStart:
    """How the pictures of one call of the engines begin.

    `first` are their first latents (b, c, h, w), and `masked` is the input MASKED of the step on the device,
    {} if it takes none. `noise` is what the first latents have. If masks keep parts that are put back after
    every step, `clean` are the latents that these parts are of, `mask` (b, 1, h, w) is 1 where they are not,
    and `put` brings an array to the device.
    """

    first: np.ndarray
    masked: Mapping[str, Array]
    steps: Sequence[Step]
    noise: np.ndarray
    clean: np.ndarray | None = None
    mask: np.ndarray | None = None
    put: Callable[[np.ndarray], Array] | None = None

    def kept(self, i: int) -> tuple[Array, Array] | None:
        """Returns (m, k) on the device, for a latent after step i that becomes m·latent + k, or None.

        m is where the masks repaint, and k what they keep of the image, as noisy as the next step begins.
        """
        if self.put is None or self.clean is None or self.mask is None:
            return None
        latent = self.clean
        if i + 1 < len(self.steps):
            latent = self.steps[i + 1].noisy(latent, self.noise)
        return self.put(self.mask), self.put((1 - self.mask) * latent)


def source_of(picture: Request, name: str) -> Source:
    """Returns what is encoded for a picture that begins at an image."""
    assert picture.image is not None
    return picture.image, picture.mask if name == MASKED else None


def takes_masked(step: StageContract) -> bool:
    """Returns whether a step is an inpainting model's, which is told what it repaints."""
    return any(spec.name == MASKED for spec in step.inputs)


def begins_at_noise(picture: Request) -> bool:
    """Returns whether what is repainted begins as noise alone, without the image."""
    return picture.mask is not None and picture.denoising_strength == 1


def encodes_image(step: StageContract, picture: Request) -> bool:
    """Returns whether the image itself is encoded, which an inpainting model needs only to begin at it."""
    return not (takes_masked(step) and begins_at_noise(picture))


def all_masked(step: Runner) -> dict[str, Array]:
    """Returns the input MASKED for a picture without an image, if the step takes it: all is repainted."""
    inputs = {
        spec.name: np.zeros(spec.shape, np.float32) for spec in step.contract.inputs if spec.name == MASKED
    }
    for array in inputs.values():
        array[:, 0] = 1
    return {name: step.to_device(array) for name, array in inputs.items()}


def latent_mask(mask: SourcePicture, shape: Shape, width: int) -> np.ndarray:
    """Returns a mask (1, h, w) for latents of a width, each of which takes the first of its pixels."""
    factor = shape.width // width
    return mask.mask(shape.height, shape.width)[None, ::factor, ::factor]


def sampled_images(contracts: Iterable[StageContract], picture: Request) -> Collection[str]:
    """Returns the names of the images whose latents are sampled with a picture's seed, as Noise takes them.

    Where there is a mask, diffusers samples the masked image for every model, and so draws for it.
    """
    stages = {contract.name: contract for contract in contracts}
    if picture.image is None or picture.image.latent is not None:
        return ()
    if all(spec.name != "std" for spec in stages[ENCODE_IMAGE].outputs):
        return ()
    image = ["image"] if encodes_image(stages["step"], picture) else []
    return image if picture.mask is None else [*image, MASKED]


def check_images(
    requests: Sequence[Request], contracts: Iterable[StageContract], spec: BuildSpec | None = None
) -> None:
    """Raises UsageError if a bundle of these stages can't encode the images of requests, or a mask is unfit.

    `spec` is what the bundle was built from, if that is known.
    """
    contracts = [*contracts]
    # A latent is not encoded.
    given = {(one.image, one.mask) for one in requests if one.image and one.image.latent is None}
    for image, mask in given:
        if mask is not None:
            check_mask(image, mask)
        elif any(takes_masked(c) for c in contracts if c.name == "step"):
            raise UsageError(
                "this bundle is of an inpainting model, and the image comes without a mask",
                "give a mask; one that is white all over repaints everything",
            )
    if not given or any(contract.name == ENCODE_IMAGE for contract in contracts):
        return
    rebuilt = "with --image"
    if spec is not None:
        rebuilt = f"one that does: {replace(spec, image=True, whole_loop=False).command()}"
    raise UsageError(
        "this bundle has no stage that encodes an image, and so can't draw from one", f"build {rebuilt}"
    )
