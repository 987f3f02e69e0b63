"""The pipeline of a bundle whose one engine draws a whole picture: tokens and noises in, picture out."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.engines.runner import Runner
from lcm_compile.errors import UsageError
from lcm_compile.graphs import DRAW, StageContract, TensorSpec
from lcm_compile.pipeline.noise import TorchNoise
from lcm_compile.pipeline.pipeline import Drawing, LcmPipeline, check_drawn, eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.scheduler import lcm_steps

NO_CUDA_GRAPH = "not used: one engine draws the whole picture"
STAGED = "build without --whole-loop: its stages draw that too"


def open_pipeline(settings: PipelineSettings, runners: Mapping[str, Runner], *others: Any) -> LcmPipeline:
    """The pipeline for these runners; arguments as LcmPipeline's."""
    return (WholeLoop if DRAW in runners else LcmPipeline)(settings, runners, *others)


def inputs_of(contract: StageContract) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in contract.inputs}


def check_whole_loop(contract: StageContract, request: Request) -> None:
    """UsageError for a request that takes another number of steps, or a second pass."""
    takes = inputs_of(contract)
    steps = takes["noise"].shape[0]
    if request.steps != steps:
        raise UsageError(
            f"this bundle is one graph of {steps} steps, and can't draw in {request.steps}", STAGED
        )
    if request.negative_prompt:
        raise UsageError("this bundle is one graph without a second pass for a negative prompt", STAGED)
    if request.guidance_scale > 1 and "guidance" not in takes:
        raise UsageError(
            f"this bundle is one graph without a second pass, and can't be guided by "
            f"{request.guidance_scale:g}; 1 is unguided",
            STAGED,
        )


class WholeLoop(LcmPipeline):
    """As LcmPipeline, of one runner. No prompt is remembered: the text encoders are part of the graph."""

    def progress(self, request: Request) -> Generator[tuple[int, int], None, Drawing]:
        """Draws, yielding (calls done, calls in all) after each; UsageError as check_whole's."""
        runner, batch = self.runners[DRAW], self.settings.shape.batch
        check_whole_loop(runner.contract, request)
        start, mark = time.perf_counter(), runner.mark()
        given, cut = self.conditions_of(request)
        # The order in which diffusers asks its generator: one draw for all pictures at the start, and one
        # after every step but the last.
        count, _, *latent = inputs_of(runner.contract)["noise"].shape
        draw = TorchNoise(request.seed)
        noise = np.stack([draw((request.num_images, *latent)) for _ in range(count)])
        pictures: list[np.ndarray] = []
        floats: list[np.ndarray] = []
        chunks = range(0, request.num_images, batch)
        for i, first in enumerate(chunks):
            rows = np.minimum(np.arange(first, first + batch), request.num_images - 1)
            own = runner.to_device(np.ascontiguousarray(noise[:, rows]))
            picture = runner.to_host(runner({**given, "noise": own})["picture"])
            pictures.append(np.array(eight_bits(picture[: request.num_images - first])))
            floats += [np.array(picture)] if picture.dtype != np.uint8 else []
            yield i + 1, len(chunks)
        joined = np.concatenate(pictures)
        check_drawn(joined, floats)
        ms = runner.between(mark, runner.mark()), (time.perf_counter() - start) * 1000
        return Drawing(joined, {DRAW: ms[0], "total": ms[1], "load": self.load_ms}, cut, NO_CUDA_GRAPH)

    def conditions_of(self, request: Request) -> tuple[dict[str, Any], str]:
        """All inputs but the noise, and the part of the prompt that did not fit."""
        runner = self.runners[DRAW]
        arrays, cut = self.prompts.tokens(request.prompt)
        steps = lcm_steps(request.steps, self.settings.scheduler)
        arrays["timesteps"] = np.asarray([step.timestep for step in steps], np.float32)
        arrays["coefficients"] = np.asarray([step.coefficients for step in steps], np.float32)
        if "guidance" in inputs_of(runner.contract):
            arrays["guidance"] = np.asarray([request.guidance_scale - 1], np.float32)
        return {name: runner.to_device(array) for name, array in arrays.items()}, cut
