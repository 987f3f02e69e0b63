"""What leaves a GPU, on a stand-in for its memory: copies are done when the event after them is reached."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcm_compile.engines.tensors import TensorRunner
from lcm_compile.graphs import StageContract


class Drawing(TensorRunner):
    """An engine on a GPU that is not here."""

    def __call__(self, inputs):
        raise NotImplementedError

    def close(self):
        pass


@pytest.fixture
def queue(monkeypatch):
    """What the host has asked the GPU for and not waited for, and how often it waited."""
    asked, waits, pinned = [], [], []

    class Pinned:
        def __init__(self, shape, dtype):
            self.memory = torch.full(shape, 99, dtype=dtype)
            pinned.append(self)

        def copy_(self, tensor, non_blocking):
            assert non_blocking
            asked.append(lambda: self.memory.copy_(tensor))

        def numpy(self):
            return self.memory.numpy()

    class Event:
        def record(self):
            self.before = [*asked]

        def synchronize(self):
            for work in self.before:
                work()
            waits.append(len(self.before))
            asked.clear()

    def empty(shape, dtype, pin_memory):
        assert pin_memory
        return Pinned(shape, dtype)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    return waits


def test_a_picture_and_its_latent_leave_behind_one_event(queue):
    runner = Drawing(StageContract("decode", (), ()), "cuda")
    latent, picture = torch.randn(1, 4, 8, 8), torch.arange(192, dtype=torch.uint8).reshape(1, 8, 8, 3)
    for expected, found in zip((latent, picture), runner.all_to_host([latent, picture]), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())
    assert queue == [2]
    np.testing.assert_array_equal(runner.to_host(picture), picture.numpy())
    assert queue == [2, 1]


def test_on_a_processor_nothing_is_copied():
    runner = Drawing(StageContract("decode", (), ()), "cpu")
    picture = torch.arange(192, dtype=torch.uint8)
    [found] = runner.all_to_host([picture])
    assert found.ctypes.data == picture.data_ptr()
