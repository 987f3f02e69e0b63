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
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.engines.capture import Capturer
from lcm_compile.engines.runner import Array, Runner, closed
from lcm_compile.errors import UsageError
from lcm_compile.graphs import ENCODE_IMAGE, IP_IMAGE, STAGES, T2I_ADAPTERS
from lcm_compile.pipeline.control import Control, check_control, guide_stages, put_control, strengths_of
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
from lcm_compile.pipeline.hires import both, check_hires, second_passes
from lcm_compile.pipeline.image_start import Encoded, ImageStart, all_masked, check_images, sampled_images
from lcm_compile.pipeline.ip_image import IpPrompt, check_ip_image, ip_prompts_of
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
from lcm_compile.pipeline.request import LATENT, Request, draw_seed, drawn_steps, pictures_of, requests_for
from lcm_compile.pipeline.source_picture import Given, begun_at, source_picture
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
        open_larger: Callable[[Request], Pipeline] | None = None,
    ) -> None:
        """Takes what `load` has read from a bundle.

        `prompt_cache` is the number of prompts whose conditioning is kept. `held` is the file whose lock
        keeps the bundle from being removed. `cuda_graph` may be changed between two pictures. `open_larger`
        loads the size of the bundle that a request's second pass is drawn in.
        """
        self.settings = settings
        self.runners = runners
        self.prompts = Prompts(runners, tokenizers, settings, prompt_cache)
        self.load_ms = load_ms
        self.cuda_graph = cuda_graph
        self._held = held
        self._open_larger = open_larger
        self._larger: dict[tuple[int, int], Pipeline] = {}  # by their pictures' height and width
        self._opening = threading.Lock()
        self._process = os.getpid()
        self._drawings = 0
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
        image: Given | None = None,
        strength: float | None = None,
        mask: Given | None = None,
        control: Given | Sequence[Given] | None = None,
        control_weight: float | Sequence[float] | None = None,
        control_start: float | Sequence[float] | None = None,
        control_end: float | Sequence[float] | None = None,
        control_detector: str | Sequence[str] | None = None,
        outpaint: tuple[int, int, int, int] | None = None,
        hires: float | None = None,
        hires_upscaler: str | None = None,
        hires_strength: float | None = None,
        hires_steps: int | None = None,
        ip_image: Given | None = None,
        ip_weight: float | None = None,
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
        image: The picture to begin at, for all prompts: a path, a PIL image, an array (height, width, 3) of 8
            bits, or the bytes of a picture's file, of any size. It is scaled to cover the bundle's size, and
            cropped around its centre.
        strength: The share of the steps that are drawn from the image, from 0 to 1; by default 0.8, or 1 with
            a mask.
        mask: What is repainted of the image: white is, and black is kept. "alpha" is its own transparency.
        control: The picture that the bundle's ControlNet or T2I-Adapter reads, for all pictures of the call,
            given as an image is; for several a list with one for each, ControlNets' first.
        control_weight: The strength of each, by default the bundle's own; for several a list.
        control_start: The share of the steps before which it does nothing, by default 0.
        control_end: The share of the steps after which it does nothing, by default 1.
        control_detector: What makes the ControlNet's picture of a photo: `canny` or `canny:LOW,HIGH`, which
            need OpenCV; for several a list, in which `none` reads a picture as it is.
        outpaint: The pixels that the image is extended by at the left, top, right and bottom, to draw what is
            around it; in place of a mask.
        hires: The factor by which the pictures are enlarged, and then drawn on with the bundle's engines of
            that larger size, which are loaded when they are first needed. By default there is no second pass.
        hires_upscaler: How they are enlarged: `latent`, the default, or `lanczos`.
        hires_strength: The share of the steps of the second pass that are drawn; by default 0.7.
        hires_steps: The steps of the second pass, of which that share is drawn; by default as many as
            `steps`.
        ip_image: The picture that the bundle's IP-Adapter reads beside the prompt, for all pictures of the
            call: a path or a PIL image, of any size. Its centre is read, as wide as high.
        ip_weight: How strongly that picture counts, by default the bundle's own; 0 is not at all.
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
            control=control_pictures(control, control_detector),  # read once for all pictures
            control_weight=control_weight,
            control_start=control_start,
            control_end=control_end,
            strength=strength,
            hires=hires,
            hires_upscaler=hires_upscaler,
            hires_strength=hires_strength,
            hires_steps=hires_steps,
            **begun_at(image, mask, outpaint),
            ip_image=None if ip_image is None else source_picture(ip_image, "ip-image"),
            ip_weight=ip_weight,
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
        of one graph shows none, and of two passes only the first does.
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
        self.check(pictures)
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

    def check(self, pictures: Sequence[Request]) -> None:
        """Raises UsageError if this bundle can't draw these pictures, which are drawn together."""
        contracts = [runner.contract for runner in self.runners.values()]
        for asked in pictures:
            check_prompts(asked, self.settings.tokenizers, contracts)
        check_loras(pictures[0], self.settings)
        check_images(pictures, contracts)
        check_control(pictures[0].control, guide_stages(self.runners))
        check_ip_image(pictures[0], IP_IMAGE in self.runners)
        check_hires(pictures[0], contracts)

    @abstractmethod
    def passes(self, pictures: Sequence[Request], show: Show, previews: Previews) -> Progress:
        """Does what `progress` does, for one drawing at a time if the engines are exclusive.

        Each of the pictures is a request of one picture.
        """

    def count_drawing(self) -> None:
        """Counts a drawing at its end. After the second one, what was compiled for it is kept on the disk.

        With the second one all of that is there, and a server may be killed later.
        """
        self._drawings += 1
        if self._drawings == 2:
            for runner in self.runners.values():
                runner.keep_kernels()

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

    def larger(self, request: Request) -> Pipeline:
        """Returns the pipeline of the second pass of a request, which this one owns.

        Its engines are loaded when they are first needed. Raises UsageError if the bundle has no such size.
        """
        size = request.size(self.settings.shape)
        with self._opening:
            self.check_usable()
            if size not in self._larger:
                if self._open_larger is None:
                    raise UsageError("only a pipeline that load has returned draws a second pass")
                self._larger[size] = self._open_larger(request)
            larger = self._larger[size]
            larger.cuda_graph, larger.prompts.loras.told = self.cuda_graph, self.prompts.loras.told
            return larger

    def free(self) -> None:
        """Frees what the pipeline owns."""
        with self._opening:
            for larger in self._larger.values():
                larger.close()
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
        how = self.one_pass if pictures[0].hires is None else self.two_passes
        return (yield from how(pictures, show, previews))

    def two_passes(self, pictures: Sequence[Request], show: Show, previews: Previews) -> Progress:
        """Does what `passes` does, for pictures that are enlarged and drawn on."""
        request = pictures[0]  # all are alike in what is read from it
        # What may be refused of the second pass is refused before the first one is drawn.
        schedule(request.sampler, request.second_steps, self.settings.scheduler, request.eta)
        larger, latent = self.larger(request), request.upscaler == LATENT
        assert isinstance(larger, LcmPipeline)
        first = Passing(self.one_pass(pictures, show_nothing, previews, decodes=not latent))
        steps = drawn_steps(request.second_strength, request.second_steps) - request.steps
        batches = len([*batches_of(pictures, self.settings.shape.batch)])
        more = batches * (steps * (1 + self.needs_second_pass(request)) + latent)
        more += 0 if latent else len(pictures)  # which are encoded
        for done, total in first:
            yield done, 2 * total + more
        pictures = second_passes(pictures, first.drawing, larger.latent_shape())
        second = Passing(larger.one_pass(pictures, show, NO_PREVIEWS, own_images=True))
        for later, total in second:
            yield done + later, done + total
        return both(first.drawing, second.drawing)

    def one_pass(
        self,
        pictures: Sequence[Request],
        show: Show,
        previews: Previews,
        decodes: bool = True,
        own_images: bool = False,
    ) -> Progress:
        """Does what `passes` does, at one size.

        Without `decodes` the drawing has latents and no pictures. With `own_images` each picture of a seed
        begins at an image of its own, so that their latents are sampled with noise of their own.
        """
        request = pictures[0]  # all are alike in what is read from it
        plan = schedule(request.sampler, request.steps, self.settings.scheduler, request.eta)
        plan = plan.begun_at(request.first_step) if request.image else plan
        steps = plan.steps
        guided = self.needs_second_pass(request)
        loras = self.prompts.loras.choose(request)
        ip_prompts = ip_prompts_of(request, self.settings.ip_weight, guided)
        new_images = self.prompts.ip_images.missing(ip_prompts)
        batches = list(batches_of(pictures, self.settings.shape.batch))
        prompts = list(pairwise([[], *(self.conditions_of(rows, loras) for rows, _ in batches)]))
        encoded = sum(len(set(now) - set(before)) for before, now in prompts)
        stages = 2 if "context" in self.runners else 1
        contracts = [runner.contract for runner in self.runners.values()]
        noise = Noise(self.latent_shape(), sampled_images(contracts, request), own_images)
        begin = None
        if request.image:
            begin = ImageStart(self.runners, self.settings.shape, plan, noise, pictures, self._encoded)
        encodings = stages * encoded + len(new_images) + (len(begin.sources) if begin else 0)
        adapter = T2I_ADAPTERS[0] if T2I_ADAPTERS[0] in self.runners else ""
        each = len(steps) * (1 + guided) + decodes
        passes = Passes(encodings + bool(adapter), len(batches), each)
        encodes, reads = bool(ENCODE_IMAGE in self.runners and begin), request.ip_image is not None
        stages_there = ((ENCODE_IMAGE, encodes), (IP_IMAGE, reads), (adapter, bool(adapter)))
        others = [name for name, there in stages_there if there]
        clock = Clock(self.runners["encode"], (*STAGES, *others))
        graphs = self.find_graphs(steps, guided, request)
        control: Control | None = None
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
                texts[key] = self.prompts.text(key, self._graphs.encode if graphs else None)
                clock.lap("encode")
                yield passes.add(1)
            while new_images:
                self.prompts.ip_images.tokens(new_images.pop(0))
                clock.lap(IP_IMAGE)
                yield passes.add(1)
            if now != before:
                if control is None:
                    control = put_control(self.runners, request, self.settings, steps)
                    clock.lap(adapter)
                    if adapter:
                        yield passes.add(1)
                texts = {key: texts[key] for key in now}
                read = [(texts[key], image) for key, image in zip(now, ip_prompts, strict=True)]
                loop = self.open_loop(read, steps, request, graphs, loras, control)
                clock.lap("context")
                if "context" in self.runners:
                    yield passes.add(len(new))
                cut = max(cut, texts[now[0]].cut, key=len)
            own = begin.batch(rows) if begin else None
            state: State = (self.put(own.first if own else plan.first(noise.draw(0, rows))), None)
            masked = own.masked if own else all_masked(self.runners["step"])
            for i, step in enumerate(steps):
                # Made while a GPU computes the step before: the host waits for nothing but the picture.
                fresh = self.put(noise.draw(i + 1, rows)) if step.noise_scale else None
                clock.lap("")
                state = loop.step(i, state, fresh, masked)
                if own and (parts := own.kept(i)):
                    state = loop.keep(state, parts)
                clock.lap("step")
                if i + 1 < len(steps) and (preview := previews.get(i + 1)):
                    preview(self.foreseen(state)[kept])
                    clock.lap("decode")
                yield passes.add(1 + guided)
            if decodes:
                decoder = self.runners["decode"]
                latents, picture = decoder.all_to_host([state[0], loop.decode(state[0])])
                clock.lap("decode")
                drawn.keep(latents, kept)
                drawn.add(picture, kept)
                yield passes.add(1)
            else:
                drawn.keep(self.runners["step"].to_host(state[0]), kept)
        ms = {**clock.ms(), "load": self.load_ms}
        self.count_drawing()
        return Drawing(drawn.all(), ms, cut, self.graph_status(graphs), drawn.latents())

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
        read: Sequence[tuple[Text, IpPrompt | None]],
        steps: Sequence[Step],
        request: Request,
        graphs: CapturedLoop | None,
        loras: Choice,
        control: Control | None,
    ) -> Loop | CapturedLoop:
        """Computes the conditions of the steps for what is read, and returns the loop that uses them.

        That is for each pass a text, and what an IP-Adapter reads beside it.
        """
        scale = self.put(np.asarray([request.guidance_scale], np.float32))
        own = self.prompts.loras.inputs(loras, "step")
        if graphs:
            # The context is computed again, because copying a cached one to its place takes as long.
            arrays = [self.prompts.with_ip_image(text, image) for text, image in read]
            return graphs.begin(arrays, scale, own, control)
        timesteps = [step.timestep for step in steps]
        conditions = [self.prompts.conditions(text, timesteps, image) for text, image in read]
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


class Passing:
    """Iterates over the passes of a drawing. At the end `drawing` is there."""

    drawing: Drawing

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.drawing = yield from self._progress


class Passes:
    """Counts the passes through the models: those of all prompts and images, and those of each batch."""

    def __init__(self, prompts: int, batches: int, each: int) -> None:
        self._total = prompts + batches * each
        self._done = 0

    def add(self, count: int) -> tuple[int, int]:
        """Adds `count` passes, and returns (passes done, passes in total)."""
        self._done += count
        return self._done, self._total
