"""Encodes prompts. The results of the last ones are cached, because prompts are often used again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings, TokenizerSettings
from lcm_compile.engines.runner import Array
from lcm_compile.errors import REBUILD, UsageError
from lcm_compile.graphs import DRAW, StageContract
from lcm_compile.pipeline.ip_image import IpImages, IpPrompt
from lcm_compile.pipeline.loop import Arrays, Runners, conditions_of, put_timesteps, reads_text, takes
from lcm_compile.pipeline.loras import NO_LORAS, Choice, Loras
from lcm_compile.pipeline.request import PAIRS, Request
from lcm_compile.pipeline.tokenizer import PromptTokenizer, Tokens
from lcm_compile.spec import Shape

Encode = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Condition:
    """What one pass through the UNet is conditioned on.

    `prompts` has for each picture of a batch what the first and what a second text encoder reads; None means
    text states of zeros. `time_ids` are SDXL's six sizes in pixels: see Request. `loras` are those of the
    text encoders and the UNet.
    """

    prompts: tuple[tuple[str, str], ...] | None
    syntax: str = "plain"
    guidance_scale: float = 1.0
    time_ids: tuple[int, ...] = (0,) * 6
    loras: Choice = NO_LORAS


def condition_of(
    rows: Sequence[Request], shape: Shape, scale: float | None = None, loras: Choice = NO_LORAS
) -> Condition:
    """Returns the condition of the prompts of a batch of requests for pictures of a shape.

    `scale` is the guidance scale that a stage reads, by default the requests'.
    """
    first = rows[0]
    prompts = tuple((row.prompt, row.prompt if row.prompt_2 is None else row.prompt_2) for row in rows)
    scale = first.guidance_scale if scale is None else scale
    return Condition(prompts, first.prompt_syntax, scale, first.time_ids(shape), loras)


def negative_condition_of(
    rows: Sequence[Request], shape: Shape, zeros: bool, loras: Choice = NO_LORAS
) -> Condition:
    """Returns the condition of the negative prompts of a batch of requests.

    Without negative prompts it is "", or with `zeros` text states of zeros.
    """
    first, prompts = rows[0], []
    for row in rows:
        negative = row.negative_prompt or ""
        prompts.append((negative, negative if row.negative_prompt_2 is None else row.negative_prompt_2))
    none = zeros and first.negative_prompt is None
    texts = None if none else tuple(prompts)
    return Condition(texts, first.prompt_syntax, time_ids=first.time_ids(shape), loras=loras)


@dataclass
class Text:
    """The text states of the prompts of a batch, and the guidance scale and sizes if a stage takes them.

    `cut` is the longest end of a prompt that did not fit. `conditions` are the timesteps and what an
    IP-Adapter reads that were last asked for, and the inputs of the step for this text at each timestep;
    threads replace them together.
    """

    arrays: Arrays
    cut: str = ""
    conditions: tuple[tuple[tuple[float, ...], IpPrompt | None], Sequence[Arrays]] = (((), None), ())


class Prompts:
    """Encodes the prompts of a batch in one call, and caches the texts of the last `kept` batches.

    Several threads may use it at the same time.
    """

    def __init__(
        self,
        runners: Runners,
        tokenizers: Mapping[str, PromptTokenizer],
        settings: PipelineSettings,
        kept: int,
    ) -> None:
        self._runners = runners
        self.tokenizers = tokenizers
        self._settings = settings
        self._kept = kept
        self.loras = Loras(runners, settings)
        self.ip_images = IpImages(runners)
        self._texts: dict[Condition, Text] = {}  # the last used one is at the end
        self._lock = threading.Lock()  # held while the texts change

    def text(self, asked: Condition, encode: Encode | None = None) -> Text:
        """Returns the text for a batch, from the cache if it is there.

        `encode` does what the stage's runner does, and returns new arrays. It is called in place of that.
        """
        text = self._texts.get(asked)
        if text is None:
            arrays, cut = self._encode(asked, encode) if asked.prompts is not None else (self._zeros(), "")
            text = Text({**arrays, **self._numbers(asked)}, cut)
        with self._lock:
            self._texts.pop(asked, None)
            self._texts[asked] = text
            while len(self._texts) > self._kept:
                del self._texts[next(iter(self._texts))]
        return text

    def conditions(
        self, text: Text, timesteps: Sequence[float], ip_prompt: IpPrompt | None = None
    ) -> Sequence[Arrays]:
        """Returns the step's other inputs for a text: one dict for each of the timesteps."""
        known, conditions = text.conditions
        if known != (asked := (tuple(timesteps), ip_prompt)):
            times = put_timesteps(self._runners, timesteps)
            arrays = self.with_ip_image(text, ip_prompt)
            conditions = conditions_of(self._runners, arrays, times)[: len(timesteps)]
            text.conditions = asked, conditions
        return conditions

    def with_ip_image(self, text: Text, ip_prompt: IpPrompt | None) -> Arrays:
        """Returns a text's arrays, with the inputs for what an IP-Adapter reads if there is one."""
        return {**text.arrays, **self.ip_images.inputs(ip_prompt)}

    def blank(self) -> Arrays:
        """Returns new arrays of the shapes that `with_ip_image` gives."""
        numbers = self._numbers(Condition(None, loras=self.loras.usual))
        numbers |= self.ip_images.inputs(None)
        return {**self._zeros(), **{name: array + 0 for name, array in numbers.items()}}

    def tokens(self, asked: Condition) -> dict[str, list[Tokens]]:
        """Returns the tokens of each picture's prompt for each input of the encode stage."""
        found: dict[str, list[Tokens]] = {}
        for i, (name, tokenizer) in enumerate(self.tokenizers.items()):
            prompts = [pair[i] for pair in asked.prompts or ()]
            read = {prompt: tokenizer(prompt, asked.syntax) for prompt in dict.fromkeys(prompts)}
            found[name] = [read[prompt] for prompt in prompts]
        return found

    def _encode(self, asked: Condition, encode: Encode | None) -> tuple[Arrays, str]:
        runner = self._runners["encode"]
        tokens = self.tokens(asked)
        given = {name: runner.to_device(ids) for name, ids in ids_of(tokens).items()}
        given |= self.loras.inputs(asked.loras, "encode")
        if encode:
            arrays = encode(given)
        else:
            arrays = {name: runner.kept(array) for name, array in runner(given).items()}
        if any((one.weights != 1).any() for read in tokens.values() for one in read):
            arrays["hidden_states"] = self._weighted(arrays["hidden_states"], [*tokens.values()])
        return arrays, cut_of(tokens)

    def _weighted(self, states: Array, tokens: Sequence[Sequence[Tokens]]) -> Array:
        """Returns text states (b, n, d), those of each token times its weight.

        What each encoder gave for each chunk of a prompt then gets its mean back, as in webui.
        """
        to_device = self._runners["encode"].to_device
        settings, (batch, length, width) = self._settings.tokenizers, states.shape
        widths = [one.width for one in settings] if len(settings) > 1 else [width]
        weights = [
            np.tile(np.stack([one.weights for one in read])[:, :, None], own)
            for read, own in zip(tokens, widths, strict=True)
        ]
        weighted = states * to_device(np.concatenate(weights, axis=2))
        chunk, end, factors = settings[0].max_length, 0, 0
        for own in widths:
            begin, end = end, end + own
            for i, start in product(range(batch), range(0, length, chunk)):
                place = i, slice(start, start + chunk), slice(begin, end)
                inside = np.zeros((batch, length, width), np.float32)
                inside[place] = 1
                factors = factors + to_device(inside) * (states[place].mean() / weighted[place].mean())
        return weighted * factors

    def _zeros(self) -> Arrays:
        """Returns text states of zeros, which SDXL takes if there is no prompt."""
        runner = self._runners["encode"]
        return {s.name: runner.to_device(np.zeros(s.shape, np.float32)) for s in runner.contract.outputs}

    def _numbers(self, asked: Condition) -> Arrays:
        """Returns the inputs besides the text states that a stage takes."""
        reader = reads_text(self._runners)
        numbers = numbers_of(asked, self._settings.shape.batch)
        found = {n: reader.to_device(array) for n, array in numbers.items() if takes(self._runners, n)}
        return found | self.loras.inputs(asked.loras, reader.contract.name)


