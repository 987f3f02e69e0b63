"""The request for a build: its base, its LoRAs, its shape. Needs no torch, and reads no files or hardware."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

from lcm_compile.errors import UsageError, unknown_name
from lcm_compile.graphs import CONTROLS, T2I_ADAPTERS
from lcm_compile.precisions import ASKED_PRECISIONS

LORA_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# The rewrites of the graphs for LCM. They change results only by rounding, and each can be left out.
REWRITES = {
    "context": "what depends only on the prompt and the timesteps is computed once per prompt",
    "qkv": "the queries, keys and values of a self-attention are one matrix product",
    "upsampling": "doubling a map and convolving it 3×3 becomes four 2×2 convolutions of the small map",
    "lcm-step": "the scheduler's arithmetic is part of the step's graph",
    "rgb8": "the decoder's graph ends in 8-bit RGB",
    "winograd": "3×3 convolutions on x86 CPUs take fewer multiplications, where that is faster (OpenVINO)",
}
# Those that a backend makes when it builds an engine. The others are in the graphs.
ENGINE_REWRITES = ("winograd",)

CHUNK_TOKENS = 77  # of a prompt: what CLIP's text encoders read at once
MOST_CHUNKS = 10
WHOLE_LOOP_NEEDS = ("context", "lcm-step")  # the rewrites without which the loop can't be one graph


@dataclass(frozen=True)
class Shape:
    """The pictures that one call of the engines draws. Height and width are in pixels.

    Raises UsageError if the batch is below 1, or if a side is not a positive multiple of 8.
    """

    batch: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"batch must be 1 or more, not {self.batch}")
        for name, side in (("height", self.height), ("width", self.width)):
            if side < 8 or side % 8:
                raise UsageError(f"{name} must be a positive multiple of 8, not {side}")

    def __str__(self) -> str:
        return f"{self.batch}×{self.height}×{self.width}"


# The names of model parts that a LoRA can have a strength of its own for.
LORA_PART = re.compile(r"unet|text|text_encoder(_2)?|mid_block|(down|up)_blocks(\.\d+)?")
EMBEDDING_FILE = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, LORA_SUFFIXES))}))(?::(.*))?", re.DOTALL)
EMBEDDING_FORM = "write FILE, or FILE:WORD"
LORA_FORM = "write PATH, PATH:0.8, PATH:0.8@text=0.5,down_blocks.1=0, or PATH:0.8:runtime"
# A LoRA whose strength is an input of the graphs, and the name that a picture gives it by.
AT_RUN_TIME = re.compile(r"(?P<lora>.+):runtime(?::(?P<name>[^:/\\@=,]+))?", re.DOTALL)
USUAL_STEMS = ("pytorch_lora_weights", "adapter_model")  # of LoRAs that are named after their folder
MOST_SLOTS = 8
MOST_IMAGES = 10_000  # of a request: the noise of all of them is in memory


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA and the weight λ that it is fused with. `source` is a path, or `OWNER/NAME[:FILE]` on the hub.

    `strengths` gives parts of the model another weight: `unet`, `text` (every text encoder), `text_encoder`,
    `text_encoder_2`, `down_blocks`, `down_blocks.1`, `mid_block`, `up_blocks`, …. If parts overlap, the
    smallest one counts. A LoRA with a `name` is not fused: its weight is an input of the graphs, which each
    picture may set by that name. Raises UsageError for an unknown part or a weight that is not finite.
    """

    source: str
    weight: float = 1.0
    strengths: Mapping[str, float] = field(default_factory=dict, hash=False)
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("a LoRA has no path", LORA_FORM)
        for part in self.strengths:
            if not LORA_PART.fullmatch(part):
                raise UsageError(
                    f"LoRA {self.source} has a strength for {part!r}, which is no part of a model",
                    "give unet, text, text_encoder, text_encoder_2, down_blocks.N, mid_block or up_blocks.N",
                )
        for weight in (self.weight, *self.strengths.values()):
            if not math.isfinite(weight):
                raise UsageError(f"the weight {weight} of LoRA {self.source} is not finite", LORA_FORM)

    @classmethod
    def parse(cls, text: str) -> LoraSpec:
        """Returns the LoRA of `SOURCE` or `SOURCE:WEIGHT`.

        Each may be followed by `:runtime` or `:runtime:NAME`, and then by `@PART=WEIGHT,…`. A LoRA without a
        NAME is called by its file's, or by its folder's if all such files have that name. No file is checked,
        so a source whose own name ends like a weight needs a weight after it (`odd:5:1`).
        Raises UsageError if a weight is not a number, or if a part has two.
        """
        head, _, tail = text.rpartition("@")
        strengths = {}
        if "=" in tail and ":" not in tail and not ends_path(tail):
            for assignment in tail.split(","):
                part, _, weight = assignment.partition("=")
                if part in strengths:
                    raise UsageError(f"{text!r} has two strengths for {part}", LORA_FORM)
                strengths[part] = number(weight, text)
        else:
            head = text
        called = None
        if found := AT_RUN_TIME.fullmatch(head):
            head, called = found["lora"], found["name"] or ""
        source, colon, last = head.rpartition(":")
        strength = 1.0
        if not colon or ends_path(last):
            source = head
        else:
            strength = number(last, text)
        return cls(source, strength, strengths, own_name(source) if called == "" else called)

    def __str__(self) -> str:
        parts = ",".join(f"{part}={weight!r}" for part, weight in self.strengths.items())
        called = "" if self.name is None else f":runtime:{self.name}"
        return f"{self.source}:{self.weight!r}{called}" + (f"@{parts}" if parts else "")

    def strength_of(self, part: str) -> float:
        """Returns the weight of a part: its own, or that of the smallest listed part that contains it."""
        while part and part not in self.strengths:
            part = containing_part(part)
        return float(self.strengths[part] if part else self.weight)

    @property
    def effective(self) -> str:
        """The canonical form of the strengths: equal for all ways of writing the same strengths."""
        unet, text = self.strength_of("unet"), self.strength_of("text")
        weights = [repr(unet)] if unet == text else [f"unet={unet!r}", f"text={text!r}"]
        for part in sorted(self.strengths.keys() - {"unet", "text"}):
            if self.strength_of(part) != self.strength_of(containing_part(part)):
                weights.append(f"{part}={self.strength_of(part)!r}")
        return ",".join(weights)


