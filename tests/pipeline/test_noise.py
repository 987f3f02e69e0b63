"""Noise equals torch's own draws, for every seed and length that a picture asks for."""

import numpy as np
import pytest
import torch

from lcm_compile.pipeline.noise import TorchNoise


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31 - 1, 2**32 - 1, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize(
    "shape", [(1, 4, 16, 16), (3, 4, 8, 8), (1, 4, 17, 13), (2, 4, 34, 26), (1, 4, 5, 1)]
)
def test_equals_torch_over_several_draws(seed, shape):
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = TorchNoise(seed)
    for _ in range(3):
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(noise(shape), expected, rtol=0, atol=2e-6)


def test_a_million_values():
    expected = torch.randn(1_000_003, generator=torch.Generator("cpu").manual_seed(3)).numpy()
    np.testing.assert_allclose(TorchNoise(3)((1_000_003,)), expected, rtol=0, atol=2e-6)


def test_seeds_differ():
    assert not np.allclose(TorchNoise(0)((4, 8)), TorchNoise(1)((4, 8)))


def test_too_short_a_draw_is_refused():
    with pytest.raises(ValueError, match="15 values"):
        TorchNoise(0)((15,))
