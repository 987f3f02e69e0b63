"""Requests to a pipeline: a prompt, a seed, and the settings of the picture."""

from __future__ import annotations

import math
import operator
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

from lcm_compile.errors import UsageError, unknown_name
from lcm_compile.pipeline.control_picture import check_span, control_numbers, control_pictures
from lcm_compile.pipeline.source_picture import ALPHA, SourcePicture, source_picture
from lcm_compile.pipeline.syntax import SYNTAXES, read_prompt
from lcm_compile.samplers import SAMPLERS
from lcm_compile.spec import MOST_IMAGES, LoraSpec, Shape


@dataclass(frozen=True)
class Request:
    """What to draw: pictures of one prompt and one seed. Raises UsageError if a value is out of range.

    prompt: What the pictures show, as Unicode text. What is over the tokenizer's tokens (77) is cut.
    seed: The seed of the noise, from 0 to 2⁶⁴ − 1; torch's CPU generator makes it of the lower 32 bits.
    negative_prompt: What the pictures should not show. It is read only if `guidance_scale` is above 1, and
        by no full LCM. None, the default, differs from "" for SDXL, which then conditions on zeros.
    steps: Denoising steps; 4 by default. From 1 to 50 with the samplers `lcm` and `tcd`, and to 1000 with
        others. `Pipeline.settings.steps` is the bundle's own default.
    guidance_scale: The strength of guidance without a unit, from 0 to 1,000,000. 1, the default, is none, and
        up to 2 suits LCM-LoRAs. Above 1 each step runs the UNet twice. A full LCM reads the scale as an
        input; its own default is `Pipeline.settings.guidance_scale`.
    num_images: The number of pictures, from 1 to 10,000; 1 by default. They share the seed's one stream of
        noise, so the first of four is another picture than the seed's only one.
    index: The only one of the `num_images` pictures to draw, counted from 0; None, the default, draws all.
        It is the picture that it is among all of them.
    sampler: A name of `samplers.SAMPLERS`; `lcm`, the default, is what LCM-LoRAs and full LCMs are made for.
        `Pipeline.settings.sampler` is what the bundle is made for.
    eta: The share of noise that TCD and DDIM add again in each step, from 0 to 1. None, the default, is 0.
        `Pipeline.settings.eta` is that of the bundle's weights.
    guidance_rescale: The share of the guided prediction whose contrast is brought back to the unguided one's,
        from 0, the default, to 1.
    prompt_syntax: How prompts are read, one of `syntax.SYNTAXES`: `plain`, the default, or `webui`, whose
        brackets weight words.
    prompt_2: What SDXL's second text encoder reads; None, the default, is the same as the first.
    negative_prompt_2: The same for the negative prompt; it needs a `negative_prompt`.
    original_size: The height and width in pixels of the picture that SDXL is told to draw a part of; None,
        the default, is the picture's own size.
    crop: The top and left of that part in pixels; None, the default, is 0 and 0.
    target_size: The height and width in pixels that SDXL is told to aim at; None, the default, is the
        picture's own size.
    lora_weights: The weights of LoRAs that the bundle takes at run time, as a mapping from their names to
        numbers or to LoraSpecs, whose strengths are for parts of the model. Without one the bundle's own
        counts. The field has LoraSpecs whose sources are the names.
    loras: The LoRAs to put into the bundle's slots, as LoraSpecs or in the form of `LoraSpec.parse`.
    image: The picture to begin at: a path, the bytes of a picture's file, a PIL image, an array (height,
        width, 3) of 8 bits or a SourcePicture. None, the default, begins at noise.
    strength: The share of the steps that are drawn from the image, from 0 to 1: the first ones are left out.
        None is 0.8, or 1 with a mask.
    mask: What is repainted of the image, as an image is given: white is, and black is kept. "alpha" is the
        transparency of the image itself.
    control: The picture that a bundle's ControlNet or T2I-Adapter reads, as an image is given; for several a
        list with one for each, ControlNets' first. All pictures of a request share it. It is resized to the
        bundle's size without keeping its aspect ratio. Kept as a tuple of SourcePicture; the default, (), is
        none.
    control_weight: The strength of the ControlNet or adapter without a unit, any finite number; for several a
        list with one for each. 0 is none, and the bundle's own, of its `build`, is the default, ().
    control_start: The share of the steps, from 0 to 1, before which it does nothing; for several a list. The
        default, (), is 0.
    control_end: The share of the steps, from 0 to 1, after which it does nothing; above its start. The
        default, (), is 1.
    hires: The factor, above 1 and up to 16, by which a finished picture is enlarged and then drawn on, which
        needs a bundle that has the larger size too. None, the default, draws no second pass.
    hires_upscaler: How it is enlarged, one of UPSCALERS; None is `latent`, and `lanczos` needs a bundle that
        reads images.
    hires_strength: The share of the steps of the second pass that are drawn, from 0 to 1; None is 0.7.
    hires_steps: The steps of the second pass, of which that share is drawn; None is `steps`.
    ip_image: The picture that a bundle's IP-Adapter reads, as an image is given; all pictures of a drawing
        share it. None, the default, draws as without an IP-Adapter.
    ip_weight: How strongly that picture counts, any finite number; 0 is not at all. None, the default, is
        the bundle's own, of `build --ip-adapter`.
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
    prompt_syntax: str = "plain"
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    lora_weights: tuple[LoraSpec, ...] = ()
    loras: tuple[LoraSpec, ...] = ()
    image: SourcePicture | None = None
    strength: float | None = None
    mask: SourcePicture | None = None
    control: tuple[SourcePicture, ...] = ()
    control_weight: tuple[float, ...] = ()
    control_start: tuple[float, ...] = ()
    control_end: tuple[float, ...] = ()
    hires: float | None = None
    hires_upscaler: str | None = None
    hires_strength: float | None = None
    hires_steps: int | None = None
    ip_image: SourcePicture | None = None
    ip_weight: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_weights", weights_of(self.lora_weights))
        object.__setattr__(self, "loras", loras_of(self.loras))
        check_text(self.prompt, "prompt")
        for name, called in OTHER_PROMPTS.items():
            if getattr(self, name) is not None:
                check_text(getattr(self, name), called)
        if self.negative_prompt is None and self.negative_prompt_2 is not None:
            raise UsageError(
                "there is a second negative prompt but no first one",
                'give a negative prompt too, which may be ""',
            )
        if self.prompt_syntax not in SYNTAXES:
            raise unknown_name("prompt syntax", str(self.prompt_syntax), SYNTAXES)
        for prompt in self.prompts:
            read_prompt(prompt, self.prompt_syntax)
        for name, least in PAIRS.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, pair(getattr(self, name), name.replace("_", " "), least))
        for name, called in WHOLE_NUMBERS.items():
            if name not in MAY_BE_NONE or getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(getattr(self, name), called))
        for name, (called, most) in NUMBERS.items():
            if name not in MAY_BE_NONE or getattr(self, name) is not None:
                object.__setattr__(self, name, number(getattr(self, name), called, most))
        object.__setattr__(self, "control", control_pictures(self.control))
        for name, limits in CONTROL_NUMBERS.items():
            given, called = getattr(self, name), name.replace("_", " ")
            object.__setattr__(self, name, control_numbers(given, called, len(self.control), *limits))
        check_span(self.control_start, self.control_end)
        if self.sampler not in SAMPLERS:
            raise unknown_name("sampler", str(self.sampler), SAMPLERS)
        if not 1 <= self.num_images <= MOST_IMAGES:
            raise too_many(self.num_images)
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must be from 0 to 2⁶⁴ − 1, not {self.seed}")
        if self.index is not None and not 0 <= self.index < self.num_images:
            raise UsageError(
                f"picture {self.index} is not one of 0 to {self.num_images - 1}",
                "the number of images says of how many it is one",
            )
        self.take_image()
        self.check_hires()
        self.take_ip_image()

    def take_ip_image(self) -> None:
        """Opens the IP-Adapter's picture. Raises UsageError if it or its weight can't be used."""
        if self.ip_image is not None:
            object.__setattr__(self, "ip_image", source_picture(self.ip_image, "ip-image"))
        if self.ip_weight is None:
            return
        if self.ip_image is None:
            raise UsageError(
                "an ip-weight is given without the picture that it is for", "give an ip-image too"
            )
        if not math.isfinite(weight := signed_number(self.ip_weight, "ip-weight")):
            raise UsageError(f"ip-weight must be a finite number, not {weight}")
        object.__setattr__(self, "ip_weight", weight)

    def take_image(self) -> None:
        """Opens the image and the mask. Raises UsageError if they can't be used."""
        if self.image is None:
            if self.strength is not None or self.mask is not None:
                given = "strength" if self.mask is None else "mask"
                raise UsageError(f"a {given} is given without the image that it is for", "give an image too")
            return
        image, mask = source_picture(self.image), self.mask
        object.__setattr__(self, "image", image)
        if mask is not None:
            mask = image.as_mask() if mask == ALPHA else source_picture(mask, "mask")
            object.__setattr__(self, "mask", mask)
        check_strength("strength", self.denoising_strength, self.steps)

    def check_hires(self) -> None:
        """Raises UsageError if the second pass can't be drawn at any size."""
        if self.hires is None:
            for name in HIRES:
                if getattr(self, name) is not None:
                    raise UsageError(f"{name.replace('_', ' ')} is given without hires", "give hires=2 too")
            return
        if self.hires <= 1:
            raise UsageError(
                f"hires must be above 1, not {self.hires:g}", "2 draws twice the height and width"
            )
        if self.image is not None:
            raise UsageError(
                "hires enlarges what is drawn from noise, and an image is given",
                "draw from the image at the larger size: --height and --width choose it",
            )
        if self.upscaler not in UPSCALERS:
            raise unknown_name("hires upscaler", str(self.hires_upscaler), UPSCALERS)
        check_strength("hires strength", self.second_strength, self.second_steps)

    @property
    def denoising_strength(self) -> float:
        """The strength, or what it is by default."""
        if self.strength is not None:
            return self.strength
        return STRENGTH if self.mask is None else 1.0

    @property
    def first_step(self) -> int:
        """The number of the first step that is drawn: those before it are left out if there is an image."""
        if self.image is None:
            return 0
        return self.steps - drawn_steps(self.denoising_strength, self.steps)

    @property
    def upscaler(self) -> str:
        """The upscaler of hires, or what it is by default."""
        return LATENT if self.hires_upscaler is None else self.hires_upscaler

    @property
    def second_strength(self) -> float:
        """The strength of the second pass of hires, or what it is by default."""
        return HIRES_STRENGTH if self.hires_strength is None else self.hires_strength

    @property
    def second_steps(self) -> int:
        """The steps of the second pass of hires, or what they are by default."""
        return self.steps if self.hires_steps is None else self.hires_steps

    def second_pass(self, image: SourcePicture) -> Request:
        """Returns the second pass of hires, which begins at an enlarged image: it is a request of its own."""
        own: dict[str, Any] = dict.fromkeys(("hires", *HIRES))
        own |= {"image": image, "strength": self.second_strength, "steps": self.second_steps}
        return replace(self, **own)

    def size(self, shape: Shape) -> tuple[int, int]:
        """Returns the height and width of the pictures in pixels, of a bundle that draws them in a shape."""
        factor = self.hires or 1
        return round(shape.height * factor), round(shape.width * factor)

    def pictures(self) -> list[Request]:
        """Returns a request for each picture alone."""
        if self.index is not None:
            return [self]
        return [replace(self, index=index) for index in range(self.num_images)]

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts that are given."""
        others = (getattr(self, name) for name in OTHER_PROMPTS)
        return (self.prompt, *(prompt for prompt in others if prompt is not None))

    def time_ids(self, shape: Shape) -> tuple[int, ...]:
        """Returns the six numbers of pixels that SDXL is told, for pictures of a shape."""
        size = shape.height, shape.width
        return (*(self.original_size or size), *(self.crop or (0, 0)), *(self.target_size or size))

    @property
    def is_weighted(self) -> bool:
        """Whether a prompt weights a word."""
        pieces = (piece for prompt in self.prompts for piece in read_prompt(prompt, self.prompt_syntax))
        return any(piece.weight != 1 for piece in pieces)


def requests_for(
    seed: int | Sequence[int], num_images: int = 1, index: int | None = None, **fields: Any
) -> list[Request]:
    """Returns a request for each picture of a call; `fields` are those of Request, and TEXTS may be lists.

    Of prompts in a list each has `num_images` pictures, one prompt's after the other's. One seed is that of a
    single stream of noise for all pictures of the call. Seeds in a list are one for each picture: each gives
    the picture that it gives alone, and one prompt has as many pictures as there are seeds.

    Raises UsageError if a list is empty, lists do not fit each other, or one prompt has a seed twice.
    """
    prompts = texts_of(fields)
    each = Request(seed=0, num_images=num_images, **prompts[0]).num_images  # checked
    seeds = listed(seed, "seed")
    if seeds is None:
        whole = Request(seed=seed, num_images=each * len(prompts), index=index, **prompts[0])  # type: ignore[arg-type]
        return [replace(picture, **prompts[(picture.index or 0) // each]) for picture in whole.pictures()]

    if index is not None:
        raise UsageError(
            "a list of seeds has one for each picture, and takes no index", "give the seed of that picture"
        )
    if len(prompts) == each == 1:
        each = len(seeds)
    if each * len(prompts) != len(seeds):
        raise UsageError(
            f"{len(seeds)} seeds for {each * len(prompts)} pictures: a list of seeds has one for each picture"
        )
    requests = [Request(seed=one, index=0, **prompts[i // each]) for i, one in enumerate(seeds)]
    if len(prompts) == 1:
        for one, times in Counter(request.seed for request in requests).items():
            if times > 1:
                raise UsageError(f"seed {one} is given {times} times, and gives the same picture each time")
    return requests


def texts_of(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the fields of a request for each prompt of a list, or for a single one.

    Raises UsageError if another list of TEXTS has not a text for each of the prompts.
    """
    prompts = listed(fields.get("prompt"), "prompt")
    if prompts is None:
        return [dict(fields)]
    each = [dict(fields) for _ in prompts]
    for name, called in TEXTS.items():
        texts = listed(fields.get(name), called)
        if texts is None:
            continue
        if len(texts) != len(prompts):
            raise UsageError(
                f"{len(texts)} {called}s for {len(prompts)} prompts: a list must have one for each prompt"
            )
        for i, text in enumerate(texts):
            check_text(text, f"list's {called} {i}")
            each[i][name] = text
    return each


