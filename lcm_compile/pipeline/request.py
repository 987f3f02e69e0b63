"""A request to a pipeline: a prompt, a seed, and the settings of the picture."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from lcm_compile.errors import UsageError


@dataclass(frozen=True)
class Request:
    """The settings of one call of the pipeline. Raises UsageError if a value is out of range.

    A `negative_prompt` of None differs from "": with None, SDXL conditions on zeros. A `guidance_scale` of 1
    is none; a full LCM's own default is `Pipeline.settings.guidance_scale`.
    """

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


def draw_seed() -> int:
    """Returns a random seed of 32 bits."""
    return secrets.randbelow(2**32)
