"""The pipeline of a bundle whose single engine draws a complete picture from tokens and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lcm_compile.engines.runner import Runner
from lcm_compile.errors import UsageError
from lcm_compile.graphs import DRAW, StageContract, TensorSpec
from lcm_compile.pipeline.drawing import Clock, Drawing, Pictures, Previews, Show, batches_of
from lcm_compile.pipeline.noise import Noise
from lcm_compile.pipeline.pipeline import LcmPipeline, Pipeline, Progress
from lcm_compile.pipeline.prompts import Condition, condition_of, cut_of, ids_of, numbers_of
from lcm_compile.pipeline.request import Request
from lcm_compile.samplers import schedule
from lcm_compile.samplers.step import Schedule

NO_CUDA_GRAPH = "not used: one engine draws the complete picture"
STAGED = "build without --whole-loop; such a bundle can draw it"


def inputs_of(contract: StageContract) -> dict[str, TensorSpec]:
    """Returns the inputs of a stage by name."""
    return {spec.name: spec for spec in contract.inputs}


def check_whole_loop(contract: StageContract, request: Request) -> None:
    """Raises UsageError if a request has another number of steps than the graph, or needs a second pass."""
    takes = inputs_of(contract)
    steps = takes["noise"].shape[0]
    if request.steps != steps:
        raise UsageError(
            f"this bundle is one graph of {steps} steps, and can't draw in {request.steps}", STAGED
        )
    if request.negative_prompt and "guidance" not in takes:
        raise UsageError("this bundle is one graph without a second pass for a negative prompt", STAGED)
    if request.guidance_scale > 1 and "guidance" not in takes:
        raise UsageError(
            f"this bundle is one graph without a second pass, and can't be guided by "
            f"{request.guidance_scale:g}; 1 is unguided",
            STAGED,
        )


class WholeLoopPipeline(Pipeline):
    """The pipeline of a bundle with a single engine, which encodes the prompt in every call."""

    def passes(self, pictures: Sequence[Request], show: Show, previews: Previews) -> Progress:
        """Draws pictures. Yields (calls done, calls in total) after every call; returns the drawing.

        No step can be seen, so there are no previews.

        Raises UsageError as check_whole_loop does, and BackendError if the engine returns NaN.
        """
        runner, request = self.runners[DRAW], pictures[0]  # all are alike in what is read from it
        for picture in pictures:
            check_whole_loop(runner.contract, picture)
        clock = Clock(runner, (DRAW,))
        plan = schedule(request.sampler, request.steps, self.settings.scheduler, request.eta)
        if plan.steps[-1].noise_scale:
            raise UsageError(
                f"{request.sampler} adds noise in its last step, which this one graph does not", STAGED
            )
        given = self.settings_for(condition_of(pictures[:1], self.settings.shape), plan)
        draws, _, *latent = inputs_of(runner.contract)["noise"].shape
        noise = Noise(tuple(latent))
        drawn = Pictures(clock, show)
        batches = list(batches_of(pictures, self.settings.shape.batch))
        longest_cut = ""
        for i, (rows, kept) in enumerate(batches, 1):
            tokens = self.prompts.tokens(condition_of(rows, self.settings.shape))
            longest_cut = max(longest_cut, cut_of(tokens), key=len)
            later = (noise.draw(j, rows) for j in range(1, draws))
            own = np.stack([plan.first(noise.draw(0, rows)), *later])
            arrays = {**ids_of(tokens), "noise": own}
            inputs = {name: runner.to_device(array) for name, array in arrays.items()}
            clock.lap("")
            result = runner.to_host(runner({**given, **inputs})["picture"])
            clock.lap(DRAW)
            drawn.add(result, kept)
            yield i, len(batches)
        ms = {**clock.ms(), "load": self.load_ms}
        self.count_drawing()
        return Drawing(drawn.all(), ms, longest_cut, NO_CUDA_GRAPH)

    def settings_for(self, asked: Condition, plan: Schedule) -> dict[str, Any]:
        """Returns the inputs that all batches share, on the device: all but the tokens and the noise."""
        runner = self.runners[DRAW]
        arrays = {
            "timesteps": np.asarray([step.timestep for step in plan.steps], np.float32),
            "coefficients": np.asarray([step.coefficients for step in plan.steps], np.float32),
        }
        numbers = numbers_of(asked, self.settings.shape.batch)
        arrays |= {name: numbers[name] for name in numbers if name in inputs_of(runner.contract)}
        return {name: runner.to_device(array) for name, array in arrays.items()}


def pipeline_class(runners: Mapping[str, Runner]) -> type[Pipeline]:
    """Returns the class of pipeline that draws with these stages."""
    return WholeLoopPipeline if DRAW in runners else LcmPipeline
