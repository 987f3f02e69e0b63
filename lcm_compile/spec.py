"""What is asked for, and the types of what passes between stages. No torch, no files, no hardware."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from lcm_compile.errors import UsageError, unknown_name

PRECISIONS = ("fp32", "fp16", "bf16")


def user_path(text: str) -> Path:
    """A path as typed: `~` is the home folder, and a `~name` of nobody stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


@dataclass(frozen=True)
class Shape:
    """The pictures that one call of the engines draws; height and width in pixels."""

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


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA file (or hub id) and the weight λ it is fused with."""

    source: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError("a LoRA has no path", "write PATH or PATH:0.8")
        if not math.isfinite(self.weight):
            raise UsageError(
                f"the weight {self.weight} of LoRA {self.source} is not finite", "write PATH:0.8"
            )

    @classmethod
    def parse(cls, text: str) -> LoraSpec:
        """`PATH` or `PATH:WEIGHT`; UsageError where WEIGHT is no number."""
        source, colon, last = text.rpartition(":")
        # The colon of `C:\loras\x.safetensors`, or of a name, is no weight's.
        if not colon or "/" in last or "\\" in last or last.endswith((".safetensors", ".bin", ".pt", ".pth")):
            return cls(text)
        try:
            weight = float(last)
        except ValueError:
            raise UsageError(f"LoRA weight {last!r} in {text!r} is not a number", "write PATH:0.8") from None
        return cls(source, weight)

    def __str__(self) -> str:
        return f"{self.source}:{self.weight!r}"


@dataclass(frozen=True)
class BuildSpec:
    """One build, as asked for. None stands for the checkpoint's own default."""

    base: str
    gpu: str = "cpu"
    lcm_lora: LoraSpec | None = None
    no_lcm: bool = False
    loras: tuple[LoraSpec, ...] = ()
    height: int | None = None
    width: int | None = None
    batch: int = 1
    precision: str = "auto"
    backend: str = "auto"
    weights: str | None = None
    config: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        if self.no_lcm and self.lcm_lora:
            raise UsageError("--lcm-lora and --no-lcm exclude each other", "drop one of the two")
        if self.weights and self.config:
            raise UsageError("--weights and --config exclude each other", "drop one of the two")
        if self.precision != "auto" and self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, ("auto", *PRECISIONS))
        self.random_seed  # noqa: B018 - checks `weights`
        # The sides are checked before anything is loaded; 8 stands for a side that is not given.
        Shape(self.batch, 8 if self.height is None else self.height, 8 if self.width is None else self.width)

    @property
    def random_seed(self) -> int | None:
        """The seed of `random` (0) or `random:SEED` weights; None: the checkpoint's own."""
        if self.weights is None:
            return None
        kind, colon, seed = self.weights.partition(":")
        if kind != "random" or (colon and not seed.isdecimal()):
            raise UsageError(
                f"--weights is {self.weights!r}", "--weights random, or random:7 for those of seed 7"
            )
        return int(seed or 0)

    def command(self) -> str:
        """The command line that asks for this build."""
        words = ["lcm-compile", "build", "--base", self.base, "--gpu", self.gpu]
        if self.weights:
            words += ["--weights", self.weights]
        if self.config:
            words += ["--config", self.config]
        if self.vae:
            words += ["--vae", self.vae]
        if self.lcm_lora:
            words += ["--lcm-lora", str(self.lcm_lora)]
        if self.no_lcm:
            words.append("--no-lcm")
        for lora in self.loras:
            words += ["--lora", str(lora)]
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                words += [f"--{name}", str(getattr(self, name))]
        if self.batch != 1:
            words += ["--batch", str(self.batch)]
        for name in ("precision", "backend"):
            if getattr(self, name) != "auto":
                words += [f"--{name}", getattr(self, name)]
        return shlex.join(words)


@dataclass(frozen=True)
class TensorSpec:
    """One array at a stage's edge. `dtype` is NumPy's name: float32 everywhere but for tokens."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str


@dataclass(frozen=True)
class StageContract:
    """A static graph's inputs and outputs, in order. The pipeline reads nothing else about a stage."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ExportedGraph:
    """A stage as a file that a backend builds from; weights over 2 GB lie beside it."""

    path: Path
    precision: str
    contract: StageContract

    @property
    def weights(self) -> Path:
        """Where an ONNX graph keeps weights that are too large for its own file."""
        return self.path.with_name(f"{self.path.name}.data")
