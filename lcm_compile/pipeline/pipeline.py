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
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.engines.capture import Capturer
from lcm_compile.engines.runner import Array, Runner, closed
from lcm_compile.errors import UsageError
from lcm_compile.graphs import ENCODE_IMAGE, STAGES
from lcm_compile.pipeline.control import Control, check_control, control_stages, put_control, strengths_of
from lcm_compile.pipeline.control_picture import control_pictures
from lcm_compile.pipeline.cuda_graphs import SWITCHED_OFF, CapturedLoop, CudaGraphs
from lcm_compile.pipeline.drawing import (
    NO_PREVIEWS,
    Clock,
    Drawing,
    Pictures,
    Previews,
    Show,
    batches_of,
    eight_bits,
    show_nothing,
    warning_of_one_colour,
)
from lcm_compile.pipeline.image_start import Encoded, ImageStart, all_masked, check_images, sampled_images
from lcm_compile.pipeline.loop import Loop, State, put_coefficients, put_timesteps, takes
from lcm_compile.pipeline.loras import Choice, check_loras
from lcm_compile.pipeline.noise import Noise
from lcm_compile.pipeline.prompts import (
    Condition,
    Prompts,
    Text,
    check_prompts,
    condition_of,
    negative_condition_of,
)
from lcm_compile.pipeline.request import Request, draw_seed, pictures_of, requests_for
from lcm_compile.pipeline.source_picture import SourcePicture, begun_at
from lcm_compile.pipeline.tokenizer import PromptTokenizer
from lcm_compile.samplers import schedule
from lcm_compile.samplers.step import Step
from lcm_compile.spec import LoraSpec

if TYPE_CHECKING:
    from PIL.Image import Image

