"""What the stages make of prompts; that of the last ones is kept, as a prompt often comes again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lcm_compile.pipeline.loop import Arrays, Runners, conditions_of, put_timesteps, reads_text, takes
from lcm_compile.pipeline.tokenizer import PromptTokenizer

PROMPTS_KEPT = 8


@dataclass
class Text:
    """A prompt's text states, with the guidance scale where that is an input; `cut` is what did not fit.

    `conditions` are what the step takes for it at each of `timesteps`, the last that were asked for.
    """

    arrays: Arrays
    cut: str = ""
    timesteps: tuple[float, ...] = ()
    conditions: Sequence[Arrays] = ()


class Prompts:
    """Encodes prompts for batches of one prompt each, and keeps the texts of as many as `kept`."""

    def __init__(
        self, runners: Runners, tokenizers: Mapping[str, PromptTokenizer], batch: int, kept: int
    ) -> None:
        self._runners = runners
        self.tokenizers = tokenizers
        self._batch = batch
        self._kept = kept
        self._texts: dict[tuple[str | None, float], Text] = {}  # the one used last is the last

    def text(self, prompt: str | None, guidance_scale: float = 1.0) -> Text:
        """The text of a prompt; None stands for text states of zeros. What is known is not computed."""
        key = (prompt, guidance_scale)
        text = self._texts.pop(key, None)
        if text is None:
            arrays, cut = self._encode(prompt) if prompt is not None else (self._zeros(), "")
            text = Text({**arrays, **self._guidance(guidance_scale)}, cut)
        self._texts[key] = text
        while len(self._texts) > self._kept:
            del self._texts[next(iter(self._texts))]
        return text

    def conditions(self, text: Text, timesteps: Sequence[float]) -> Sequence[Arrays]:
        """What the step takes for a text at each of the timesteps, besides the latent."""
        if text.timesteps != tuple(timesteps):
            times = put_timesteps(self._runners, timesteps)
            text.conditions = conditions_of(self._runners, text.arrays, times)[: len(timesteps)]
            text.timesteps = tuple(timesteps)
        return text.conditions

    def blank(self) -> Arrays:
        """Arrays such as a text has, in memory of their own."""
        return {**self._zeros(), **self._guidance(1.0)}

    def tokens(self, prompt: str) -> tuple[dict[str, np.ndarray], str]:
        """Each tokenizer's ids for a batch of a prompt, and the part of the prompt that did not fit."""
        tokens, cuts = {}, []
        for name, tokenizer in self.tokenizers.items():
            ids, cut = tokenizer(prompt)
            tokens[name] = np.ascontiguousarray(np.broadcast_to(ids, (self._batch, len(ids))))
            cuts.append(cut)
        return tokens, max(cuts, key=len, default="")

    def _encode(self, prompt: str) -> tuple[Arrays, str]:
        runner = self._runners["encode"]
        tokens, cut = self.tokens(prompt)
        # Copies: the runner's output memory may be reused for the negative prompt.
        arrays = runner({name: runner.to_device(ids) for name, ids in tokens.items()})
        return {name: array + 0 for name, array in arrays.items()}, cut

    def _zeros(self) -> Arrays:
        """What stands for no prompt in SDXL."""
        runner = self._runners["encode"]
        return {s.name: runner.to_device(np.zeros(s.shape, np.float32)) for s in runner.contract.outputs}

    def _guidance(self, scale: float) -> Arrays:
        """The guidance scale where a stage takes it."""
        if not takes(self._runners, "guidance"):
            return {}
        return {"guidance": reads_text(self._runners).to_device(np.asarray([scale - 1], np.float32))}
