"""Gaussian noise equal to that of torch's CPU generator, computed without torch.

`torch.Generator("cpu").manual_seed(seed)` is MT19937 seeded as NumPy's legacy RandomState. `torch.randn`
of 16 values or more fills the tensor with 24-bit uniforms and turns them, 16 at a time, into normals by
Box–Muller: the first 8 uniforms of a block give the radii, the last 8 the angles. If the length is not
a multiple of 16, the last 16 values are generated again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from lcm_compile.pipeline.request import Request

BLOCK = 16  # values that torch generates at a time


class TorchNoise:
    """A stream of float32 normals. Each call continues where the last ended, as a torch.Generator does."""

    def __init__(self, seed: int) -> None:
        # torch passes the low 32 bits of the seed to MT19937.
        self._generator = np.random.RandomState(seed & 0xFFFFFFFF)

    def _uniform(self, count: int) -> np.ndarray:
        bits = self._generator.randint(0, 2**32, size=count, dtype=np.uint32)
        return (bits & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    @staticmethod
    def _box_muller(uniform: np.ndarray) -> np.ndarray:
        """Returns normals (blocks, 16) for uniforms (blocks, 16)."""
        half = BLOCK // 2
        radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - uniform[:, :half]))
        angle = np.float32(2 * math.pi) * uniform[:, half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns `torch.randn(shape, generator=…)` in float32, equal to about 4e-7.

        Raises ValueError for fewer than 16 values.
        """
        count = math.prod(shape)
        if count < BLOCK:
            raise ValueError(f"a draw of {count} values: torch draws fewer than {BLOCK} in another way")
        uniform = self._uniform(count)
        in_blocks = count // BLOCK * BLOCK
        values = np.empty(count, np.float32)
        values[:in_blocks] = self._box_muller(uniform[:in_blocks].reshape(-1, BLOCK)).reshape(-1)
        if in_blocks < count:
            values[-BLOCK:] = self._box_muller(self._uniform(BLOCK).reshape(1, BLOCK))[0]
        return values.reshape(shape)


class NoiseStream:
    """The noise of one request, in the order in which diffusers draws it from its generator.

    All draws are from one generator: one of (n, c, h, w) for the first latents of n pictures, and one of that
    shape after every step but the last. So with n > 1, even picture 0 differs from the picture that the same
    seed gives alone.

    `encoded` are names of images whose latents are sampled with a draw of (images, c, h, w) each: "image"
    before the first latents, and "masked" after them. `images` is 1 if all pictures begin at the same.
    """

    def __init__(
        self, seed: int, shape: tuple[int, ...], encoded: Collection[str] = (), images: int = 1
    ) -> None:
        self._noise = TorchNoise(seed)
        self._shape, self._images = shape, images
        self.posteriors = {"image": self._posterior()} if "image" in encoded else {}
        self._draws = [self._noise(shape)]
        if "masked" in encoded:
            self.posteriors["masked"] = self._posterior()

    def _posterior(self) -> np.ndarray:
        return self._noise((self._images, *self._shape[1:]))

    def __getitem__(self, i: int) -> np.ndarray:
        """Returns draw i (n, c, h, w) in float32.

        Draw 0 is the first latents. Step i, counted from 0, adds draw i + 1; the last step adds none.
        """
        while len(self._draws) <= i:
            self._draws.append(self._noise(self._shape))
        return self._draws[i]


class Noise:
    """The noise of pictures (c, h, w) of any requests. Each request's own is that of its NoiseStream.

    With `own_images` each of a request's pictures begins at an image of its own.
    """

    def __init__(
        self, shape: tuple[int, ...], encoded: Collection[str] = (), own_images: bool = False
    ) -> None:
        self.shape = shape
        self._encoded, self._own_images = encoded, own_images
        self._streams: dict[tuple[int, int], NoiseStream] = {}  # by seed and number of pictures

    def draw(self, i: int, pictures: Sequence[Request]) -> np.ndarray:
        """Returns draw i for each of these pictures (b, c, h, w), as NoiseStream has it.

        The streams of other pictures are forgotten, and would be drawn again from their start.
        """
        streams = self._streams_of(pictures)
        return np.stack([one[i][picture.index] for one, picture in zip(streams, pictures, strict=True)])

    def posterior(self, name: str, pictures: Sequence[Request]) -> np.ndarray:
        """Returns what each picture's image of this name is sampled with (b, c, h, w)."""
        places = [picture.index or 0 if self._own_images else 0 for picture in pictures]
        streams = zip(self._streams_of(pictures), places, strict=True)
        return np.stack([stream.posteriors[name][place] for stream, place in streams])

    def _streams_of(self, pictures: Sequence[Request]) -> list[NoiseStream]:
        known, self._streams = self._streams, {}
        for picture in pictures:
            key = (picture.seed, picture.num_images)
            images = picture.num_images if self._own_images else 1
            self._streams[key] = known.get(key) or NoiseStream(
                picture.seed, (picture.num_images, *self.shape), self._encoded, images
            )
            known[key] = self._streams[key]
        return [self._streams[picture.seed, picture.num_images] for picture in pictures]