# Called with (passes done, passes in total).
PassReport = Callable[[int, int], None]
# The prompts of a batch, and the guidance scale that a full LCM reads.
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
        self.prompts = Prompts(runners, tokenizers, settings, prompt_cache)
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
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        guidance_rescale: float = 0.0,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        index: int | None = None,
        prompt_syntax: str = "plain",
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        lora_weights: Mapping[str, float | LoraSpec] | Sequence[LoraSpec] = (),
        loras: Sequence[str | LoraSpec] = (),
        image: str | Path | Image | SourcePicture | None = None,
        strength: float | None = None,
        mask: str | Path | Image | SourcePicture | None = None,
        control: Any = None,
        control_weight: float | Sequence[float] | None = None,
        control_start: float | Sequence[float] | None = None,
        control_end: float | Sequence[float] | None = None,
        outpaint: tuple[int, int, int, int] | None = None,
    ) -> list[Image]:
        """Draws a prompt, or each prompt of a list, and returns PIL images.

        Pictures share the calls of an engine of a batch, also those of different prompts. Lists may be
        tuples, and of numbers also ranges and arrays. `Request` has the ranges of values.

        prompt: What the picture shows. A list gives `num_images` pictures for each of its prompts, all of the
            first before those of the second.
        negative_prompt: What the pictures should not show, for all prompts, or a list with one for each. It
            is read only with guidance above 1. None differs from "" for SDXL.
        sampler: A name of `samplers.SAMPLERS`.
        steps: Denoising steps.
        guidance_scale: Strength of guidance; 1 is none.
        eta: The share of noise that the samplers `tcd` and `ddim` add again in each step, from 0 to 1.
            These four are by default the bundle's own: those of its few-step weights, or of an ordinary base.
        guidance_rescale: The share of the guided prediction whose contrast is brought back to the unguided
            one's, from 0 to 1.
        prompt_syntax: How prompts are read: `plain`, or `webui`, whose brackets weight words.
        prompt_2: What SDXL's second text encoder reads, by default the same; or a list like the prompts.
        negative_prompt_2: The same for the negative prompt.
        original_size: The height and width in pixels that SDXL is told its picture was a part of.
        crop: The top and left of that part in pixels.
        target_size: The height and width in pixels that SDXL is told to aim at.
        lora_weights: The weights of the bundle's LoRAs that are not fused, by name.
        loras: The LoRAs for the bundle's slots, such as `style.safetensors:0.7`.
        image: The picture to begin at, for all prompts: a path or a PIL image, of any size. It is scaled to
            cover the bundle's size, and cropped around its centre.
        strength: The share of the steps that are drawn from the image, from 0 to 1; by default 0.8, or 1 with
            a mask.
        mask: What is repainted of the image: white is, and black is kept. "alpha" is its own transparency.
        control: The picture that the bundle's ControlNet reads, for all pictures of the call: a path, a PIL
            image or an array; for several ControlNets a list with one for each.
        control_weight: The strength of the ControlNet, by default the bundle's own; for several a list.
        control_start: The share of the steps before which the ControlNet does nothing, by default 0.
        control_end: The share of the steps after which it does nothing, by default 1.
        outpaint: The pixels that the image is extended by at the left, top, right and bottom, to draw what is
            around it; in place of a mask.
        seed: The seed of the noise; by default a random one. One seed gives a single stream of noise for all
            pictures of the call, as one torch.Generator does in diffusers. So of a list of prompts the second
            has other noise than it has alone. A list has one seed for each picture, as a list of generators
            has: each picture is the one that its prompt and seed give alone. For one prompt it draws as many
            pictures as there are seeds.
        num_images: The number of pictures of each prompt.
        index: The only picture to draw of all those that the call without it draws from one seed, counted
            from 0.

        Warns of a picture of one colour. Raises UsageError if a value is out of range or lists do not fit
        each other, and BackendError if the engines return NaN.
        """
        requests = requests_for(
            seed=draw_seed() if seed is None else seed,
            num_images=num_images,
            index=index,
            prompt=prompt,
            negative_prompt=negative_prompt,
            **self.settings.drawing(sampler, steps, guidance_scale, eta),
            guidance_rescale=guidance_rescale,
            prompt_syntax=prompt_syntax,
            prompt_2=prompt_2,
            negative_prompt_2=negative_prompt_2,
            original_size=original_size,
            crop=crop,
            target_size=target_size,
            lora_weights=lora_weights,
            loras=loras,
            control=control_pictures(control),  # read once for all pictures
            control_weight=control_weight,
            control_start=control_start,
            control_end=control_end,
            strength=strength,
            **begun_at(image, mask, outpaint),
        )
        drawing = self.draw(requests)
        if text := warning_of_one_colour(drawing.pictures):
            warnings.warn(text, stacklevel=2)
        return drawing.images()

    def draw(
        self,
        requests: Request | Sequence[Request],
        report: PassReport = lambda done, total: None,
        show: Show = show_nothing,
        previews: Previews = NO_PREVIEWS,
    ) -> Drawing:
        """Draws requests and returns the drawing. Raises the same errors as calling the pipeline.

        The pictures of all requests share the calls of engines of a batch. So the requests must have the same
        sampler, steps and guidance scale, and all or none of them a negative prompt.

        `report` is called with (passes done, passes in total) after every stage, and `show` with the pictures
        (n, height, width, 3) of each batch as soon as they are drawn. `previews` has what shows the pictures
        of a batch that are foreseen after so many of its steps, 1 to all but the last: x̂0, decoded. A bundle
        of one graph shows none.
        """
        with closing(self.progress(requests, show, previews)) as progress:
            while True:
                try:
                    report(*next(progress))
                except StopIteration as stop:
                    return stop.value

    def progress(
        self,
        requests: Request | Sequence[Request],
        show: Show = show_nothing,
        previews: Previews = NO_PREVIEWS,
    ) -> Progress:
        """Draws requests. Yields (passes done, passes in total) after every stage; returns the drawing.

        On a GPU other threads wait until this generator has ended or is closed. Raises UsageError if the
        pipeline is closed or was loaded before this process was forked, on a GPU if this thread has already
        begun another drawing, or as check_prompts does.
        """
        self.check_usable()
        pictures = pictures_of(requests)
        contracts = [runner.contract for runner in self.runners.values()]
        for asked in pictures:
            check_prompts(asked, self.settings.tokenizers, contracts)
        check_loras(pictures[0], self.settings)
        check_images(pictures, contracts)
        check_control(pictures[0].control, len(control_stages(self.runners)))
        exclusive = self.exclusive
        with self._turn.taken() if exclusive else nullcontext():
            passes = self.passes(pictures, show, previews)
            while True:
                with self._computing if exclusive else nullcontext():
                    self.check_usable()
                    try:
                        done = next(passes)
                    except StopIteration as stop:
                        return stop.value
                yield done

    @abstractmethod
    def passes(self, pictures: Sequence[Request], show: Show, previews: Previews) -> Progress:
        """Does what `progress` does, for one drawing at a time if the engines are exclusive.

        Each of the pictures is a request of one picture.
        """

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

    def passes(self, pictures: Sequence[Request], show: Show, previews: Previews) -> Progress:
        """Draws pictures. Yields (passes done, passes in total) after every stage; returns the drawing."""
        request = pictures[0]  # all are alike in what is read from it
        plan = schedule(request.sampler, request.steps, self.settings.scheduler, request.eta)
        plan = plan.begun_at(request.first_step) if request.image else plan
        steps = plan.steps
        guided = self.needs_second_pass(request)
        loras = self.prompts.loras.choose(request)
        batches = list(batches_of(pictures, self.settings.shape.batch))
        prompts = list(pairwise([[], *(self.conditions_of(rows, loras) for rows, _ in batches)]))
        encoded = sum(len(set(now) - set(before)) for before, now in prompts)
        stages = 2 if "context" in self.runners else 1
        contracts = [runner.contract for runner in self.runners.values()]
        noise = Noise(self.latent_shape(), sampled_images(contracts, request))
        begin = None
        if request.image:
            begin = ImageStart(self.runners, self.settings.shape, plan, noise, pictures, self._encoded)
        encodings = stages * encoded + (len(begin.sources) if begin else 0)
        passes = Passes(encodings, len(batches), len(steps) * (1 + guided))
        clock = Clock(self.runners["encode"], (*STAGES, ENCODE_IMAGE) if begin else STAGES)
        graphs = self.find_graphs(steps, guided, request)
        control = put_control(self.runners, request, self.settings, steps)
        clock.lap("")

        for _ in begin.encode() if begin else ():
            clock.lap(ENCODE_IMAGE)
            yield passes.add(1)
        drawn = Pictures(clock, show)
        texts: dict[Condition, Text] = {}
        cut = ""
        for (rows, kept), (before, now) in zip(batches, prompts, strict=True):
            new = [key for key in dict.fromkeys(now) if key not in before]
            for key in new:
                texts[key] = self.prompts.text(key)
                clock.lap("encode")
                yield passes.add(1)
            if now != before:
                texts = {key: texts[key] for key in now}
                loop = self.open_loop([texts[key] for key in now], steps, request, graphs, loras, control)
                clock.lap("context")
                if "context" in self.runners:
                    yield passes.add(len(new))
                cut = max(cut, texts[now[0]].cut, key=len)
            first = begin.first(rows) if begin else plan.first(noise.draw(0, rows))
            state: State = (self.put(first), None)
            masked = begin.masked(rows) if begin else all_masked(self.runners["step"])
            for i, step in enumerate(steps):
                # Made while a GPU computes the step before: the host waits for nothing but the picture.
                fresh = self.put(noise.draw(i + 1, rows)) if step.noise_scale else None
                clock.lap("")
                state = loop.step(i, state, fresh, masked)
                if begin and (parts := begin.kept(i, rows)):
                    state = loop.keep(state, parts)
                clock.lap("step")
                if i + 1 < len(steps) and (preview := previews.get(i + 1)):
                    preview(self.foreseen(state)[kept])
                    clock.lap("decode")
                yield passes.add(1 + guided)
            picture = self.runners["decode"].to_host(loop.decode(state[0]))
            clock.lap("decode")
            drawn.add(picture, kept, self.runners["step"].to_host(state[0]))
            yield passes.add(1)
        return Drawing(drawn.all(), {**clock.ms(), "load": self.load_ms}, cut, self.graph_status(graphs))

    def foreseen(self, state: State) -> np.ndarray:
        """Returns the pictures (b, height, width, 3) in 8 bits that a step foresees."""
        decode = self.runners["decode"]
        return np.array(eight_bits(decode.to_host(decode({"latent": state[1]})["picture"])))

    def needs_second_pass(self, request: Request) -> bool:
        """Returns whether the UNet runs twice in each step. A full LCM takes the guidance scale as input."""
        return request.guidance_scale > 1.0 and not takes(self.runners, "guidance")

    def conditions_of(self, rows: Sequence[Request], loras: Choice) -> list[Condition]:
        """Returns what each pass of a step is conditioned on; the second is that of the negative prompts."""
        shape, first = self.settings.shape, rows[0]
        scale = None if takes(self.runners, "guidance") else 1.0
        conditions = [condition_of(rows, shape, scale, loras)]
        if self.needs_second_pass(first):
            conditions.append(negative_condition_of(rows, shape, self.settings.zero_negative_prompt, loras))
        return conditions

    def open_loop(
        self,
        texts: Sequence[Text],
        steps: Sequence[Step],
        request: Request,
        graphs: CapturedLoop | None,
        loras: Choice,
        control: Control | None,
    ) -> Loop | CapturedLoop:
        """Computes the conditions of the steps for these texts, and returns the loop that uses them."""
        scale = self.put(np.asarray([request.guidance_scale], np.float32))
        own = self.prompts.loras.inputs(loras, "step")
        if graphs:
            # The context is computed again, because copying a cached one to its place takes as long.
            return graphs.begin([text.arrays for text in texts], scale, own, control)
        timesteps = [step.timestep for step in steps]
        conditions = [self.prompts.conditions(text, timesteps) for text in texts]
        coefficients = put_coefficients(self.runners, steps)
        rescale = request.guidance_rescale
        return Loop(self.runners, steps, coefficients, conditions, scale, rescale, own, control)

    def latent_shape(self) -> tuple[int, ...]:
        """Returns the shape (c, h, w) of the latent of one picture."""
        contract = self.runners["step"].contract
        return next(spec.shape[1:] for spec in contract.inputs if spec.name == "latent")

    def put(self, array: np.ndarray) -> Array:
        """Returns an array on the device where the step computes."""
        return self.runners["step"].to_device(array)

    @cached_property
    def _encoded(self) -> Encoded:
        return {}

    @cached_property
    def _graphs(self) -> CudaGraphs:
        return CudaGraphs(self.runners)

    def find_graphs(self, steps: tuple[Step, ...], guided: bool, request: Request) -> CapturedLoop | None:
        """Returns the CUDA graphs for pictures of these steps, or None if they are drawn without."""
        if not self.cuda_graph:
            self._graphs.use_own(False)
            return None

        rescale = request.guidance_rescale

        def make(capturer: Capturer) -> CapturedLoop:
            coefficients = put_coefficients(self.runners, steps)
            times = put_timesteps(self.runners, [step.timestep for step in steps])
            texts = [self.prompts.blank() for _ in range(1 + guided)]
            usual = self.prompts.loras.inputs(self.prompts.loras.usual, "step")
            own = {name: array + 0 for name, array in usual.items()}
            control = put_control(self.runners, request, self.settings, steps)
            return CapturedLoop(
                capturer, self.runners, steps, coefficients, times, texts, rescale, own, control
            )

        runs = tuple(tuple(map(bool, own)) for own in strengths_of(request, self.settings))
        return self._graphs.find((steps, guided, rescale, runs), make)

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
    """Counts the passes through the models: those of all prompts, and each batch's steps and decoding."""

    def __init__(self, prompts: int, batches: int, steps: int) -> None:
        self._total = prompts + batches * (steps + 1)
        self._done = 0

    def add(self, count: int) -> tuple[int, int]:
        """Adds `count` passes, and returns (passes done, passes in total)."""
        self._done += count
        return self._done, self._total
