"""Latent consistency distillation: teaches a base to draw in a few steps.

A LoRA is trained by Algorithm 1 of "LCM-LoRA" (Luo et al. 2023, arXiv 2311.05556). The teacher is the UNet
without its adapters, the student is the UNet with them, and the target is the UNet with a running mean of
them. One UNet in memory serves all three. With the method `tcd` the loss is that of "Trajectory Consistency
Distillation" (Zheng et al. 2024, arXiv 2402.19159), and all else is the same.

A complete UNet (`full`) is trained by Algorithm 1 of "Latent Consistency Models" (Luo et al. 2023, arXiv
2310.04378). The student is a copy of the teacher that also takes the guidance scale as an input.

With `finetune` there is no teacher: a complete LCM, or a LoRA on its base, is tuned to other pictures by that
paper's Algorithm 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcm_compile.checkpoint.checkpoint import refuse_inpainting
from lcm_compile.checkpoint.find import Checkpoint, open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.errors import CheckpointError, UsageError, unknown_name
from lcm_compile.lora.find import lora_digest
from lcm_compile.lora.read import Lora
from lcm_compile.stages.stage import guidance_embedding
from lcm_compile.system.cache import Digests
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
from lcm_compile.training.consistency import (
    Conditioning,
    Predict,
    Solver,
    distillation_loss,
    tuning_loss,
)
from lcm_compile.training.data import DEMO, NOISE, Data, generator, open_data
from lcm_compile.training.encode import Encoded, Encoder, encoded, with_no_prompt
from lcm_compile.training.finetune import add_adapters_of, check_tuning, open_lora
from lcm_compile.training.full import save_checkpoint, student_of
from lcm_compile.training.loop import Progress, RunningMean, Weights, copy_of, state_bytes, train
from lcm_compile.training.spec import Machine, TrainSpec, at_least_one, find_machine
from lcm_compile.training.state import State, open_state, settings_of

TARGET_DECAY = 0.95  # of the target's running mean, μ of the paper
WARM_UP = 100  # steps, or a tenth of all steps if that is fewer
# The fraction of all steps in which the learning rate falls. With a batch this small, a constant learning
# rate ends with noisy weights.
COOL_DOWN = 0.3

METHODS = ("lcm", "tcd")

# Guidance w (b,) → student, target and, unless an LCM is tuned, teacher
Networks = Callable[[Tensor], tuple[Predict, Predict, Predict | None]]


@dataclass(frozen=True)
class DistillSpec(TrainSpec):
    """The settings of one distillation.

    `data` is a folder or `demo`; for the demo base None means `demo`. `skip` is k of `consistency.py`, in
    timesteps, and w is drawn between `guidance_min` and `guidance_max`. `method` is one of METHODS. `full`
    trains the complete UNet. `finetune` tunes an LCM: the base, or the LoRA `lora` on it, which is a path or
    a hub id and decides the rank. Raises UsageError if a value is out of range or if settings exclude each
    other.
    """

    batch: int = 12
    skip: int = 20
    guidance_min: float = 3.0
    guidance_max: float = 15.0
    method: str = "lcm"
    full: bool = False
    finetune: bool = False
    lora: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("skip", self.skip)
        for name in ("guidance_min", "guidance_max"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name.replace('_', '-')} must be a number of at least 0, not {value}")
        if self.guidance_min > self.guidance_max:
            raise UsageError(f"guidance-min {self.guidance_min} is above guidance-max {self.guidance_max}")
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if self.full and self.method != "lcm":
            raise UsageError(f"--method {self.method} trains a LoRA, not a complete UNet", "drop --full")
        if self.full and self.finetune:
            raise UsageError(
                "--full and --finetune exclude each other: --full makes a full LCM, --finetune tunes one",
                "drop one of the two",
            )
        if self.lora is not None and not self.finetune:
            raise UsageError("--lora is the LoRA that is tuned", "add --finetune, or drop --lora")


def distill(
    spec: DistillSpec, out: Path, resume: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Generator[Progress, None, Path]:
    """Makes a few-step LoRA or a complete LCM of a base. Yields after every step, and finally returns `out`.

    The request is checked before this returns, and weights are loaded at the first step. `tell` is called
    with each remark about how the base was read. `out` is written
    after the last step; until then a state file next to it lets `resume` continue the training.
    Raises UsageError if a setting or a path is wrong, CheckpointError if the base can't be read or is an LCM
    already, and LcmCompileError if the LoRA, the pictures or the state can't be read. A step raises
    LcmCompileError if the loss is no longer finite or if a file can't be written.
    """
    if spec.data is None and (spec.base != DEMO or spec.finetune):
        raise UsageError(
            f"no pictures to {'tune' if spec.finetune else 'distil'} {spec.base} on",
            "give a folder of captioned pictures to --data",
        )
    checkpoint = open_checkpoint(spec.base)
    check_base(checkpoint, spec)
    check_out(out, folder=writes_checkpoint(checkpoint, spec))
    for remark in checkpoint.notes:
        tell(remark)
    machine = find_machine(spec.mixed_precision)
    data = open_data(spec.data or DEMO, *checkpoint.default_size, spec.seed)
    digests, lora = {"data": data.digest()}, None
    if spec.lora is not None:
        lora = open_lora(spec.lora, checkpoint, spec.method)
        spec = replace(spec, rank=max(lora.ranks))
        digests["lora"] = lora_digest(lora.path, Digests())
    state = open_state(out, resume, settings_of(spec, checkpoint, machine, **digests))
    return run(spec, checkpoint, lora, machine, data, state, out)


def writes_checkpoint(checkpoint: Checkpoint, spec: DistillSpec) -> bool:
    """Returns whether the result is a complete UNet in a checkpoint, and not a LoRA."""
    return spec.full or (spec.finetune and checkpoint.has_guidance_embedding)


def check_base(checkpoint: Checkpoint, spec: DistillSpec) -> None:
    """Checks that a base can be trained as asked.

    Raises CheckpointError if it is an LCM already, and UsageError as `check_tuning` does, or if `skip` does
    not divide the number of its training timesteps.
    """
    base = checkpoint.base
    refuse_inpainting(checkpoint)
    if checkpoint.has_guidance_embedding and not spec.finetune:
        raise CheckpointError(
            f"{base} is an LCM already: its UNet takes the guidance scale",
            f"lcm-compile build --base {base} --no-lcm; or tune it to your pictures with --finetune",
        )
    if spec.finetune:
        check_tuning(checkpoint, spec.lora, spec.method)
    last = checkpoint.scheduler.num_train_timesteps
    if last % spec.skip:
        # LCM sampling starts at the last timestep. If that timestep is never trained, pictures are noise.
        usual = last // checkpoint.scheduler.original_inference_steps
        raise UsageError(
            f"skip {spec.skip} does not divide the {last} training timesteps", f"use --skip {usual}"
        )


def run(
    spec: DistillSpec,
    checkpoint: Checkpoint,
    lora: Lora | None,
    machine: Machine,
    data: Data,
    state: State,
    out: Path,
) -> Generator[Progress, None, Path]:
    """Loads the models, trains, and writes the result; yields after every step. See `distill`."""
    pictures, empty = prepare(checkpoint, data, machine)
    unet: Any = load_component(checkpoint, "unet")
    full = writes_checkpoint(checkpoint, spec)
    if full:
        weights, target, networks = full_networks(unet, spec, machine)
    else:
        weights, target, networks = lora_networks(unet, lora, spec, machine)
    output = sum(weight.numel() for weight in weights.values()) * (4 if full else 2)
    check_space(out, output + state_bytes(spec, weights, means=1))
    solver = Solver.of(checkpoint.scheduler, spec.skip, machine.device)
    timesteps = solver.timesteps()

    def loss_of(numbers: Sequence[int]) -> Tensor:
        clean, prompts = pictures(numbers)
        drawn = draw(spec, numbers, clean.shape[1:], timesteps)
        noise, timestep, w, ends = (t.to(machine.device) for t in drawn)
        end = ends if spec.method == "tcd" else None
        student, target, teacher = networks(w)
        if teacher is None:
            return tuning_loss(student, target, clean, noise, timestep, prompts, solver, end)
        pair = with_no_prompt(prompts, empty)
        return distillation_loss(student, target, teacher, clean, noise, timestep, w, pair, solver, end)

    means = {"target": RunningMean(target, TARGET_DECAY)}
    final = yield from train(spec, machine, weights, means, loss_of, rate, state)
    if machine.main:
        if full:
            save_checkpoint(final, checkpoint, out)
        else:
            save_lora(kohya_tensors(final), out, describe(spec, checkpoint))
        state.remove()
    return out


def prepare(checkpoint: Checkpoint, data: Data, machine: Machine) -> tuple[Encoded, Conditioning]:
    """Returns the function that encodes pictures by number, and the conditioning without a prompt."""
    encoder = Encoder(checkpoint, machine.device)
    return encoded(data, encoder, machine.device), encoder.no_prompt()


def lora_networks(
    unet: Any, lora: Lora | None, spec: DistillSpec, machine: Machine
) -> tuple[Weights, Weights, Networks]:
    """Returns the trained weights, the target's initial weights, and the networks, which share one UNet.

    They begin as `lora`, or as a LoRA that changes nothing.
    """
    if lora is None:
        add_lora(unet, spec.rank, ADAPTED, spec.seed)
    else:
        add_adapters_of(unet, lora)
    place(unet, machine)
    if spec.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    weights = trained(unet)
    target = copy_of(weights)
    networks = (
        predict_with(unet, machine),
        predict_with(unet, machine, target),
        None if spec.finetune else predict_without_lora(unet, machine),
    )
    return weights, target, lambda w: networks


def full_networks(teacher: Any, spec: DistillSpec, machine: Machine) -> tuple[Weights, Weights, Networks]:
    """Returns the same for a complete UNet.

    The student is a copy of the teacher, or an LCM that is tuned and has none. It and its target take the
    guidance scale as an input.
    """
    student = teacher.requires_grad_(True) if spec.finetune else student_of(teacher)
    for unet in (teacher, student):
        place(unet, machine)
    if spec.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    weights = trained(student)
    target = copy_of(weights)

    def networks(w: Tensor) -> tuple[Predict, Predict, Predict | None]:
        embedding = guidance_embedding(w.cpu(), student.config.time_cond_proj_dim).to(w.device)
        return (
            predict_with(student, machine, guidance=embedding),
            predict_with(student, machine, target, embedding),
            None if spec.finetune else predict_with(teacher, machine),
        )

    return weights, target, networks


def rate(step: int, steps: int) -> float:
    """Returns the learning rate at a step, counted from 1, as a fraction of `lr`.

    It rises linearly, stays at 1, and then falls linearly to nearly 0.
    """
    rising = step / min(WARM_UP, math.ceil(steps / 10))
    falling = (steps - step + 1) / math.ceil(COOL_DOWN * steps)
    return min(1.0, rising, falling)


def draw(
    spec: DistillSpec, numbers: Sequence[int], shape: Sequence[int], timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws the noise (b, *shape), timesteps (b,), guidance w (b,) and ends s (b,) of pictures by number.

    `shape` is that of one latent, and `timesteps` are the ones to choose from. Each s lies from 0 to t_n. The
    values are the same on every machine.
    """
    generators = [generator(NOISE, spec.seed, n) for n in numbers]
    noise = np.stack([g.standard_normal(shape, np.float32) for g in generators])
    timestep = timesteps[[int(g.integers(len(timesteps))) for g in generators]]
    w = torch.tensor([g.uniform(spec.guidance_min, spec.guidance_max) for g in generators])
    earlier = (timestep - spec.skip).clamp(min=0)
    end = torch.tensor([int(g.integers(t + 1)) for g, t in zip(generators, earlier.tolist(), strict=True)])
    return torch.from_numpy(noise), timestep, w, end