def own_name(source: str) -> str:
    """Returns the name of a LoRA's file without its ending, or of its folder or repository."""
    words = [word for word in re.split(r"[/\\:]", source) if word]
    *folders, last = words or [source]
    stem = last.removesuffix(next((end for end in LORA_SUFFIXES if last.endswith(end)), ""))
    stem = folders[-1] if folders and stem in USUAL_STEMS else stem
    return re.sub(r"[:@=,]", "-", stem)


def ends_path(text: str) -> bool:
    """Returns whether the text after a colon or an @ belongs to a path, as in `C:\\loras\\x.safetensors`."""
    return "/" in text or "\\" in text or text.endswith(LORA_SUFFIXES)


def number(text: str, argument: str) -> float:
    """Returns the weight in `text`, a piece of `argument`. Raises UsageError if it is not a number."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"LoRA weight {text!r} in {argument!r} is not a number", LORA_FORM) from None


def containing_part(part: str) -> str:
    """Returns the next larger part: down_blocks.1 → down_blocks → unet, text_encoder_2 → text.

    Above `unet` and `text` it is the complete base, which is "".
    """
    if part in ("unet", "text"):
        return ""
    if part.startswith("text"):
        return "text"
    return part.rpartition(".")[0] or "unet"


@dataclass(frozen=True)
class EmbeddingSpec:
    """A textual inversion and the word that stands for it in prompts, which is the file's own if it is None.

    `source` is a path, or `OWNER/NAME[:FILE]` on the hub. Raises UsageError for a word without letters.
    """

    source: str
    token: str | None = None

    def __post_init__(self) -> None:
        if not self.source or (self.token is not None and not self.token.strip()):
            raise UsageError(
                f"the textual inversion {str(self)!r} lacks its file or its word", EMBEDDING_FORM
            )

    @classmethod
    def parse(cls, text: str) -> EmbeddingSpec:
        """Returns the textual inversion of `SOURCE` or `SOURCE:WORD`. No file is checked."""
        if file := EMBEDDING_FILE.fullmatch(text):
            return cls(*file.groups())
        source, colon, last = text.rpartition(":")
        return cls(source, last) if colon and not ends_path(last) else cls(text)

    def __str__(self) -> str:
        return self.source if self.token is None else f"{self.source}:{self.token}"


@dataclass(frozen=True)
class AddedModelSpec:
    """A model that is added to a base and reads a picture, and the weight that it has if none is asked for.

    `source` is a path, or `OWNER/NAME[:FILE]` on the hub. Raises UsageError for a weight that is not finite.
    """

    kind: ClassVar[str]
    form: ClassVar[str] = "write PATH, or PATH:0.8"
    source: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.source:
            article = "an" if self.kind[0] in "AEIO" else "a"
            raise UsageError(f"{article} {self.kind} has no path", self.form)
        if not math.isfinite(self.weight):
            raise UsageError(
                f"the weight {self.weight} of {self.kind} {self.source} is not finite", self.form
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns what `SOURCE` or `SOURCE:WEIGHT` names. No file is checked."""
        source, colon, last = text.rpartition(":")
        if not colon or ends_path(last):
            return cls(text)
        try:
            return cls(source, float(last))
        except ValueError:
            raise UsageError(f"{cls.kind} weight {last!r} in {text!r} is not a number", cls.form) from None

    def __str__(self) -> str:
        return f"{self.source}:{self.weight!r}"