def numbers_of(asked: Condition, batch: int) -> dict[str, np.ndarray]:
    """Returns the guidance input (1,), the scale minus 1, and the time_ids (batch, 6)."""
    sizes = np.tile(np.asarray(asked.time_ids, np.float32), (batch, 1))
    return {"guidance": np.asarray([asked.guidance_scale - 1], np.float32), "time_ids": sizes}


def ids_of(tokens: Mapping[str, Sequence[Tokens]]) -> dict[str, np.ndarray]:
    """Returns the token ids (batch, n) for each input of the encode stage."""
    return {name: np.stack([one.ids for one in read]) for name, read in tokens.items()}


def cut_of(tokens: Mapping[str, Sequence[Tokens]]) -> str:
    """Returns the longest end of a prompt that did not fit, or ""."""
    return max((one.cut for read in tokens.values() for one in read), key=len, default="")


def check_prompts(
    request: Request, tokenizers: Sequence[TokenizerSettings], contracts: Iterable[StageContract]
) -> None:
    """Raises UsageError if a bundle of these tokenizers and stages can't read a request's texts or sizes."""
    stages = [*contracts]
    if len(tokenizers) < 2 and not (request.prompt_2 is None and request.negative_prompt_2 is None):
        raise UsageError(
            "this bundle has one text encoder, and a second prompt is for two, as SDXL has",
            "write one prompt",
        )
    if any(getattr(request, name) is not None for name in PAIRS) and not any(
        spec.name == "time_ids" for contract in stages for spec in contract.inputs
    ):
        raise UsageError(
            "original size, crop and target size are for SDXL; this bundle's UNet is told no sizes",
            "leave them out",
        )
    if request.is_weighted:
        if any(contract.name == DRAW for contract in stages):
            raise UsageError(
                "this bundle is one graph, which encodes the prompt itself and takes no weights of words",
                "build without --whole-loop; such a bundle weights them",
            )
        if len(tokenizers) > 1 and not all(one.width for one in tokenizers):
            raise UsageError("this bundle is from before prompts had weights", REBUILD)
