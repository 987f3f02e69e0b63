"""The LCM loop: prompt and seed → encode → step × N → decode → pictures.

It reads stage contracts and settings, never a family or a backend; it needs neither torch nor diffusers
unless an engine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.engines.cuda_graph import Capturer
from lcm_compile.engines.runner import Runner
from lcm_compile.errors import BackendError
from lcm_compile.graphs import STAGES
from lcm_compile.pipeline.cuda_graphs import SWITCHED_OFF, CapturedLoop, CudaGraphs
from lcm_compile.pipeline.loop import Loop, put_coefficients, put_timesteps, takes
from lcm_compile.pipeline.noise import TorchNoise
from lcm_compile.pipeline.prompts import Prompts
from lcm_compile.pipeline.request import Request, draw_seed
from lcm_compile.pipeline.tokenizer import PromptTokenizer
from lcm_compile.scheduler import LcmStep, lcm_steps

if TYPE_CHECKING:
    from PIL.Image import Image

PassReport = Callable[[int, int], None]


@dataclass
class Drawing:
    """What a request became: pictures (n, height, width, 3) of 8 bits, and milliseconds by stage.

    `cuda_graph` is "used" where a GPU's stages were launched as CUDA graphs, or tells why not.
    """

    pictures: np.ndarray
    ms: dict[str, Any]
    cut: str = ""
    cuda_graph: str = SWITCHED_OFF

    def images(self) -> list[Image]:
        from PIL import Image

        return [Image.fromarray(picture) for picture in self.pictures]


class Clock:
    """Milliseconds in each stage, as the engines' device tells: a GPU computes while the host goes ahead."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._marks = [("", runner.mark())]

    def lap(self, stage: str) -> None:
        """What was asked for since the last lap was this stage's."""
        self._marks.append((stage, self._runner.mark()))

    def ms(self) -> dict[str, Any]:
        """By stage; each step apart. Waits until all is done."""
        passed: dict[str, list[float]] = {name: [] for name in (*STAGES, "")}
        for (_, start), (stage, end) in pairwise(self._marks):
            passed[stage].append(self._runner.between(start, end))
        return {name: passed[name] if name == "step" else sum(passed[name]) for name in STAGES}


