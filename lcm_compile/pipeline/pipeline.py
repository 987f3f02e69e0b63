"""The LCM loop: prompt and seed → encode → context → step × N → decode → pictures.

It depends only on stage contracts and settings, not on a family or a backend. It needs neither torch nor
diffusers, unless an engine does.
"""

from __future__ import annotations

import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.engines.capture import Capturer
from lcm_compile.engines.runner import Array, Runner, closed
from lcm_compile.errors import UsageError
from lcm_compile.graphs import STAGES
from lcm_compile.pipeline.cuda_graphs import SWITCHED_OFF, CapturedLoop, CudaGraphs
from lcm_compile.pipeline.drawing import (
    Clock,
    Drawing,
    Pictures,
    Show,
    batches_of,
    show_nothing,
    warning_of_one_colour,
)
from lcm_compile.pipeline.loop import Loop, State, put_coefficients, put_timesteps, takes
from lcm_compile.pipeline.noise import NoiseStream
from lcm_compile.pipeline.prompts import Prompts, Text
from lcm_compile.pipeline.request import Request, draw_seed
from lcm_compile.pipeline.tokenizer import PromptTokenizer
from lcm_compile.samplers import schedule
from lcm_compile.samplers.step import Step

if TYPE_CHECKING:
    from PIL.Image import Image

# Called with (passes done, passes in total).
PassReport = Callable[[int, int], None]
# Yields (passes done, passes in total), and returns the drawing.
Progress = Generator[tuple[int, int], None, Drawing]


