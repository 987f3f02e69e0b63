"""The functions that the demo model's training stages share: scenes, saving, progress and learning rate."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcm_compile.demo.world import DAY, Look, caption, render, sample_scene
from lcm_compile.system.files import replacing_output

SIDE = 64  # pixels along each side of a picture
SHARD = 4096  # scenes in one file of the latent pool
SAVE_SECONDS = 60.0  # between saved states
REPORT_STEPS = 50  # between lines of progress


def save_atomically(state: Any, path: Path) -> None:
    """Saves a state so that a killed process leaves either the old file or the new one."""
    with replacing_output(path) as partial:
        torch.save(state, partial)


class Progress:
    """Prints the progress of a training stage on stderr, and decides when its state is saved."""

    def __init__(self, name: str, first: int, steps: int) -> None:
        self.name, self.steps, self.reported = name, steps, first
        self.losses: list[Tensor] = []
        self.since = self.saved = time.monotonic()

    def __call__(self, step: int, loss: Tensor) -> bool:
        """Records the loss of a finished step, and returns whether the state must be saved now."""
        self.losses.append(loss.detach())
        now = time.monotonic()
        if step % REPORT_STEPS == 0 or step == self.steps:
            rate = (step - self.reported) / (now - self.since)
            mean = torch.stack(self.losses).mean().item()
            eta = (self.steps - step) / rate / 60
            line = f"{self.name} {step}/{self.steps} loss {mean:.4f} {rate:.2f} steps/s eta {eta:.0f} min"
            print(line, file=sys.stderr, flush=True)
            self.losses, self.since, self.reported = [], now, step
        due = now - self.saved > SAVE_SECONDS or step == self.steps
        if due:
            self.saved = now
        return due


def learning_rate(step: int, steps: int, peak: float, warm_up: int, decay_last: int) -> float:
    """Returns the learning rate at a step.

    It rises linearly to `peak` over `warm_up` steps, stays there, and falls linearly to 2 % of `peak` over
    the last `decay_last` steps.
    """
    rise = min(1.0, (step + 1) / warm_up)
    fall = min(1.0, (steps - step) / decay_last) if decay_last else 1.0
    return peak * rise * max(fall, 0.02)


def draw(seed: int, count: int, look: Look = DAY, zebra: float = 0.0) -> tuple[Tensor, list[str]]:
    """Draws random training scenes: uint8 pictures (count, 3, 64, 64) and their captions.

    `zebra` is the probability of zebra style.
    """
    rng = np.random.default_rng(seed)
    pictures, captions = np.empty((count, SIDE, SIDE, 3), np.uint8), []
    for index in range(count):
        scene = sample_scene(rng, zebra=zebra)
        pictures[index] = render(scene, SIDE, look)
        captions.append(caption(scene))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), captions


def to_model(pictures: Tensor) -> Tensor:
    """Converts uint8 pictures to floats in the VAE's range of -1 to 1."""
    return pictures.float() / 127.5 - 1