def pictures_of(requests: Request | Sequence[Request]) -> list[Request]:
    """Returns a request for each picture of these requests, which are to be drawn together.

    Raises UsageError if there are none or over MOST_IMAGES, or if they differ in what pictures that are drawn
    together share.
    """
    requests = [requests] if isinstance(requests, Request) else list(requests)
    if not requests:
        raise UsageError("there is no request to draw")
    for name, called in SHARED.items():
        if len(values := {getattr(request, name) for request in requests}) > 1:
            raise UsageError(
                f"requests of one drawing must have the same {called}, not {', '.join(map(str, values))}",
                "draw them one after another",
            )
    if len({request.negative_prompt is None for request in requests}) > 1:
        raise UsageError(
            "requests of one drawing must all have a negative prompt, or none of them", 'it may be ""'
        )
    for name, called in (("image", "an image"), ("mask", "a mask")):
        if len({getattr(request, name) is None for request in requests}) > 1:
            raise UsageError(f"requests of one drawing must all have {called}, or none of them")
    pictures = [picture for request in requests for picture in request.pictures()]
    if len(pictures) > MOST_IMAGES:
        raise too_many(len(pictures))
    return pictures


def drawn_together(request: Request) -> tuple[Any, ...]:
    """Returns what is equal for requests that may be drawn together, and can be the key of a mapping."""
    given = (getattr(request, name) is None for name in ("negative_prompt", "image", "mask"))
    return (*(getattr(request, name) for name in SHARED), *given)


