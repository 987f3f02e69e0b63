"""Gaussian noise equal to torch's CPU generator, without torch.

`torch.Generator("cpu").manual_seed(seed)` is MT19937 seeded as NumPy's legacy RandomState. `torch.randn`
of 16 values or more fills the tensor with 24-bit uniforms and turns them, 16 at a time, into normals by
Box–Muller: the first 8 uniforms of a block give the radii, the last 8 the angles. When the length is not
a multiple of 16, the last 16 values are drawn anew.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK = 16


class TorchNoise:
    """A stream of float32 normals; draws continue where the last one ended, as a torch.Generator's do."""

    def __init__(self, seed: int) -> None:
        # torch hands the low 32 bits of the seed to MT19937.
        self._generator = np.random.RandomState(seed & 0xFFFFFFFF)

    def _uniform(self, count: int) -> np.ndarray:
        bits = self._generator.randint(0, 2**32, size=count, dtype=np.uint32)
        return (bits & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    @staticmethod
    def _box_muller(uniform: np.ndarray) -> np.ndarray:
        """uniforms (blocks, 16) → normals (blocks, 16)."""
        half = BLOCK // 2
        radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - uniform[:, :half]))
        angle = np.float32(2 * math.pi) * uniform[:, half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        """`torch.randn(shape, generator=…)` in float32, equal to about 4e-7. ValueError under 16 values."""
        count = math.prod(shape)
        if count < BLOCK:
            raise ValueError(f"a draw of {count} values: torch draws fewer than {BLOCK} in another way")
        uniform = self._uniform(count)
        whole = count // BLOCK * BLOCK
        values = np.empty(count, np.float32)
        values[:whole] = self._box_muller(uniform[:whole].reshape(-1, BLOCK)).reshape(-1)
        if whole < count:
            values[-BLOCK:] = self._box_muller(self._uniform(BLOCK).reshape(1, BLOCK))[0]
        return values.reshape(shape)
