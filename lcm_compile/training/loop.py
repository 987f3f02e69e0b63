"""The training loop that `distill` and `train-lora` share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcm_compile.errors import LcmCompileError
from lcm_compile.training.spec import Machine, TrainSpec
from lcm_compile.training.state import State

LARGEST_NORM = 1.0  # gradients are clipped to this norm

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """A finished step, counted from 1, the number of all steps, and the losses of all steps so far."""

    step: int
    total: int
    losses: list[float]

    @property
    def loss(self) -> float:
        """The loss of this step."""
        return self.losses[-1]


@dataclass
class RunningMean:
    """A running mean of the trained weights: the target of distillation, and the weights that --ema writes.

    With `rises` the decay at step n is at most n / (9 + n), as in diffusers' EMAModel, so that the initial
    weights are forgotten sooner.
    """

    weights: Weights
    decay: float
    rises: bool = False

    @torch.no_grad()
    def follow(self, weights: Weights, step: int) -> None:
        """Updates the mean with the weights after a step, counted from 1."""
        decay = self.decay
        if self.rises:
            decay = min(decay, step / (9 + step)) if step > 1 else 0.0
        torch._foreach_lerp_(list(self.weights.values()), list(weights.values()), 1 - decay)


def copy_of(weights: Weights) -> Weights:
    """Returns copies of the weights, without gradients."""
    return {name: weight.detach().clone() for name, weight in weights.items()}


def state_bytes(spec: TrainSpec, weights: Weights, means: int) -> int:
    """Returns the bytes of two states, because a state stays on the disk until its successor is complete.

    A state holds the weights, Adam's two moments, `means` running means and the EMA, all in fp32. Returns 0
    if the training is too short to save one.
    """
    if spec.steps <= spec.save_every:
        return 0
    copies = 3 + means + (spec.ema > 0)
    return 2 * 4 * copies * sum(weight.numel() for weight in weights.values())


def batches(spec: TrainSpec, machine: Machine, step: int) -> Iterator[range]:
    """Yields the numbers of the pictures that this process trains on in a step, one batch at a time."""
    share = spec.batch * spec.gradient_accumulation
    start = ((step - 1) * machine.processes + machine.process) * share
    for first in range(start, start + share, spec.batch):
        yield range(first, first + spec.batch)


def train(
    spec: TrainSpec,
    machine: Machine,
    weights: Weights,
    means: dict[str, RunningMean],
    loss_of: Callable[[range], Tensor],
    rate: Callable[[int, int], float],
    state: State,
) -> Generator[Progress, None, Weights]:
    """Trains `weights` in place. Yields after every step, and returns the weights to write.

    `loss_of` returns the loss of a batch, given its picture numbers; a step minimises the mean over its
    batches. `rate(step, steps)` returns the learning rate as a fraction of `spec.lr`. `means` are updated
    after every step. If `state` was loaded from a file, training continues after the last step in it.
    Raises LcmCompileError if the loss is no longer finite or if the state can't be written.
    """
    if spec.ema:
        means = {**means, "ema": RunningMean(copy_of(weights), spec.ema, rises=True)}
    parameters = list(weights.values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=1e-2)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    losses: list[float] = []
    if state.saved is not None:
        restore(state.saved, weights, means, optimizer, scaler)
        losses = list(state.saved["losses"])
        state.saved.clear()  # closes the file, which is memory-mapped
    for step in range(len(losses) + 1, spec.steps + 1):
        loss = differentiate(spec, machine, parameters, loss_of, scaler, step)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        # In fp16 gradients overflow now and then. The scaler then skips the step and lowers its scale, so
        # only the loss is checked.
        if not (loss if scaler.is_enabled() else norm).isfinite():
            raise LcmCompileError(f"step {step}: the loss is no longer finite", f"try --lr {spec.lr / 10:g}")
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * rate(step, spec.steps)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        for mean in means.values():
            mean.follow(weights, step)
        losses.append(loss.item())
        if machine.main and step % spec.save_every == 0 and step < spec.steps:
            state.write(
                {
                    "losses": losses,
                    "weights": weights,
                    "means": {name: mean.weights for name, mean in means.items()},
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                }
            )
        yield Progress(step, spec.steps, losses)
    return means["ema"].weights if spec.ema else weights


def differentiate(
    spec: TrainSpec,
    machine: Machine,
    parameters: list[Tensor],
    loss_of: Callable[[range], Tensor],
    scaler: torch.amp.GradScaler,
    step: int,
) -> Tensor:
    """Adds a step's gradients to the parameters, and returns its loss.

    Both are means over the step's batches and all processes.
    """
    from accelerate.utils import reduce

    loss = torch.zeros((), device=machine.device)
    # The block includes the backward pass, because gradient checkpointing repeats the forward pass in it.
    with machine.attention():
        for numbers in batches(spec, machine, step):
            batch_loss = loss_of(numbers) / spec.gradient_accumulation
            scaler.scale(batch_loss).backward()
            loss += batch_loss.detach()
    if machine.processes > 1:
        loss = reduce(loss, "mean")
        for parameter in parameters:
            parameter.grad = reduce(parameter.grad, "mean")
    return loss


def restore(
    saved: dict[str, Any],
    weights: Weights,
    means: dict[str, RunningMean],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Loads a saved state into the weights, the running means, the optimizer and the scaler."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved["weights"][name])
        for kind, mean in means.items():
            for name, weight in mean.weights.items():
                weight.copy_(saved["means"][kind][name])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