class LcmPipeline:
    """A context manager that owns its runners, and holds its bundle so that nobody removes that.

    `cuda_graph` may be switched between two pictures.

    >>> with load("bundle/") as pipeline:
    ...     images = pipeline("a large red star on a striped pink background", seed=7)
    """

    def __init__(
        self,
        settings: PipelineSettings,
        runners: Mapping[str, Runner],
        tokenizers: Mapping[str, PromptTokenizer],
        load_ms: float = 0.0,
        held: IO[bytes] | None = None,
        prompt_cache: int = 0,
        cuda_graph: bool = True,
    ) -> None:
        self.settings = settings
        self.runners = runners
        self.prompts = Prompts(runners, tokenizers, settings.shape.batch, prompt_cache)
        self.load_ms = load_ms
        self.cuda_graph = cuda_graph
        self._held = held
        self._graphs = CudaGraphs(runners)

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        steps: int = 4,
        guidance_scale: float = 1.0,
        seed: int | None = None,
        num_images: int = 1,
    ) -> list[Image]:
        """Draws `num_images` PIL images; without a seed one is drawn at random.

        UsageError for steps, guidance, seed or num_images out of range.
        """
        seed = draw_seed() if seed is None else seed
        return self.draw(Request(prompt, seed, negative_prompt, steps, guidance_scale, num_images)).images()

    def draw(self, request: Request, report: PassReport = lambda done, total: None) -> Drawing:
        """Draws; `report` is told (passes done, passes in all) after every stage."""
        progress = self.progress(request)
        while True:
            try:
                report(*next(progress))
            except StopIteration as stop:
                return stop.value

    def progress(self, request: Request) -> Generator[tuple[int, int], None, Drawing]:
        """Draws, yielding (passes done, passes in all) after every stage; returns the drawing."""
        settings, shape = self.settings, self.settings.shape
        steps = lcm_steps(request.steps, settings.scheduler)
        step, decode = self.runners["step"], self.runners["decode"]
        latent_shape = {spec.name: spec.shape for spec in step.contract.inputs}["latent"][1:]
        # A full LCM takes the guidance scale as an input; any other is guided by a second pass.
        guided = request.guidance_scale > 1.0 and not takes(self.runners, "guidance")
        chunks = -(-request.num_images // shape.batch)
        prompts = (1 + guided) * (1 + ("context" in self.runners))
        total = prompts + chunks * (len(steps) * (1 + guided) + 1)
        done = 0

        def passed(count: int = 1) -> tuple[int, int]:
            nonlocal done
            done += count
            return done, total

        start, clock = time.perf_counter(), Clock(self.runners["encode"])
        captured = self.captured(steps, guided)
        clock.lap("")
        scale = request.guidance_scale
        embedded = scale if takes(self.runners, "guidance") else 1.0
        asked: list[tuple[str | None, float]] = [(request.prompt, embedded)]
        if guided:
            negative = request.negative_prompt
            asked.append(("" if negative is None and not settings.zero_negative_prompt else negative, 1.0))
        texts = []
        for words in asked:
            texts.append(self.prompts.text(*words))
            clock.lap("encode")
            yield passed()
        factor = step.to_device(np.asarray([scale], np.float32))
        if captured:
            # The context is computed anew, in the time that copying a known one to its place would take.
            loop: Loop | CapturedLoop = captured.begin([text.arrays for text in texts], factor)
        else:
            timesteps = [float(lcm_step.timestep) for lcm_step in steps]
            conditions = [self.prompts.conditions(text, timesteps) for text in texts]
            loop = Loop(self.runners, steps, put_coefficients(self.runners, steps), conditions, factor)
        clock.lap("context")
        if "context" in self.runners:
            yield passed(len(texts))

        # One draw for all pictures at the start, one after every step but the last, from one stream:
        # the order in which diffusers asks its generator.
        noise = TorchNoise(request.seed)
        draws: list[np.ndarray] = []

        def drawn(i: int) -> np.ndarray:
            if i == len(draws):
                draws.append(noise((request.num_images, *latent_shape)))
            return draws[i]

        pictures: list[np.ndarray] = []
        floats: list[np.ndarray] = []  # looked at once the last picture is there
        for first in range(0, request.num_images, shape.batch):
            rows = np.minimum(np.arange(first, first + shape.batch), request.num_images - 1)
            latent = step.to_device(drawn(0)[rows])
            for i, lcm_step in enumerate(steps):
                # Drawn while a GPU computes the step before: the host waits for nothing but the picture.
                fresh = None if lcm_step is steps[-1] else step.to_device(drawn(i + 1)[rows])
                clock.lap("")
                latent = loop.step(i, latent, fresh)
                clock.lap("step")
                yield passed(1 + guided)
            picture = decode.to_host(loop.decode(latent))
            pictures.append(np.array(eight_bits(picture[: request.num_images - first])))
            clock.lap("decode")
            total_ms = (time.perf_counter() - start) * 1000
            floats += [np.array(a) for a in (step.to_host(latent), picture) if a.dtype != np.uint8]
            yield passed()
        joined = np.concatenate(pictures)
        check_drawn(joined, floats)
        ms = {**clock.ms(), "total": total_ms, "load": self.load_ms}
        told = self._graphs.told(captured) if self.cuda_graph else SWITCHED_OFF
        return Drawing(joined, ms, texts[0].cut, told)

    def captured(self, steps: Sequence[LcmStep], guided: bool) -> CapturedLoop | None:
        """The CUDA graphs for pictures of these steps; None where they are drawn without."""
        if not self.cuda_graph:
            self._graphs.use_own(False)
            return None

        def make(capturer: Capturer) -> CapturedLoop:
            coefficients = put_coefficients(self.runners, steps)
            times = put_timesteps(self.runners, [float(lcm_step.timestep) for lcm_step in steps])
            texts = [self.prompts.blank() for _ in range(1 + guided)]
            return CapturedLoop(capturer, self.runners, steps, coefficients, times, texts)

        return self._graphs.find((len(steps), guided), make)

    def close(self) -> None:
        self._graphs.close()
        for runner in self.runners.values():
            runner.close()
        if self._held is not None:
            self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_drawn(pictures: np.ndarray, floats: Sequence[np.ndarray]) -> None:
    """BackendError for NaN; where 8 bits can't hold it, the picture is of one colour."""
    finite = all(np.isfinite(array).all() for array in floats)
    if not finite or any(of_one_colour(picture) for picture in pictures):
        raise BackendError(
            "the engines drew NaN: they overflow their precision on this machine",
            "lcm-compile verify BUNDLE; then build with --precision fp32 or bf16",
        )


def of_one_colour(picture: np.ndarray) -> bool:
    """Seldom asked of every pixel: to compare a million takes NumPy a tenth of what a fast GPU draws in."""
    return all((part == picture[0, 0]).all() for part in (picture[::16, ::16], picture))


def eight_bits(pictures: np.ndarray) -> np.ndarray:
    """Pictures in 0…1 as 8 bits; those of 8 bits as they are."""
    return pictures if pictures.dtype == np.uint8 else (pictures * 255).round().astype(np.uint8)