@dataclass(frozen=True)
class ControlNetSpec(AddedModelSpec):
    """A ControlNet, which reads its picture at every step."""

    kind: ClassVar[str] = "ControlNet"


@dataclass(frozen=True)
class T2IAdapterSpec(AddedModelSpec):
    """A T2I-Adapter, which reads its picture once."""

    kind: ClassVar[str] = "T2I-Adapter"


@dataclass(frozen=True)
class IpAdapterSpec(AddedModelSpec):
    """An IP-Adapter, which reads a picture beside the prompt. Its source may be a folder with one file."""

    kind: ClassVar[str] = "IP-Adapter"
    form: ClassVar[str] = "write FILE, FILE:0.6, or OWNER/NAME:FILE:0.6"


@dataclass(frozen=True)
class BuildSpec:
    """One build, as the user asks for it. Each field is the command-line option of its name.

    `beside` are the other targets of the same command, with which engines that can run on several are shared.
    A `height` or `width` of None means the checkpoint's own. `weights` is `random` or `random:SEED`, or None
    for the checkpoint's own. `few_step` is `METHOD` or `METHOD:VARIANT`; None is LCM, or nothing with
    `no_lcm`. `without` are names of REWRITES to leave out. `lora_skip` are patterns, as those of file names,
    of LoRAs' keys to leave out. `prompt_tokens` is the room for a prompt: chunks of 77 tokens. `clip_skip` is
    the number of the text encoders' last layers that are skipped, as diffusers counts them. `lora_slots` is
    how many LoRAs each picture may bring, of up to `lora_rank`. With `image` the bundle has a stage that
    encodes pictures, to draw from them. `controlnets` are those that a picture guides at every step, and
    `t2i_adapters` those that read a picture once. `ip_adapter` reads a picture beside the prompt, through the
    image encoder in the folder, file or hub id `ip_encoder`; None is the one beside the adapter's file.
    Raises UsageError for values that can't be right with any base or on any machine.
    """

    base: str
    gpu: str = "cpu"
    beside: tuple[str, ...] = ()
    lcm_lora: LoraSpec | None = None
    no_lcm: bool = False
    few_step: str | None = None
    few_step_lora: LoraSpec | None = None
    loras: tuple[LoraSpec, ...] = ()
    embeddings: tuple[EmbeddingSpec, ...] = ()
    height: int | None = None
    width: int | None = None
    batch: int = 1
    precision: str = "auto"
    backend: str = "auto"
    weights: str | None = None
    config: str | None = None
    vae: str | None = None
    without: tuple[str, ...] = ()
    whole_loop: bool = False
    lora_skip: tuple[str, ...] = ()
    prompt_tokens: int = CHUNK_TOKENS
    clip_skip: int | None = None
    lora_slots: int = 0
    lora_rank: int = 64
    image: bool = False
    controlnets: tuple[ControlNetSpec, ...] = ()
    t2i_adapters: tuple[T2IAdapterSpec, ...] = ()
    ip_adapter: IpAdapterSpec | None = None
    ip_encoder: str | None = None

    def __post_init__(self) -> None:
        if self.ip_encoder and not self.ip_adapter:
            raise UsageError(
                "--ip-encoder is given without the IP-Adapter that it is for", "add --ip-adapter"
            )
        if self.ip_adapter and self.whole_loop:
            raise UsageError(
                "--whole-loop builds one graph, which can't hold an IP-Adapter", "drop --whole-loop"
            )
        if self.guides and self.whole_loop:
            raise UsageError(
                f"--whole-loop builds one graph, which can't hold a {self.guides[0].kind}",
                "drop --whole-loop",
            )
        for guides, most in ((self.controlnets, len(CONTROLS)), (self.t2i_adapters, len(T2I_ADAPTERS))):
            if len(guides) > most:
                raise UsageError(
                    f"{len(guides)} {guides[0].kind}s are given, and a bundle has {most} at most"
                )
        for name in self.without:
            if name not in REWRITES:
                raise unknown_name("rewrite", name, REWRITES)
            if self.whole_loop and name in WHOLE_LOOP_NEEDS:
                raise UsageError(f"--whole-loop needs the rewrite {name}", f"drop --without {name}")
        if self.whole_loop and self.image:
            raise UsageError("--image and --whole-loop exclude each other", "drop one of the two")
        if self.no_lcm and self.few_step_weights:
            named = "--lcm-lora" if self.lcm_lora else "--few-step-lora"
            raise UsageError(f"{named} and --no-lcm exclude each other", "drop one of the two")
        if self.few_step_lora and self.few_step is None:
            raise UsageError(
                f"--few-step-lora {self.few_step_lora.source} is given without its method",
                f"add --few-step METHOD; lcm-compile inspect {self.few_step_lora.source} may tell it",
            )
        if self.lcm_lora and (self.few_step_lora or self.few_step not in (None, "lcm")):
            raise UsageError(
                "--lcm-lora is an LCM-LoRA, and --few-step and --few-step-lora name another",
                "give the file to --few-step-lora, and its method to --few-step",
            )
        if self.weights and self.config:
            raise UsageError("--weights and --config exclude each other", "drop one of the two")
        if self.precision != "auto" and self.precision not in ASKED_PRECISIONS:
            raise unknown_name("precision", self.precision, ("auto", *ASKED_PRECISIONS))
        if self.prompt_tokens not in range(CHUNK_TOKENS, CHUNK_TOKENS * MOST_CHUNKS + 1, CHUNK_TOKENS):
            raise UsageError(
                f"prompt tokens must be a multiple of {CHUNK_TOKENS} up to {CHUNK_TOKENS * MOST_CHUNKS}, "
                f"not {self.prompt_tokens}",
                f"--prompt-tokens {2 * CHUNK_TOKENS} or {3 * CHUNK_TOKENS}",
            )
        if self.clip_skip is not None and self.clip_skip < 0:
            raise UsageError(f"clip skip must be 0 or more, not {self.clip_skip}")
        if not 0 <= self.lora_slots <= MOST_SLOTS:
            raise UsageError(f"LoRA slots must be from 0 to {MOST_SLOTS}, not {self.lora_slots}")
        if self.lora_rank < 1:
            raise UsageError(f"the rank of LoRA slots must be 1 or more, not {self.lora_rank}")
        names = [lora.name for lora in self.runtime_loras]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(
                f"two LoRAs are called {twice} at run time", "name one of them: --lora FILE:runtime:NAME"
            )
        if self.whole_loop and (self.lora_slots or names):
            raise UsageError(
                "--whole-loop makes one graph, whose LoRAs are all fused",
                "drop --whole-loop, or fuse the LoRA: drop its :runtime, and --lora-slots",
            )
        self.random_seed  # noqa: B018 - checks `weights`
        # The sides are checked before anything is loaded. A side that is not given is replaced with 8, which
        # is valid.
        Shape(self.batch, 8 if self.height is None else self.height, 8 if self.width is None else self.width)

    @property
    def guides(self) -> tuple[AddedModelSpec, ...]:
        """The ControlNets and then the T2I-Adapters: what reads pictures that guide, in their order."""
        return (*self.controlnets, *self.t2i_adapters)

    @property
    def few_step_weights(self) -> LoraSpec | None:
        """The few-step LoRA that is named, or None for the one that the method's table has."""
        return self.few_step_lora or self.lcm_lora

    @property
    def runtime_loras(self) -> tuple[LoraSpec, ...]:
        """The LoRAs whose weights are inputs of the graphs: the few-step one, then the styles in order."""
        asked = (self.few_step_weights, *self.loras)
        return tuple(lora for lora in asked if lora is not None and lora.name is not None)

    @property
    def rewrites(self) -> tuple[str, ...]:
        """The names of the rewrites that are applied."""
        return tuple(name for name in REWRITES if name not in self.without)

    @property
    def graph_inputs(self) -> dict[str, str]:
        """The fields that change the graphs, as inputs of the key.

        Not here are the base, the LoRAs, the shape and the precision: the key holds what the build makes of
        them, for example the content of a LoRA's file.
        """
        inputs = {"rewrites": ", ".join(name for name in self.rewrites if name not in ENGINE_REWRITES)}
        if self.lora_skip:
            inputs["LoRA keys left out"] = ", ".join(sorted({*self.lora_skip}))
        if self.prompt_tokens != CHUNK_TOKENS:
            inputs["prompt tokens"] = str(self.prompt_tokens)
        if self.clip_skip:
            inputs["clip skip"] = str(self.clip_skip)
        if self.lora_slots:
            inputs["LoRA slots"] = f"{self.lora_slots} of rank {self.lora_rank}"
        if self.image:
            inputs["pictures"] = "encoded"
        for guides in (self.controlnets, self.t2i_adapters):
            for i, guide in enumerate(guides, 1):
                inputs[f"{guide.kind} {i} weight"] = repr(float(guide.weight))
        if self.ip_adapter:
            inputs["IP-Adapter weight"] = repr(float(self.ip_adapter.weight))
        return inputs | {"whole loop": "one graph"} if self.whole_loop else inputs

    @property
    def random_seed(self) -> int | None:
        """The seed of `random` (0) or `random:SEED` weights, or None for the checkpoint's own weights."""
        if self.weights is None:
            return None
        kind, colon, seed = self.weights.partition(":")
        if kind != "random" or (colon and not seed.isdecimal()):
            raise UsageError(
                f"--weights is {self.weights!r}", "give --weights random, or random:7 to use seed 7"
            )
        return int(seed or 0)

    def command(self) -> str:
        """Returns the command line that asks for this build. Each field is the option of its name."""
        words = ["lcm-compile", "build", "--base", self.base]
        for gpu in (self.gpu, *self.beside):
            words += ["--gpu", gpu]
        for spec in fields(self)[3:]:
            value, option = getattr(self, spec.name), f"--{spec.name.replace('_', '-')}"
            if value == spec.default:
                continue
            if value is True:
                words.append(option)
            elif isinstance(value, tuple):
                for one in value:
                    words += [option.removesuffix("s"), str(one)]
            else:
                words += [option, str(value)]
        return shlex.join(words)


@dataclass(frozen=True)
class LoraProvenance:
    """What a bundle records of a LoRA: its source, weights, layout, modules and ranks.

    `layout` names the file's key layout, and `modules` counts the modules that the LoRA changes. `skipped`
    counts the keys that were left out, by the pattern of `--lora-skip` that they match. A LoRA with a `name`
    is not fused, and its weight is the default of an input.
    """

    source: str
    weight: float
    strengths: Mapping[str, float]
    layout: str
    modules: int
    ranks: tuple[int, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, for the manifest."""
        return asdict(self)
