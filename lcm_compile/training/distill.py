"""Latent consistency distillation: teaches a base to draw in a few steps.

Of a LoRA, Algorithm 1 of "LCM-LoRA" (Luo et al. 2023, arXiv 2311.05556): the teacher is the UNet without its
adapters, the student the UNet with them, and the target the UNet with a running mean of them; one UNet in
memory serves all three. Of the whole UNet (`full`), Algorithm 1 of "Latent Consistency Models" (Luo et al.
2023, arXiv 2310.04378): the student is a copy of the teacher that is also told the guidance scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcm_compile.checkpoint.find import Checkpoint, open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.errors import CheckpointError, UsageError
from lcm_compile.stages.stage import guidance_embedding
from lcm_compile.system.files import check_out, check_space
from lcm_compile.training.adapters import (
    ADAPTED,
    add_lora,
    describe,
    kohya_tensors,
    place,
    predict_with,
    predict_without_lora,
    save_lora,
    trained,
)
from lcm_compile.training.consistency import Conditioning, Predict, Solver, distillation_loss
from lcm_compile.training.data import DEMO, NOISE, Data, generator, open_data
from lcm_compile.training.encode import Encoded, Encoder, encoded, with_no_prompt
from lcm_compile.training.full import save_checkpoint, student_of
from lcm_compile.training.loop import Progress, RunningMean, Weights, copy_of, state_bytes, train
from lcm_compile.training.spec import Machine, TrainSpec, at_least_one, find_machine
from lcm_compile.training.state import State, open_state, settings_of

TARGET_DECAY = 0.95  # μ of the paper
WARM_UP = 100  # steps, or a tenth of them all if that is fewer
COOL_DOWN = 0.3  # of all steps: with a batch this small the last weights of a constant rate are noisy ones

# Guidance (b,) → student, target and teacher
Networks = Callable[[Tensor], tuple[Predict, Predict, Predict]]


@dataclass(frozen=True)
class DistillSpec(TrainSpec):
    """One distillation, as asked for. `data` is a folder or `demo`, which is also the demo base's default."""

    batch: int = 12
    skip: int = 20
    guidance_min: float = 3.0
    guidance_max: float = 15.0
    full: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("skip", self.skip)
        for name in ("guidance_min", "guidance_max"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name.replace('_', '-')} must be a number of at least 0, not {value}")
        if self.guidance_min > self.guidance_max:
            raise UsageError(f"guidance-min {self.guidance_min} is above guidance-max {self.guidance_max}")


def distill(spec: DistillSpec, out: Path, resume: bool = False) -> Generator[Progress, None, Path]:
    """Distils a base into an LCM-LoRA, or a whole LCM; yields after every step, returns `out` once written.

    All that can be wrong with the request is found before this returns; weights are loaded at the first
    step. Nothing is at `out` before the last one; a state beside it serves `resume`. UsageError,
    CheckpointError, LcmCompileError.
    """
    if spec.data is None and spec.base != DEMO:
        raise UsageError(
            f"no pictures to distil {spec.base} on", "give a folder of captioned pictures to --data"
        )
    check_out(out, folder=spec.full)
    checkpoint = open_checkpoint(spec.base)
    check_teacher(checkpoint, spec.skip)
    machine = find_machine(spec.mixed_precision)
    data = open_data(spec.data or DEMO, *checkpoint.default_size, spec.seed)
    state = open_state(out, resume, settings_of(spec, checkpoint, machine, data=data.digest()))
    return run(spec, checkpoint, machine, data, state, out)


def check_teacher(checkpoint: Checkpoint, skip: int) -> None:
    if checkpoint.has_guidance_embedding:
        raise CheckpointError(
            f"{checkpoint.base} is an LCM already: its UNet takes the guidance scale",
            f"lcm-compile build --base {checkpoint.base} --no-lcm",
        )
    last = checkpoint.scheduler.num_train_timesteps
    if last % skip:
        # LCM sampling starts at the last timestep: one that is never trained would draw noise.
        usual = last // checkpoint.scheduler.original_inference_steps
        raise UsageError(f"skip {skip} does not divide the {last} training timesteps", f"use --skip {usual}")


