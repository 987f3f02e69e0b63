"""The device's part of a picture: context, steps and decoding, with nothing of the host's between them.

It asks the runners, and adds and multiplies what they give; it never looks at a number. So its stages can be
captured as CUDA graphs: see captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcm_compile.engines.runner import Array, Runner
from lcm_compile.scheduler import LcmStep

Arrays = dict[str, Any]
Runners = Mapping[str, Runner]


@dataclass(frozen=True)
class Loop:
    """The steps and the decoding of pictures with one or two prompts.

    `conditions` are what the step takes besides latent and noise, for the prompt and, where a second pass
    guides it by `scale` (1,), for the negative one: an entry for each step. `coefficients` are the steps'.
    """

    runners: Runners
    steps: Sequence[LcmStep]
    coefficients: Sequence[Arrays]
    conditions: Sequence[Sequence[Arrays]]
    scale: Array

    def step(self, i: int, latent: Array, fresh: Array | None) -> Array:
        """The latent after step i, in memory of its own; `fresh` is noise, which the last step has not."""
        lcm_step, step = self.steps[i], self.runners["step"]
        inputs = {"latent": latent, "noise": latent if fresh is None else fresh, **self.coefficients[i]}
        given = step({**inputs, **self.conditions[0][i]})
        if len(self.conditions) > 1:
            output = given["prediction"] + 0  # the runner may reuse its output memory
            plain = step({**inputs, **self.conditions[1][i]})["prediction"]
            return lcm_step(latent, plain + self.scale * (output - plain), fresh)
        if "next_latent" in given:
            return given["next_latent"] + 0
        return lcm_step(latent, given["prediction"], fresh)

    def decode(self, latent: Array) -> Array:
        return self.runners["decode"]({"latent": latent})["picture"]


def reads_text(runners: Runners) -> Runner:
    """The stage that is given text."""
    return runners.get("context", runners["step"])


def takes(runners: Runners, name: str) -> bool:
    """Whether the stages that are given text take such an input too."""
    stages = [runners[stage] for stage in ("context", "step") if stage in runners]
    return any(spec.name == name for stage in stages for spec in stage.contract.inputs)


def put_timesteps(runners: Runners, timesteps: Sequence[float]) -> list[Array]:
    """Timesteps on the device: as many at once as the stage that reads them takes, the last one repeated."""
    runner = reads_text(runners)
    shapes = {spec.name: spec.shape for spec in runner.contract.inputs}
    at_once = shapes.get("timesteps", (1,))[0]
    padded = [*timesteps, *[timesteps[-1]] * (-len(timesteps) % at_once)]
    return [runner.to_device(row) for row in np.asarray(padded, np.float32).reshape(-1, at_once)]


def put_coefficients(runners: Runners, steps: Sequence[LcmStep]) -> list[Arrays]:
    """What each step takes that does its own LCM arithmetic; nothing for one that does not.

    Each in memory of its own: TensorRT wants every address to be a multiple of 256.
    """
    if not takes(runners, "coefficients"):
        return [{} for _ in steps]
    to_device = runners["step"].to_device
    return [{"coefficients": to_device(np.asarray(step.coefficients, np.float32))} for step in steps]


def conditions_of(runners: Runners, text: Arrays, times: Sequence[Array], keep: bool = True) -> list[Arrays]:
    """What the step takes for a text, with each of the timesteps of `put_timesteps`; see Loop.

    With `keep` False what the context gives is read where it lies, and valid until it is called again.
    """
    context = runners.get("context")
    if context is None:
        return [{**text, "timestep": time} for time in times]
    shared: Arrays = {}
    at: list[Array] = []
    for some in times:
        arrays = context({**text, "timesteps": some})
        shared = shared or {n: array + 0 if keep else array for n, array in arrays.items() if n != "times"}
        at += [arrays["times"][i] + 0 for i in range(len(some))]
    return [{**shared, "time": time} for time in at]
