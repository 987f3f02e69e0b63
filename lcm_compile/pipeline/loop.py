"""The work of a picture on the device: the context, the steps and the decoding.

It calls the runners, and adds and multiplies the arrays that they return. It never reads a value on the host,
so that the stages can be captured as CUDA graphs: see cuda_graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from lcm_compile.engines.runner import Array, Runner
from lcm_compile.pipeline.control import Control, control_stages
from lcm_compile.samplers.step import Step

Arrays = dict[str, Any]
Runners = Mapping[str, Runner]
NOTHING: Mapping[str, Any] = MappingProxyType({})
# The latent (b, c, h, w), and the x̂0 of the step before it, None before the first step.
State = tuple[Array, Array | None]


@dataclass(frozen=True)
class Loop:
    """The steps and the decoding of pictures with one or two prompts.

    `conditions` has a list for the prompt and, if a second pass guides the picture by `scale` (1,), another
    for the negative prompt. Each list has an entry for each step: the inputs of the step stage for this text.
    `coefficients` has an entry for each step as well, empty if the step stage takes none. `rescale` is the
    share of guidance rescale: see guided. `loras` are the LoRA inputs of the step stage. `control` is what
    guides both passes by pictures.
    """

    runners: Runners
    steps: Sequence[Step]
    coefficients: Sequence[Arrays]
    conditions: Sequence[Sequence[Arrays]]
    scale: Array
    rescale: float = 0.0
    loras: Arrays = field(default_factory=dict)
    control: Control | None = None

    def step(self, i: int, state: State, fresh: Array | None, masked: Mapping[str, Array] = NOTHING) -> State:
        """Returns the state after step i, in memory of its own.

        `fresh` is the noise to add, of the latent's shape, or None if the step adds none. `masked` has the
        input MASKED, if the step takes it.
        """
        sampler_step, step = self.steps[i], self.runners["step"]
        latent, previous = state
        inputs = {
            "latent": latent,
            # Where there is none, any finite array will do: its coefficient is 0.
            "noise": latent if fresh is None else fresh,
            "previous_x0": latent if previous is None else previous,
            **self.coefficients[i],
            **self.loras,
            **masked,
        }
        given = step(self.controlled(i, {**inputs, **self.conditions[0][i]}))
        if len(self.conditions) > 1:
            output = step.kept(given["prediction"])
            plain = step(self.controlled(i, {**inputs, **self.conditions[1][i]}))["prediction"]
            return sampler_step(latent, guided(output, plain, self.scale, self.rescale), fresh, previous)
        if "next_latent" in given:
            return step.kept(given["next_latent"]), step.kept(given["x0"])
        return sampler_step(latent, given["prediction"], fresh, previous)

    def keep(self, state: State, kept: tuple[Array, Array]) -> State:
        """Returns the state whose latent is m·latent + k, for arrays (m, k): what a mask keeps is k."""
        repainted, other = kept
        return state[0] * repainted + other, state[1]

    def controlled(self, i: int, inputs: Arrays) -> Arrays:
        """Returns the inputs of step i, with what ControlNets and T2I-Adapters add."""
        return {**inputs, **self.control.added(self.runners, i, inputs)} if self.control else inputs

    def decode(self, latent: Array) -> Array:
        """Returns the pictures (b, height, width, 3), valid until the next call of the decoder."""
        return self.runners["decode"]({"latent": latent})["picture"]


def guided(output: Array, plain: Array, scale: Array, rescale: float) -> Array:
    """Returns the UNet's output for a prompt, guided away from the `plain` one (classifier-free guidance).

    A share `rescale` of the result gets the standard deviation that each picture's `output` has, as in Lin et
    al. 2023 (arXiv 2305.08891), section 3.4.
    """
    result = plain + scale * (output - plain)
    if rescale == 0:
        return result
    axes = (1, 2, 3)

    def deviation(array: Array) -> Array:
        centred = array - array.mean(axes, keepdims=True)
        return (centred * centred).mean(axes, keepdims=True) ** 0.5

    return result * (rescale * (deviation(output) / deviation(result)) + (1 - rescale))


def reads_text(runners: Runners) -> Runner:
    """Returns the stage that takes the text states: the context if there is one, or the step."""
    return runners.get("context", runners["step"])


def takes(runners: Runners, name: str) -> bool:
    """Returns whether the context or the step has an input of this name."""
    stages = [runners[stage] for stage in ("context", "step") if stage in runners]
    return any(spec.name == name for stage in stages for spec in stage.contract.inputs)


def put_timesteps(runners: Runners, timesteps: Sequence[float]) -> list[Array]:
    """Returns the timesteps on the device, as arrays of the length that one call of their stage takes.

    The last timestep is repeated to fill the last array.
    """
    runner = reads_text(runners)
    shapes = {spec.name: spec.shape for spec in runner.contract.inputs}
    at_once = shapes.get("timesteps", (1,))[0]
    padded = [*timesteps, *[timesteps[-1]] * (-len(timesteps) % at_once)]
    return [runner.to_device(row) for row in np.asarray(padded, np.float32).reshape(-1, at_once)]


def put_coefficients(runners: Runners, steps: Sequence[Step]) -> list[Arrays]:
    """Returns the coefficients input for each step, or {} if the step stage has no arithmetic.

    Each has its own memory, because TensorRT needs every address to be a multiple of 256.
    """
    if not takes(runners, "coefficients"):
        return [{} for _ in steps]
    to_device = runners["step"].to_device
    return [{"coefficients": to_device(np.asarray(step.coefficients, np.float32))} for step in steps]


def conditions_of(runners: Runners, text: Arrays, times: Sequence[Array], keep: bool = True) -> list[Arrays]:
    """Returns the step's other inputs for a text: one dict for each timestep of `put_timesteps`. See Loop.

    With `keep` False they are the context's own output memory, which its next call overwrites.
    """
    context = runners.get("context")
    if context is None:
        return [{**text, "timestep": time} for time in times]
    shared: Arrays = {}
    at: list[Array] = []
    # ControlNets compute their own context, and read what the UNet's is computed from.
    own = {**text} if control_stages(runners) else {}
    for some in times:
        arrays = context({**text, "timesteps": some})
        kept = context.kept if keep else lambda array: array
        shared = shared or {name: kept(array) for name, array in arrays.items() if name != "times"}
        at += [context.kept(arrays["times"][i]) for i in range(len(some))]
    return [{**own, **shared, "time": time} for time in at]