def listed(value: Any, name: str) -> list[Any] | None:
    """Returns a list, a tuple, a range or an array of one dimension as a list, and None for all else.

    Raises UsageError if it is empty, or has over MOST_IMAGES.
    """
    if not isinstance(value, list | tuple | range) and getattr(value, "ndim", 0) != 1:
        return None
    if not 1 <= len(value) <= MOST_IMAGES:
        raise UsageError(f"a list of {name}s must have from 1 to {MOST_IMAGES}, not {len(value)}")
    return list(value)


MOST_PIXELS = 1_000_000  # on a side; SDXL was trained with some thousands at most
MOST_GUIDANCE = 1_000_000  # far above what draws a picture, and far below what overflows fp32
# The fields that are numbers from 0, with their names in messages and the largest values.
NUMBERS = {
    "guidance_scale": ("guidance scale", MOST_GUIDANCE),
    "guidance_rescale": ("guidance rescale", 1),
    "eta": ("eta", 1),
    "strength": ("strength", 1),
    "hires": ("hires", 16),
    "hires_strength": ("hires strength", 1),
}
STRENGTH = 0.8  # by default, as in diffusers' StableDiffusionImg2ImgPipeline
HIRES_STRENGTH = 0.7  # by default, as in A1111's web UI
LATENT, LANCZOS = "latent", "lanczos"
UPSCALERS = {LATENT: "Latent", LANCZOS: "Lanczos"}  # each with its name in A1111's web UI
HIRES = ("hires_upscaler", "hires_strength", "hires_steps")  # the fields that count only with hires
# The prompts besides `prompt`, with their names in messages.
OTHER_PROMPTS = {
    "negative_prompt": "negative prompt",
    "prompt_2": "second prompt",
    "negative_prompt_2": "second negative prompt",
}
TEXTS = {"prompt": "prompt", **OTHER_PROMPTS}  # the fields that calls take lists of
# What SDXL is told of sizes, each with the least value.
PAIRS = {"original_size": 1, "crop": 0, "target_size": 1}
# What pictures that are drawn together share, with the names in messages.
SHARED = {
    "sampler": "sampler",
    "steps": "number of steps",
    "guidance_scale": "guidance scale",
    "eta": "eta",
    "guidance_rescale": "guidance rescale",
    "prompt_syntax": "prompt syntax",
    "original_size": "original size",
    "crop": "crop",
    "target_size": "target size",
    "lora_weights": "weights of LoRAs",
    "loras": "LoRAs",
    "strength": "strength",
    "control": "control picture",
    "control_weight": "control weight",
    "control_start": "control start",
    "control_end": "control end",
    "hires": "hires",
    "upscaler": "hires upscaler",
    "second_strength": "hires strength",
    "second_steps": "hires steps",
    "ip_image": "ip-image",
    "ip_weight": "ip-weight",
}
# The numbers for a ControlNet, with the least and the largest value.
CONTROL_NUMBERS = {
    "control_weight": (-math.inf, math.inf),
    "control_start": (0.0, 1.0),
    "control_end": (0.0, 1.0),
}
# The fields that are whole numbers, with their names in messages.
WHOLE_NUMBERS = {
    "seed": "seed",
    "steps": "steps",
    "num_images": "the number of images",
    "index": "the index of a picture",
    "hires_steps": "hires steps",
}
MAY_BE_NONE = {"index", "eta", "strength", "hires", "hires_strength", "hires_steps"}


