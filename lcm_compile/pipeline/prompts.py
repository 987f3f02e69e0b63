"""Encodes prompts. The results of the last ones are cached, because prompts are often used again."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lcm_compile.pipeline.loop import Arrays, Runners, conditions_of, put_timesteps, reads_text, takes
from lcm_compile.pipeline.tokenizer import PromptTokenizer

PROMPTS_KEPT = 8  # prompts, or different prompts of a batch, in the cache
BatchPrompts = tuple[str, ...] | None  # a prompt for each picture of a batch, or none


@dataclass
class Text:
    """The text states of the prompts of a batch, and the guidance scale if a stage takes it as an input.

    `cut` is the longest end of a prompt that did not fit. `conditions` are the timesteps that were last asked
    for, and the inputs of the step for this text at each of them; threads replace both together.
    """

    arrays: Arrays
    cut: str = ""
    conditions: tuple[tuple[float, ...], Sequence[Arrays]] = ((), ())


class Prompts:
    """Encodes the prompts of a batch in one call, and caches the texts of the last `kept` batches.

    Several threads may use it at the same time.
    """

    def __init__(self, runners: Runners, tokenizers: Mapping[str, PromptTokenizer], kept: int) -> None:
        self._runners = runners
        self.tokenizers = tokenizers
        self._kept = kept
        self._texts: dict[tuple[BatchPrompts, float], Text] = {}  # the last used one is at the end
        self._lock = threading.Lock()  # held while the texts change

    def text(self, prompts: BatchPrompts, guidance_scale: float = 1.0) -> Text:
        """Returns the text of a prompt for each picture, from the cache if it is there.

        None in the prompts' place gives text states of zeros.
        """
        key = (prompts, guidance_scale)
        text = self._texts.get(key)
        if text is None:
            arrays, cut = self._encode(prompts) if prompts is not None else (self._zeros(), "")
            text = Text({**arrays, **self._guidance(guidance_scale)}, cut)
        with self._lock:
            self._texts.pop(key, None)
            self._texts[key] = text
            while len(self._texts) > self._kept:
                del self._texts[next(iter(self._texts))]
        return text

    def conditions(self, text: Text, timesteps: Sequence[float]) -> Sequence[Arrays]:
        """Returns the step's other inputs for a text: one dict for each of the timesteps."""
        known, conditions = text.conditions
        if known != tuple(timesteps):
            times = put_timesteps(self._runners, timesteps)
            conditions = conditions_of(self._runners, text.arrays, times)[: len(timesteps)]
            text.conditions = tuple(timesteps), conditions
        return conditions

    def blank(self) -> Arrays:
        """Returns new arrays of the shapes that a text has."""
        return {**self._zeros(), **self._guidance(1.0)}

    def tokens(self, prompts: Sequence[str]) -> tuple[dict[str, np.ndarray], str]:
        """Returns prompts' ids (batch, tokens) for each tokenizer, and the longest end that did not fit."""
        tokens, cuts = {}, [""]
        for name, tokenizer in self.tokenizers.items():
            found = {prompt: tokenizer(prompt) for prompt in dict.fromkeys(prompts)}
            tokens[name] = np.stack([found[prompt].ids for prompt in prompts])
            cuts += [read.cut for read in found.values()]
        return tokens, max(cuts, key=len)

    def _encode(self, prompts: Sequence[str]) -> tuple[Arrays, str]:
        runner = self._runners["encode"]
        tokens, cut = self.tokens(prompts)
        arrays = runner({name: runner.to_device(ids) for name, ids in tokens.items()})
        return {name: runner.kept(array) for name, array in arrays.items()}, cut

    def _zeros(self) -> Arrays:
        """Returns text states of zeros, which SDXL takes if there is no prompt."""
        runner = self._runners["encode"]
        return {s.name: runner.to_device(np.zeros(s.shape, np.float32)) for s in runner.contract.outputs}

    def _guidance(self, scale: float) -> Arrays:
        """Returns the guidance input, the scale minus 1, or {} if no stage takes it."""
        if not takes(self._runners, "guidance"):
            return {}
        return {"guidance": reads_text(self._runners).to_device(np.asarray([scale - 1], np.float32))}
