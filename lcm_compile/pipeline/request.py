"""A request to a pipeline: a prompt, a seed, and the settings of the picture."""

from __future__ import annotations

import operator
import secrets
from dataclasses import dataclass
from numbers import Real
from typing import Any

from lcm_compile.errors import UsageError, unknown_name
from lcm_compile.samplers import SAMPLERS


@dataclass(frozen=True)
class Request:
    """The settings of one call of the pipeline. Raises UsageError if a value is of no use or out of range.

    A `negative_prompt` of None differs from "": with None, SDXL conditions on zeros. A `guidance_scale` of 1
    is none; a full LCM's own default is `Pipeline.settings.guidance_scale`. All `num_images` share one stream
    of noise. With an `index`, only that picture of them is drawn, counted from 0. `sampler` is one of
    `samplers.SAMPLERS`; LCM-LoRAs and full LCMs are made for `lcm`. `eta` is the share of noise that TCD and
    DDIM add again in each step, from 0 to 1, None for the sampler's own. `guidance_rescale`, from 0 to 1, is
    the share of the guided prediction whose contrast is brought back to the unguided one's.
    """

    prompt: str
    seed: int
    negative_prompt: str | None = None
    steps: int = 4
    guidance_scale: float = 1.0
    num_images: int = 1
    index: int | None = None
    sampler: str = "lcm"
    eta: float | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.prompt, list | tuple):
            raise UsageError(
                f"the prompt is a list of {len(self.prompt)}, and one call draws one prompt",
                "call the pipeline once for each prompt",
            )
        check_text(self.prompt, "prompt")
        if self.negative_prompt is not None:
            check_text(self.negative_prompt, "negative prompt")
        for name, called in WHOLE_NUMBERS.items():
            if name != "index" or self.index is not None:
                object.__setattr__(self, name, whole_number(getattr(self, name), called))
        for name, (called, most) in NUMBERS.items():
            if name != "eta" or self.eta is not None:
                object.__setattr__(self, name, number(getattr(self, name), called, most))
        if self.sampler not in SAMPLERS:
            raise unknown_name("sampler", str(self.sampler), SAMPLERS)
        if not 1 <= self.num_images <= MOST_IMAGES:
            raise UsageError(
                f"the number of images must be from 1 to {MOST_IMAGES}, not {self.num_images}",
                "draw more by several calls with other seeds",
            )
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must be from 0 to 2⁶⁴ − 1, not {self.seed}")
        if self.index is not None and not 0 <= self.index < self.num_images:
            raise UsageError(f"picture {self.index} is not one of 0 to {self.num_images - 1}")


MOST_IMAGES = 10_000  # the noise of all of them is in memory
MOST_GUIDANCE = 1_000_000  # far above what draws a picture, and far below what overflows fp32
# The fields that are numbers from 0, with their names in messages and the largest values.
NUMBERS = {
    "guidance_scale": ("guidance scale", MOST_GUIDANCE),
    "guidance_rescale": ("guidance rescale", 1),
    "eta": ("eta", 1),
}
# The fields that are whole numbers, with their names in messages.
WHOLE_NUMBERS = {
    "seed": "seed",
    "steps": "steps",
    "num_images": "the number of images",
    "index": "the index of a picture",
}


def whole_number(value: Any, name: str) -> int:
    """Returns an integer of any library as an int. Raises UsageError for all else, bools and floats too."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, not {shown(value)}") from None


def number(value: Any, name: str, most: int) -> float:
    """Returns a number of any library as a float. Raises UsageError unless it is from 0 to `most`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} must be a number, not {shown(value)}")
    if not 0.0 <= (found := float(value)) <= most:
        raise UsageError(f"{name} must be from 0 to {most}, not {found}")
    return found


def check_text(text: Any, name: str) -> None:
    """Raises UsageError if a text is no str, or holds half of a character, as undecodable bytes become."""
    if not isinstance(text, str):
        raise UsageError(f"the {name} must be text, a str, not {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the {name} is not Unicode text: its character {error.start + 1} is {text[error.start]!a}",
            "a terminal and the programs in it must use UTF-8",
        ) from None


def shown(value: Any) -> str:
    """Returns a value and its type, for a message."""
    text = repr(value)
    return f"{text[:60]}{'…' * (len(text) > 60)} ({type(value).__name__})"


def draw_seed() -> int:
    """Returns a random seed of 32 bits."""
    return secrets.randbelow(2**32)