def drawn_steps(strength: float, steps: int) -> int:
    """Returns how many of the steps are drawn from an image, as diffusers counts them."""
    return min(int(steps * strength), steps)


def check_strength(name: str, strength: float, steps: int) -> None:
    """Raises UsageError if a strength leaves no step to draw; `name` is its own."""
    if steps > 0 and not drawn_steps(strength, steps):
        least = math.ceil(1000 / steps) / 1000
        raise UsageError(
            f"a {name} of {strength:g} leaves none of {steps} steps to draw",
            f"give a {name} of {least:g} or more, or more steps",
        )


def weights_of(given: Any) -> tuple[LoraSpec, ...]:
    """Returns the weights of LoRAs by name, in the order of the names. Raises UsageError if one is none."""
    if isinstance(given, Mapping):
        given = [
            replace(weight, source=name, name=None)
            if isinstance(weight, LoraSpec)
            else LoraSpec(name, signed_number(weight, f"the weight of LoRA {name}"))
            for name, weight in given.items()
        ]
    elif not isinstance(given, list | tuple) or not all(isinstance(one, LoraSpec) for one in given):
        raise UsageError(
            f"weights of LoRAs must be a mapping from their names to numbers, not {shown(given)}",
            'for example {"style": 0.8}',
        )
    found = tuple(sorted(given, key=lambda lora: lora.source))
    if twice := next((a.source for a, b in pairwise(found) if a.source == b.source), None):
        raise UsageError(f"LoRA {twice} has two weights", "give it one")
    return found


