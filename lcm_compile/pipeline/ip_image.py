"""The picture that an IP-Adapter reads, and the tokens that it becomes.

A picture is read as transformers' CLIPImageProcessor does it: its shorter side is scaled to the encoder's
(bicubic, in 8 bits), its centre is cut out, and its colours are normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import UsageError
from lcm_compile.graphs import IP_IMAGE, IP_TOKENS, IP_WEIGHT
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.source_picture import MOST_PIXELS, SourcePicture, on

MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP's training pictures
DEVIATION = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)
IMAGES_KEPT = 8


@dataclass(frozen=True)
class IpPrompt:
    """What an IP-Adapter reads in one pass: a picture, or None for no picture, and how strongly it counts.

    A negative prompt reads no picture with the weight of the picture.
    """

    image: SourcePicture | None
    weight: float


def ip_prompts_of(request: Request, weight: float | None, guided: bool) -> list[IpPrompt | None]:
    """Returns what an IP-Adapter reads in each pass of a request; None is nothing, with the weight 0.

    `weight` is the bundle's own.
    """
    weight = weight if request.ip_weight is None else request.ip_weight
    if request.ip_image is None or not weight:
        return [None] * (1 + guided)
    return [IpPrompt(request.ip_image, weight), *([IpPrompt(None, weight)] if guided else [])]


class IpImages:
    """Encodes pictures for an IP-Adapter, and keeps the tokens of the last ones.

    Several threads may use it at the same time.
    """

    def __init__(self, runners: Mapping[str, Runner]) -> None:
        self._runner = runners.get(IP_IMAGE)
        self._tokens: dict[SourcePicture | None, Array] = {}

    def missing(self, prompts: Sequence[IpPrompt | None]) -> list[SourcePicture | None]:
        """Returns the pictures whose tokens are not known yet."""
        images = dict.fromkeys(prompt.image for prompt in prompts if prompt is not None)
        return [image for image in images if image not in self._tokens]

    def tokens(self, image: SourcePicture | None) -> Array:
        """Returns the tokens (1, n, d) of a picture, or of None, on the device."""
        assert self._runner is not None
        if (known := self._tokens.get(image)) is not None:
            return known
        runner, shape = self._runner, self._runner.contract.inputs[0].shape
        pixels = np.zeros(shape, np.float32) if image is None else clip_pixels(image, shape[-1])
        shown = np.asarray([image is not None], np.float32)
        given = runner({"pixels": runner.to_device(pixels), "shown": runner.to_device(shown)})
        tokens = self._tokens[image] = runner.kept(given[IP_TOKENS])
        for old in [*self._tokens][:-IMAGES_KEPT]:
            self._tokens.pop(old, None)  # another thread may have done so
        return tokens

    def inputs(self, prompt: IpPrompt | None) -> dict[str, Any]:
        """Returns the inputs of what reads the tokens, on the device; {} without an IP-Adapter."""
        if self._runner is None:
            return {}
        weight = np.asarray([prompt.weight if prompt else 0], np.float32)
        if prompt is None:
            shape = self._runner.contract.outputs[0].shape
            tokens = self._runner.to_device(np.zeros(shape, np.float32))
        else:
            tokens = self.tokens(prompt.image)
        return {IP_TOKENS: tokens, IP_WEIGHT: self._runner.to_device(weight)}


def clip_pixels(picture: SourcePicture, side: int) -> np.ndarray:
    """Returns a picture as CLIP's image encoders read it, float32 (1, 3, side, side).

    What is transparent is on white. Raises UsageError for a picture thousands of times as long as wide.
    """
    from PIL import Image

    image = on(picture.image, (255, 255, 255))
    short, long = sorted(image.size)
    if side * (scaled := int(side * long / short)) > MOST_PIXELS:
        raise UsageError(
            f"the ip-image is {image.width}×{image.height} pixels, of which only the centre would be read",
            "give its part that shows something",
        )
    size = (side, scaled) if image.width <= image.height else (scaled, side)
    left, top = ((one - side) // 2 for one in size)
    resized = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    colours = (np.asarray(resized) / 255).astype(np.float32)
    return ((colours - MEAN) / DEVIATION).transpose(2, 0, 1)[None]


def check_ip_image(request: Request, has_adapter: bool, builds: str = "") -> None:
    """Raises UsageError if a request has a picture for an IP-Adapter, and the bundle has none.

    `builds` is the command that builds such a bundle.
    """
    if request.ip_image is not None and not has_adapter:
        raise UsageError(
            "an ip-image is given, and this bundle has no IP-Adapter that would read it",
            builds or "lcm-compile build --ip-adapter FILE builds one that has",
        )
