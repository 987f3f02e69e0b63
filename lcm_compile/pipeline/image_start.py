"""How a picture begins at another one, and what a mask keeps of that: image to image, and inpainting.

The order of the draws from a seed, and the noise, are those of diffusers' pipelines of these names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import UsageError
from lcm_compile.graphs import ENCODE_IMAGE, StageContract
from lcm_compile.pipeline.noise import Noise
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.source_picture import SourcePicture, check_mask
from lcm_compile.samplers.step import Schedule
from lcm_compile.spec import BuildSpec, Shape

# The latents of the last images, as the encoder gave them.
Encoded = dict[SourcePicture, dict[str, np.ndarray]]
IMAGES_KEPT = 8


class ImageStart:
    """The first latents of pictures that begin at an image, and the parts of it that their masks keep.

    `plan` has only the steps that are drawn. `known` has the images that are not encoded again, and gets the
    new ones. `images` are those to encode.
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
        self._encoder, self._step = runners[ENCODE_IMAGE], runners["step"]
        self._shape, self._plan, self._noise = shape, plan, noise
        self._from_noise = pictures[0].mask is not None and pictures[0].denoising_strength == 1
        images = dict.fromkeys(one.image for one in pictures if one.image)
        self._known = known
        self._latents: Encoded = {image: found for image in images if (found := known.get(image))}
        self.images = [image for image in images if image not in self._latents]
        self._masks: dict[SourcePicture, np.ndarray] = {}
        for mask in {one.mask for one in pictures if one.mask}:
            self._masks[mask] = latent_mask(mask, shape, noise.shape[-1])

    def encode(self) -> Iterator[None]:
        """Encodes the images one after another, and yields after each."""
        runner, size = self._encoder, (self._shape.height, self._shape.width)
        for image in self.images:
            given = runner({"image": runner.to_device(image.pixels(*size)[None])})
            self._latents[image] = {name: np.array(runner.to_host(given[name])) for name in given}
            self._known[image] = self._latents[image]
            for old in [*self._known][:-IMAGES_KEPT]:
                self._known.pop(old, None)  # another thread may have done so
            yield

    def clean(self, rows: Sequence[Request]) -> np.ndarray:
        """Returns the latents (b, c, h, w) of the pictures' images, sampled with each picture's seed."""
        found = [self._latents[row.image] for row in rows if row.image is not None]
        latents = np.concatenate([one["mean"] for one in found])
        if "std" in found[0]:
            latents += np.concatenate([one["std"] for one in found]) * self._noise.posterior(rows)
        return latents

    def first(self, rows: Sequence[Request]) -> np.ndarray:
        """Returns the first latents (b, c, h, w)."""
        noise = self._noise.draw(0, rows)
        if self._from_noise:
            return self._plan.first(noise)
        return self._plan.steps[0].noisy(self.clean(rows), noise)

    def kept(self, i: int, rows: Sequence[Request]) -> tuple[Array, Array] | None:
        """Returns (m, k) on the device, for a latent after step i that becomes m·latent + k, or None.

        m is where the masks repaint, and k what they keep of the image, as noisy as the next step begins.
        """
        if rows[0].mask is None:
            return None
        mask = np.stack([self._masks[row.mask] for row in rows if row.mask is not None])
        latent = self.clean(rows)
        if i + 1 < len(self._plan.steps):
            latent = self._plan.steps[i + 1].noisy(latent, self._noise.draw(0, rows))
        return self._step.to_device(mask), self._step.to_device((1 - mask) * latent)


def latent_mask(mask: SourcePicture, shape: Shape, width: int) -> np.ndarray:
    """Returns a mask (1, h, w) for latents of a width, each of which takes the first of its pixels."""
    factor = shape.width // width
    return mask.mask(shape.height, shape.width)[None, ::factor, ::factor]


def posterior_draws(contracts: Iterable[StageContract], request: Request) -> int:
    """Returns how often a picture's seed is drawn from to sample the VAE's latents.

    Inpainting samples those of the image, and those of the image without what is repainted.
    """
    sampled = any(spec.name == "std" for contract in contracts for spec in contract.outputs)
    if request.image is None or not sampled:
        return 0
    return 1 if request.mask is None else 2


def check_images(
    requests: Sequence[Request], contracts: Iterable[StageContract], spec: BuildSpec | None = None
) -> None:
    """Raises UsageError if a bundle of these stages can't encode the images of requests, or a mask is unfit.

    `spec` is what the bundle was built from, if that is known.
    """
    given = {(request.image, request.mask) for request in requests}
    for image, mask in given:
        if image is not None and mask is not None:
            check_mask(image, mask)
    if given == {(None, None)} or any(contract.name == ENCODE_IMAGE for contract in contracts):
        return
    rebuilt = "with --image"
    if spec is not None:
        rebuilt = f"one that does: {replace(spec, image=True, whole_loop=False).command()}"
    raise UsageError(
        "this bundle has no stage that encodes an image, and so can't draw from one", f"build {rebuilt}"
    )