def loras_of(given: Any) -> tuple[LoraSpec, ...]:
    """Returns LoRAs for slots. Raises UsageError if one is neither a LoraSpec nor text of that form."""
    given = [given] if isinstance(given, str | Path | LoraSpec) else given
    if not isinstance(given, list | tuple) or not all(
        isinstance(one, str | Path | LoraSpec) for one in given
    ):
        raise UsageError(
            f"LoRAs must be a list of files with their weights, not {shown(given)}",
            'for example ["style.safetensors:0.7"]',
        )
    return tuple(lora if isinstance(lora, LoraSpec) else LoraSpec.parse(str(lora)) for lora in given)


def too_many(images: int) -> UsageError:
    """Returns the error for a number of images that is out of range."""
    return UsageError(
        f"the number of images must be from 1 to {MOST_IMAGES}, not {images}",
        "draw more by several calls with other seeds",
    )


def pair(value: Any, name: str, least: int) -> tuple[int, int]:
    """Returns two numbers of pixels. Raises UsageError for all else, and if one is out of range."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UsageError(f"{name} must be two whole numbers, vertical and horizontal, not {shown(value)}")
    vertical, horizontal = (whole_number(number, name) for number in value)
    if not least <= min(vertical, horizontal) <= max(vertical, horizontal) <= MOST_PIXELS:
        raise UsageError(
            f"{name} must be from {least} to {MOST_PIXELS} pixels, not {vertical} and {horizontal}"
        )
    return vertical, horizontal


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


def signed_number(value: Any, name: str) -> float:
    """Returns a number of any library as a float. Raises UsageError for all else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} must be a number, not {shown(value)}")
    return float(value)


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
