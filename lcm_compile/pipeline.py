"""The LCM loop: prompt and seed → encode → step × N → decode → pictures.

It reads stage contracts and settings, never a family or a backend; it needs neither torch nor diffusers
unless an engine does.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from lcm_compile.bundle import EngineBundle, PipelineSettings, hold, open_bundle
from lcm_compile.engines import find_backend, find_target_here
from lcm_compile.engines.runner import Runner
from lcm_compile.errors import REBUILD, BackendError, BundleError, UsageError
from lcm_compile.noise import TorchNoise
from lcm_compile.scheduler import LcmStep, lcm_steps
from lcm_compile.schema import from_json
from lcm_compile.store import remember
from lcm_compile.tokens import PromptTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image

Arrays = dict[str, Any]
Report = Callable[[int, int], None]
STAGES = ("encode", "context", "step", "decode")  # the context may be part of the step


@dataclass(frozen=True)
class Request:
    """One call of the pipeline. `negative_prompt` None is not "": SDXL then conditions on zeros."""

    prompt: str
    seed: int
    negative_prompt: str | None = None
    steps: int = 4
    guidance_scale: float = 1.0
    num_images: int = 1

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UsageError(f"the number of images must be 1 or more, not {self.num_images}")
        if not 0.0 <= self.guidance_scale < float("inf"):
            raise UsageError(f"guidance scale must be 0 or more, not {self.guidance_scale}")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must be from 0 to 2⁶⁴ − 1, not {self.seed}")


@dataclass
class Drawing:
    """What a request became: pictures (n, height, width, 3) of 8 bits, and milliseconds by stage."""

    pictures: np.ndarray
    ms: dict[str, Any]
    cut: str = ""

    def images(self) -> list[Image]:
        from PIL import Image

        return [Image.fromarray(picture) for picture in self.pictures]


@dataclass
class Clock:
    """Milliseconds spent in each stage."""

    encode: float = 0.0
    context: float = 0.0
    step: list[float] = field(default_factory=list)
    decode: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    def lap(self) -> float:
        now = time.perf_counter()
        passed, self._start = (now - self._start) * 1000, now
        return passed


class LcmPipeline:
    """A context manager that owns its runners, and holds its bundle so that nobody removes that.

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
    ) -> None:
        self.settings = settings
        self.runners = runners
        self.tokenizers = tokenizers
        self.load_ms = load_ms
        self._held = held

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

    def draw(self, request: Request, report: Report = lambda done, total: None) -> Drawing:
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
        guided = request.guidance_scale > 1.0 and not self.takes("guidance")
        chunks = -(-request.num_images // shape.batch)
        total = 1 + guided + ("context" in self.runners) + chunks * (len(steps) * (1 + guided) + 1)
        done = 0
        start, clock = time.perf_counter(), Clock()

        text, cut = self.encode(request.prompt)
        done += 1
        yield done, total
        plain_text: Arrays = {}
        if guided:
            plain_text = self.encode_negative(request.negative_prompt, text)
            done += 1
            yield done, total
        clock.encode = clock.lap()
        timesteps = [float(lcm_step.timestep) for lcm_step in steps]
        conditions = self.condition(text, timesteps, request.guidance_scale)
        plain_conditions = self.condition(plain_text, timesteps) if guided else []
        clock.context = clock.lap()
        if "context" in self.runners:
            done += 1
            yield done, total

        # One draw for all pictures at the start, one after every step but the last, from one stream:
        # the order in which diffusers asks its generator.
        noise = TorchNoise(request.seed)
        draws = [noise((request.num_images, *latent_shape)) for _ in steps]
        clock.lap()
        pictures, finite = [], True
        for first in range(0, request.num_images, shape.batch):
            rows = np.minimum(np.arange(first, first + shape.batch), request.num_images - 1)
            latent = step.to_device(draws[0][rows])
            for i, lcm_step in enumerate(steps):
                fresh = None if lcm_step is steps[-1] else step.to_device(draws[i + 1][rows])
                inputs = {"latent": latent, **self.step_inputs(lcm_step, latent if fresh is None else fresh)}
                given = step({**inputs, **conditions[i]})
                done += 1
                if guided:
                    output = given["prediction"] + 0  # the runner may reuse its output memory
                    plain = step({**inputs, **plain_conditions[i]})["prediction"]
                    output = plain + request.guidance_scale * (output - plain)
                    done += 1
                    latent = lcm_step(latent, output, fresh)
                elif "next_latent" in given:
                    latent = given["next_latent"] + 0
                else:
                    latent = lcm_step(latent, given["prediction"], fresh)
                clock.step.append(clock.lap())
                yield done, total
            picture = decode.to_host(decode({"latent": latent})["picture"])
            finite = finite and all(np.isfinite(array).all() for array in (step.to_host(latent), picture))
            pictures.append(np.array(eight_bits(picture[: request.num_images - first])))
            clock.decode += clock.lap()
            done += 1
            yield done, total
        drawn = np.concatenate(pictures)
        check_drawn(drawn, finite)
        ms = {
            "encode": clock.encode,
            "context": clock.context,
            "step": clock.step,
            "decode": clock.decode,
            "total": (time.perf_counter() - start) * 1000,
            "load": self.load_ms,
        }
        return Drawing(drawn, ms, cut)

    def takes(self, name: str) -> bool:
        """Whether the stages that are given text take such an input too."""
        stages = [self.runners[stage] for stage in ("context", "step") if stage in self.runners]
        return any(spec.name == name for stage in stages for spec in stage.contract.inputs)

    def step_inputs(self, lcm_step: LcmStep, noise: Any) -> Arrays:
        """What a step takes that does its own LCM arithmetic; nothing for one that does not."""
        if not self.takes("coefficients"):
            return {}
        coefficients = np.asarray(lcm_step.coefficients, np.float32)
        return {"noise": noise, "coefficients": self.runners["step"].to_device(coefficients)}

    def condition(
        self, text: Arrays, timesteps: Sequence[float], guidance_scale: float = 1.0
    ) -> list[Arrays]:
        """What the step takes at each of the timesteps for a text, besides the latent."""
        runner = self.runners.get("context", self.runners["step"])
        given = dict(text)
        if self.takes("guidance"):
            given["guidance"] = runner.to_device(np.asarray([guidance_scale - 1], np.float32))
        if "context" not in self.runners:
            return [{**given, "timestep": runner.to_device(np.asarray([t], np.float32))} for t in timesteps]
        at_once = {spec.name: spec.shape for spec in runner.contract.inputs}["timesteps"][0]
        conditions: list[Arrays] = []
        shared: Arrays = {}
        for first in range(0, len(timesteps), at_once):
            some = timesteps[first : first + at_once]
            padded = np.asarray([*some, *[some[-1]] * (at_once - len(some))], np.float32)
            arrays = runner({**given, "timesteps": runner.to_device(padded)})
            # Copies: the runner's output memory may be reused for the negative prompt.
            shared = shared or {name: array + 0 for name, array in arrays.items() if name != "times"}
            times = arrays["times"] + 0
            conditions += [{**shared, "time": times[i]} for i in range(len(some))]
        return conditions

    def encode(self, prompt: str) -> tuple[Arrays, str]:
        """The conditioning of a prompt, and the part of the prompt that did not fit."""
        runner = self.runners["encode"]
        tokens, cuts = {}, []
        for name, tokenizer in self.tokenizers.items():
            ids, cut = tokenizer(prompt)
            tokens[name] = np.ascontiguousarray(np.broadcast_to(ids, (self.settings.shape.batch, len(ids))))
            cuts.append(cut)
        # Copies: the runner's output memory may be reused for the negative prompt.
        arrays = runner({name: runner.to_device(ids) for name, ids in tokens.items()})
        return {name: array + 0 for name, array in arrays.items()}, max(cuts, key=len, default="")

    def encode_negative(self, negative_prompt: str | None, like: Arrays) -> Arrays:
        if negative_prompt is None and self.settings.zero_negative_prompt:
            return {name: array * 0 for name, array in like.items()}
        return self.encode(negative_prompt or "")[0]

    def close(self) -> None:
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


def check_drawn(pictures: np.ndarray, finite: bool) -> None:
    """BackendError for NaN; where 8 bits can't hold it, the picture is of one colour."""
    if not finite or any((picture == picture[0, 0]).all() for picture in pictures):
        raise BackendError(
            "the engines drew NaN: they overflow their precision on this machine",
            "lcm-compile verify BUNDLE; then build with --precision fp32 or bf16",
        )


def eight_bits(pictures: np.ndarray) -> np.ndarray:
    """Pictures in 0…1 as 8 bits; those of 8 bits as they are."""
    return pictures if pictures.dtype == np.uint8 else (pictures * 255).round().astype(np.uint8)


def draw_seed() -> int:
    return secrets.randbelow(2**32)


def load(bundle: str | Path | EngineBundle) -> LcmPipeline:
    """The pipeline of a bundle, engines loaded.

    BundleError: no bundle, a damaged one, or one for another GPU. BackendError: its backend is missing.
    """
    start = time.perf_counter()
    if not isinstance(bundle, EngineBundle):
        bundle = open_bundle(Path(bundle))
        remember(bundle.folder)
    manifest = bundle.manifest
    backend = find_backend(manifest.backend)
    if reason := backend.cannot_run(manifest.target):
        here = find_target_here()
        rebuilt = replace(manifest.spec, gpu=here, precision="auto", backend="auto")
        raise BundleError(
            f"{bundle.folder} was built for {manifest.target.name} ({manifest.target.description}) "
            f"and can't run on this machine ({here}): {reason}",
            f"copy it to a machine with that GPU, or build for this one: {rebuilt.command()}",
        )
    if reason := backend.cannot_load(*built_with(bundle)):
        raise BundleError(
            f"{bundle.folder} can't be loaded here: {reason}",
            f"build it again here: {manifest.spec.command()}",
        )
    check_stages(bundle)
    held = hold(bundle.folder)
    runners: dict[str, Runner] = {}
    try:
        for stage in manifest.stages:
            path = bundle.path(stage.engine)
            runners[stage.contract.name] = backend.load(path, stage.contract, manifest.target)
        tokenizers = load_tokenizers(bundle.folder, manifest.pipeline)
    except BaseException:
        for runner in runners.values():
            runner.close()
        held.close()
        raise
    load_ms = (time.perf_counter() - start) * 1000
    return LcmPipeline(manifest.pipeline, runners, tokenizers, load_ms, held)


def built_with(bundle: EngineBundle) -> tuple[str, Mapping[str, Any]]:
    """The backend's version and the builder options, from the key. BundleError where it holds none."""
    key = bundle.manifest.key
    try:
        return key["backend version"], from_json(Mapping[str, Any], json.loads(key["builder options"]))
    except (KeyError, ValueError, RecursionError) as error:
        raise BundleError(f"{bundle.folder} does not tell what built it: {error}", REBUILD) from error


def check_stages(bundle: EngineBundle) -> None:
    """BundleError unless the contracts are those of an LCM loop and fit each other."""
    settings = bundle.manifest.pipeline
    contracts = {stage.contract.name: stage.contract for stage in bundle.manifest.stages}
    if tuple(contracts) != tuple(name for name in STAGES if name in contracts or name != "context"):
        raise BundleError(f"{bundle.folder} has the stages {list(contracts)}, not {list(STAGES)}", REBUILD)
    takes = {name: {s.name: s.shape for s in contract.inputs} for name, contract in contracts.items()}
    gives = {name: {s.name: s.shape for s in contract.outputs} for name, contract in contracts.items()}
    shape, latent = settings.shape, takes["step"].get("latent", ())
    own = {"timestep": (1,), "guidance": (1,), "timesteps": takes.get("context", {}).get("timesteps", ())}
    given = {**own, **gives["encode"]}
    wanted: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (takes["encode"], {t.input: (shape.batch, t.max_length) for t in settings.tokenizers})
    ]
    if "context" in contracts:
        wanted.append((takes["context"], picked(given, takes["context"])))
        given = {**gives["context"], "time": gives["context"].get("times", ())[1:]}
    given |= {"latent": latent, "noise": latent, "coefficients": (6,)}
    wanted += [
        (takes["step"], picked(given, takes["step"])),
        (gives["step"], picked({"prediction": latent, "next_latent": latent}, gives["step"])),
        (takes["decode"], {"latent": latent}),
        (gives["decode"], {"picture": (shape.batch, shape.height, shape.width, 3)}),
    ]
    whole = "prediction" in gives["step"] and ("next_latent" in gives["step"]) == ("noise" in takes["step"])
    timed = "time" in takes["step"] or "timestep" in takes["step"]
    for has, needs in wanted:
        if has != needs or not whole or not timed or latent[:1] != (shape.batch,):
            raise BundleError(
                f"{bundle.folder}: its stages do not fit each other: {has} for {needs}", REBUILD
            )


def picked(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: given.get(name) for name in names}


def load_tokenizers(folder: Path, settings: PipelineSettings) -> dict[str, PromptTokenizer]:
    return {t.input: PromptTokenizer(folder / t.file, t) for t in settings.tokenizers}