def run(
    spec: DistillSpec, checkpoint: Checkpoint, machine: Machine, data: Data, state: State, out: Path
) -> Generator[Progress, None, Path]:
    pictures, empty = prepare(checkpoint, data, machine)
    unet: Any = load_component(checkpoint, "unet")
    if spec.full:
        weights, target, networks = whole_networks(unet, spec, machine)
    else:
        weights, target, networks = lora_networks(unet, spec, machine)
    output = sum(weight.numel() for weight in weights.values()) * (4 if spec.full else 2)
    check_space(out, output + state_bytes(spec, weights, means=1))
    solver = Solver.of(checkpoint.scheduler, spec.skip, machine.device)
    timesteps = solver.timesteps()

    def loss_of(numbers: Sequence[int]) -> Tensor:
        clean, prompts = pictures(numbers)
        drawn = draw(spec, numbers, clean.shape[1:], timesteps)
        noise, timestep, w = (t.to(machine.device) for t in drawn)
        pair = with_no_prompt(prompts, empty)
        return distillation_loss(*networks(w), clean, noise, timestep, w, pair, solver)

    means = {"target": RunningMean(target, TARGET_DECAY)}
    final = yield from train(spec, machine, weights, means, loss_of, rate, state)
    if machine.main:
        if spec.full:
            save_checkpoint(final, checkpoint, out)
        else:
            save_lora(kohya_tensors(final, spec.rank), out, describe(spec, checkpoint))
        state.remove()
    return out


def prepare(checkpoint: Checkpoint, data: Data, machine: Machine) -> tuple[Encoded, Conditioning]:
    """The pictures by number, and what the UNet is told without a prompt."""
    encoder = Encoder(checkpoint, machine.device)
    return encoded(data, encoder, machine.device), encoder.no_prompt()


def lora_networks(unet: Any, spec: DistillSpec, machine: Machine) -> tuple[Weights, Weights, Networks]:
    """What is trained, the start of the target's, and the three networks that are one UNet."""
    add_lora(unet, spec.rank, ADAPTED, spec.seed)
    place(unet, machine)
    if spec.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    weights = trained(unet)
    target = copy_of(weights)
    three = (
        predict_with(unet, machine),
        predict_with(unet, machine, target),
        predict_without_lora(unet, machine),
    )
    return weights, target, lambda w: three


def whole_networks(teacher: Any, spec: DistillSpec, machine: Machine) -> tuple[Weights, Weights, Networks]:
    """The same with a student of its own, which knows the guidance scale, as its target does."""
    student = student_of(teacher)
    for unet in (teacher, student):
        place(unet, machine)
    if spec.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    weights = trained(student)
    target = copy_of(weights)

    def networks(w: Tensor) -> tuple[Predict, Predict, Predict]:
        told = guidance_embedding(w.cpu(), student.config.time_cond_proj_dim).to(w.device)
        return (
            predict_with(student, machine, guidance=told),
            predict_with(student, machine, target, told),
            predict_with(teacher, machine),
        )

    return weights, target, networks


def rate(step: int, steps: int) -> float:
    """The part of the learning rate at a step counted from 1: a warm-up, then constant, then down to 0."""
    rising = step / min(WARM_UP, math.ceil(steps / 10))
    falling = (steps - step + 1) / math.ceil(COOL_DOWN * steps)
    return min(1.0, rising, falling)


def draw(
    spec: DistillSpec, numbers: Sequence[int], shape: Sequence[int], timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The noise, timesteps (b,) and guidance (b,) of pictures: the same draws on any machine."""
    generators = [generator(NOISE, spec.seed, n) for n in numbers]
    noise = np.stack([g.standard_normal(shape, np.float32) for g in generators])
    timestep = timesteps[[int(g.integers(len(timesteps))) for g in generators]]
    w = torch.tensor([g.uniform(spec.guidance_min, spec.guidance_max) for g in generators])
    return torch.from_numpy(noise), timestep, w