class Pipeline(ABC):
    """A loaded bundle. Until it is closed, it owns engines, and the bundle can't be removed.

    >>> with load("bundle/") as pipeline:
    ...     images = pipeline("a large red star on a striped pink background", seed=7)

    Several threads may share a pipeline, and each picture is the one that is drawn alone. On a CPU they draw
    at the same time, on a GPU one after the other. A process that forks must load the bundle in each child.
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
        """Takes what `load` has read from a bundle.

        `prompt_cache` is the number of prompts whose conditioning is kept. `held` is the file whose lock
        keeps the bundle from being removed. `cuda_graph` may be changed between two pictures.
        """
        self.settings = settings
        self.runners = runners
        self.prompts = Prompts(runners, tokenizers, settings.shape.batch, prompt_cache)
        self.load_ms = load_ms
        self.cuda_graph = cuda_graph
        self._held = held
        self._process = os.getpid()
        self._closed = False
        self._turn = Turn()
        # Held during a pass of exclusive engines, which may call `show`, and that may close the pipeline.
        self._computing = threading.RLock()

    def __call__(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        sampler: str = "lcm",
        steps: int = 4,
        guidance_scale: float | None = None,
        seed: int | None = None,
        num_images: int = 1,
    ) -> list[Image]:
        """Draws a prompt and returns `num_images` PIL images; without a seed it takes a random one.

        Without a `guidance_scale` it takes the bundle's: 1, which is none, or that of a full LCM. Warns of a
        picture of one colour. Raises UsageError if a value is out of range, and BackendError if the engines
        return NaN.
        """
        seed = draw_seed() if seed is None else seed
        scale = self.settings.guidance_scale if guidance_scale is None else guidance_scale
        request = Request(prompt, seed, negative_prompt, steps, scale, num_images, sampler=sampler)
        drawing = self.draw(request)
        if text := warning_of_one_colour(drawing.pictures):
            warnings.warn(text, stacklevel=2)
        return drawing.images()

    def draw(
        self,
        request: Request,
        report: PassReport = lambda done, total: None,
        show: Show = show_nothing,
    ) -> Drawing:
        """Draws a request and returns the drawing. Raises the same errors as calling the pipeline.

        `report` is called with (passes done, passes in total) after every stage, and `show` with the pictures
        (n, height, width, 3) of each batch as soon as they are drawn.
        """
        with closing(self.progress(request, show)) as progress:
            while True:
                try:
                    report(*next(progress))
                except StopIteration as stop:
                    return stop.value

    def progress(self, request: Request, show: Show = show_nothing) -> Progress:
        """Draws a request. Yields (passes done, passes in total) after every stage; returns the drawing.

        On a GPU other threads wait until this generator has ended or is closed. Raises UsageError if the
        pipeline is closed or was loaded before this process was forked, or on a GPU if this thread has
        already begun another drawing.
        """
        self.check_usable()
        exclusive = self.exclusive
        with self._turn.taken() if exclusive else nullcontext():
            passes = self.passes(request, show)
            while True:
                with self._computing if exclusive else nullcontext():
                    self.check_usable()
                    try:
                        done = next(passes)
                    except StopIteration as stop:
                        return stop.value
                yield done

    @abstractmethod
    def passes(self, request: Request, show: Show) -> Progress:
        """Does what `progress` does, for one drawing at a time if the engines are exclusive."""

    @property
    def exclusive(self) -> bool:
        """Whether the engines draw one picture at a time; they are all of one backend."""
        return next(iter(self.runners.values())).exclusive

    def check_usable(self) -> None:
        """Raises UsageError if the pipeline is closed, or was loaded before this process was forked."""
        if self._closed:
            raise closed("this pipeline")
        if os.getpid() != self._process:
            raise UsageError(
                f"this pipeline was loaded in process {self._process}, and a process forked from that one "
                "has none of the threads that its engines compute with",
                "load the bundle in each process after the fork, and not before",
            )

    def close(self) -> None:
        """Frees the engines' memory, and releases the lock on the bundle. It may be called more than once.

        A drawing that has begun ends with a UsageError at its next stage.
        """
        self._closed = True
        if os.getpid() == self._process:  # a forked process has nothing that it could free
            with self._computing:
                self.free()

    def free(self) -> None:
        """Frees what the pipeline owns."""
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


class LcmPipeline(Pipeline):
    """The pipeline of a bundle with an engine for each stage."""

    def passes(self, request: Request, show: Show) -> Progress:
        """Draws a request. Yields (passes done, passes in total) after every stage; returns the drawing."""
        plan = schedule(request.sampler, request.steps, self.settings.scheduler, request.eta)
        steps = plan.steps
        guided = self.needs_second_pass(request)
        batches = list(batches_of(request, self.settings.shape.batch))
        passes = Passes(
            (1 + guided) * (1 + ("context" in self.runners)), len(batches), len(steps) * (1 + guided)
        )
        clock = Clock(self.runners["encode"], STAGES)
        graphs = self.find_graphs(steps, guided, request.guidance_rescale)
        clock.lap("")

        texts = []
        for prompt, scale in self.prompts_of(request):
            texts.append(self.prompts.text(prompt, scale))
            clock.lap("encode")
            yield passes.add(1)
        loop = self.open_loop(texts, steps, request, graphs)
        clock.lap("context")
        if "context" in self.runners:
            yield passes.add(len(texts))

        noise = NoiseStream(request.seed, (request.num_images, *self.latent_shape()))
        pictures = Pictures(clock, show)
        for rows, kept in batches:
            state: State = (self.put(plan.first(noise[0][rows])), None)
            for i, step in enumerate(steps):
                # Made while a GPU computes the step before: the host waits for nothing but the picture.
                fresh = self.put(noise[i + 1][rows]) if step.noise_scale else None
                clock.lap("")
                state = loop.step(i, state, fresh)
                clock.lap("step")
                yield passes.add(1 + guided)
            picture = self.runners["decode"].to_host(loop.decode(state[0]))
            clock.lap("decode")
            pictures.add(picture, kept, self.runners["step"].to_host(state[0]))
            yield passes.add(1)
        ms = {**clock.ms(), "load": self.load_ms}
        return Drawing(pictures.all(), ms, texts[0].cut, self.graph_status(graphs))

    def needs_second_pass(self, request: Request) -> bool:
        """Returns whether the UNet runs twice in each step. A full LCM takes the guidance scale as input."""
        return request.guidance_scale > 1.0 and not takes(self.runners, "guidance")

    def prompts_of(self, request: Request) -> list[tuple[str | None, float]]:
        """Returns the prompts to encode, each with its guidance scale; the second is the negative prompt.

        A prompt that is None means conditioning of zeros.
        """
        scale = request.guidance_scale if takes(self.runners, "guidance") else 1.0
        prompts: list[tuple[str | None, float]] = [(request.prompt, scale)]
        if self.needs_second_pass(request):
            negative = request.negative_prompt
            if negative is None and not self.settings.zero_negative_prompt:
                negative = ""
            prompts.append((negative, 1.0))
        return prompts

    def open_loop(
        self, texts: Sequence[Text], steps: Sequence[Step], request: Request, graphs: CapturedLoop | None
    ) -> Loop | CapturedLoop:
        """Computes the conditions of the steps for these texts, and returns the loop that uses them."""
        scale = self.put(np.asarray([request.guidance_scale], np.float32))
        if graphs:
            # The context is computed again, because copying a cached one to its place takes as long.
            return graphs.begin([text.arrays for text in texts], scale)
        timesteps = [step.timestep for step in steps]
        conditions = [self.prompts.conditions(text, timesteps) for text in texts]
        coefficients = put_coefficients(self.runners, steps)
        return Loop(self.runners, steps, coefficients, conditions, scale, request.guidance_rescale)

    def latent_shape(self) -> tuple[int, ...]:
        """Returns the shape (c, h, w) of the latent of one picture."""
        contract = self.runners["step"].contract
        return next(spec.shape[1:] for spec in contract.inputs if spec.name == "latent")

    def put(self, array: np.ndarray) -> Array:
        """Returns an array on the device where the step computes."""
        return self.runners["step"].to_device(array)

    @cached_property
    def _graphs(self) -> CudaGraphs:
        return CudaGraphs(self.runners)

    def find_graphs(self, steps: tuple[Step, ...], guided: bool, rescale: float) -> CapturedLoop | None:
        """Returns the CUDA graphs for pictures of these steps, or None if they are drawn without."""
        if not self.cuda_graph:
            self._graphs.use_own(False)
            return None

        def make(capturer: Capturer) -> CapturedLoop:
            coefficients = put_coefficients(self.runners, steps)
            times = put_timesteps(self.runners, [step.timestep for step in steps])
            texts = [self.prompts.blank() for _ in range(1 + guided)]
            return CapturedLoop(capturer, self.runners, steps, coefficients, times, texts, rescale)

        return self._graphs.find((steps, guided, rescale), make)

    def graph_status(self, graphs: CapturedLoop | None) -> str:
        """Returns "used" if the last picture was drawn with CUDA graphs, or says why it was not."""
        return self._graphs.status(graphs) if self.cuda_graph else SWITCHED_OFF

    def free(self) -> None:
        """Frees the CUDA graphs, and then what every pipeline owns."""
        self._graphs.close()
        super().free()


class Turn:
    """Lets one drawing at a time use engines. The threads of other drawings wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None  # the thread whose turn it is

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Waits for the turn, and has it during the block.

        Raises UsageError if the turn is this thread's already, which would wait for itself.
        """
        if self._thread == threading.get_ident():
            raise UsageError(
                "this thread has begun another picture, and the engines draw one at a time",
                "finish or close its progress() first, or load the bundle a second time",
            )
        with self._lock:
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None


class Passes:
    """Counts the passes through the models: those of the prompts, then each batch's steps and decoding."""

    def __init__(self, prompts: int, batches: int, steps: int) -> None:
        self._total = prompts + batches * (steps + 1)
        self._done = 0

    def add(self, count: int) -> tuple[int, int]:
        """Adds `count` passes, and returns (passes done, passes in total)."""
        self._done += count
        return self._done, self._total
