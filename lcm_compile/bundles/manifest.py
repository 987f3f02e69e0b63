"""Manifests of bundles and exports: what one holds, how it was made, and how closely it matches torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

from lcm_compile.engines import BACKENDS
from lcm_compile.errors import REBUILD, BundleError, UsageError
from lcm_compile.graphs import StageContract
from lcm_compile.precisions import Precision
from lcm_compile.scheduler import SchedulerSettings
from lcm_compile.spec import BuildSpec, LoraSpec, Shape
from lcm_compile.system.cache import Digests
from lcm_compile.system.dataclass_json import from_json, json_text
from lcm_compile.system.stopwatch import Cost
from lcm_compile.targets import GpuTarget

MANIFEST = "manifest.json"
SCHEMA = 2  # the version of the manifest's fields


@dataclass(frozen=True)
class StageFile:
    """A stage's contract, its file (an engine, or in an export a graph) and how it computes.

    `largest_activation` is the largest absolute activation while a picture was drawn in fp32. `fp32_layers`
    stay in fp32 because they would overflow fp16. `quantized_layers` multiply in 8 bits; a stage with any is
    lossy. `torch_db` is the signal-to-noise ratio that torch itself reaches in half precision, if it was
    measured. `made_of` is the digest of all that an engine depends on: two with the same are equal.
    """

    contract: StageContract
    file: str
    precision: Precision
    fp32_layers: tuple[str, ...] = ()
    largest_activation: float | None = None
    quantized_layers: tuple[str, ...] = ()
    torch_db: float | None = None
    made_of: str | None = None


@dataclass(frozen=True)
class TokenizerSettings:
    """One tokenizer: its file, the input of the `encode` stage that it fills, and how prompts are padded.

    A prompt has `chunks` chunks of `max_length` tokens each. `width` is that of the text states which the
    encoder gives for them, or 0 in a bundle that does not tell.
    """

    input: str
    file: str
    max_length: int
    pad_token_id: int
    chunks: int = 1
    width: int = 0

    @property
    def length(self) -> int:
        """The number of tokens of a padded prompt."""
        return self.chunks * self.max_length


@dataclass(frozen=True)
class FewStepWeights:
    """A base's few-step weights: `METHOD:VARIANT`, the numbers of steps they are made for, their licence."""

    name: str
    made_for: tuple[int, ...]
    licence: str | None = None


@dataclass(frozen=True)
class LoraSlots:
    """How many LoRAs of up to which rank a picture may bring."""

    count: int
    rank: int


@dataclass(frozen=True)
class PipelineSettings:
    """Everything that the loop needs besides the stages' contracts.

    With `zero_negative_prompt`, a request without a negative prompt is conditioned on zeros in its place. The
    fields after the prompt are what is drawn if nothing else is asked for; `eta` is for this sampler alone.
    `loras` are those whose weights are inputs, each with its name as the source and its default weights, and
    `lora_parts` the parts of the model that can have weights of their own. `control_weights` has the strength
    of each ControlNet and then of each T2I-Adapter, and `ip_weight` the IP-Adapter's weight, or None if there
    is no IP-Adapter.
    """

    shape: Shape
    scheduler: SchedulerSettings
    tokenizers: tuple[TokenizerSettings, ...]
    zero_negative_prompt: bool
    sample_prompt: str
    guidance_scale: float = 1.0
    sampler: str = "lcm"
    steps: int = 4
    eta: float | None = None
    few_step: FewStepWeights | None = None
    loras: tuple[LoraSpec, ...] = ()
    lora_parts: tuple[str, ...] = ()
    lora_slots: LoraSlots | None = None
    control_weights: tuple[float, ...] = ()
    ip_weight: float | None = None

    def drawing(
        self,
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
    ) -> dict[str, Any]:
        """Returns these as the fields of a request, with the defaults in place of None."""
        own = sampler in (None, self.sampler)
        return {
            "sampler": self.sampler if sampler is None else sampler,
            "steps": self.steps if steps is None else steps,
            "guidance_scale": self.guidance_scale if guidance_scale is None else guidance_scale,
            "eta": self.eta if own and eta is None else eta,
        }


@dataclass(frozen=True)
class Parity:
    """How close an output is to torch's, in dB, and the `floor` that it must reach.

    `checked` says what was compared with torch: the engine, or the graph or the module if no engine ran.
    """

    db: float
    floor: float
    checked: str

    @property
    def passed(self) -> bool:
        """Whether the figure reaches its floor."""
        return self.db >= self.floor

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields for JSON, with `db` rounded to 2 decimals."""
        return {**asdict(self), "db": round(self.db, 2)}


@dataclass(frozen=True)
class Proof:
    """The request whose recording `verify` replays, the shape it was recorded for, and its files."""

    prompt: str
    seed: int
    steps: int
    shape: Shape
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The fields that the manifests of bundles and exports share.

    `files` holds the sha256 of each file by its relative path. `lossy` holds the stages that lose quality by
    the user's choice, each with the reason. `embeddings` holds the textual inversions, each with its word in
    prompts and its number of vectors. A subclass defines KIND, its name in messages; FILE, the name of
    the manifest's file; and AGAIN, the hint in errors about a damaged folder.
    """

    KIND: ClassVar[str]
    FILE: ClassVar[str]
    AGAIN: ClassVar[str]

    spec: BuildSpec
    key: Mapping[str, str]
    architecture: str
    pipeline: PipelineSettings
    stages: tuple[StageFile, ...]
    loras: tuple[Mapping[str, Any], ...]
    parity: Mapping[str, Parity]
    proof: Proof
    toolchain: Mapping[str, str]
    costs: Mapping[str, Cost]
    files: Mapping[str, str] = field(default_factory=dict)
    lossy: Mapping[str, str] = field(default_factory=dict)
    embeddings: tuple[Mapping[str, Any], ...] = ()

    def named_files(self) -> list[str]:
        """Returns every path that the manifest names outside `files`."""
        return [
            *(stage.file for stage in self.stages),
            *(tokenizer.file for tokenizer in self.pipeline.tokenizers),
            *self.proof.files,
        ]

    def write(self, folder: Path) -> None:
        """Writes the manifest's file in a folder."""
        text = json_text({"schema": SCHEMA, **asdict(self)}, indent=1)
        (folder / self.FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, str]:
        """Returns the manifest in a folder, and the sha256 of its file.

        Raises BundleError if it is broken, has another schema, or names a file that is outside the folder or
        has no digest.
        """
        path = folder / cls.FILE
        try:
            raw = path.read_bytes()
            data = json.loads(raw)
            schema = data.pop("schema", None) if isinstance(data, dict) else None
            if schema != SCHEMA:
                raise BundleError(f"{path} has schema {schema!r}; this lcm-compile reads {SCHEMA}", cls.AGAIN)
            manifest = from_json(cls, data)
        except (ValueError, UsageError, RecursionError, OSError) as error:
            raise BundleError(f"{path} is broken: {error}", cls.AGAIN) from error
        for name in manifest.files:
            check_inside(path, name)
        unlisted = [name for name in manifest.named_files() if name not in manifest.files]
        if unlisted:
            raise BundleError(f"{path} names {unlisted[0]} but holds no digest for it", cls.AGAIN)
        return manifest, hashlib.sha256(raw).hexdigest()

    def check_files(self, folder: Path) -> None:
        """Raises BundleError if a file is missing, or its sha256 is not the one in the manifest.

        Digests are stored with each file's size and times, so that a second check is quick.
        """
        digests = Digests()
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                again = f"copy the complete folder, or {self.AGAIN}"
                raise BundleError(f"{path} is missing from the {self.KIND}", again)
            if digests.sha256(path) != expected:
                again = f"copy the {self.KIND} again, or {self.AGAIN}"
                raise BundleError(f"{path} is damaged: its sha256 is not the manifest's", again)
        digests.save()


@dataclass(frozen=True, kw_only=True)
class BundleManifest(Manifest):
    """manifest.json: the engines for one target. `created` is the time of the build in ISO 8601."""

    KIND, FILE, AGAIN = "bundle", MANIFEST, REBUILD

    target: GpuTarget
    backend: str
    created: str


def read_manifest(folder: Path) -> tuple[BundleManifest, str]:
    """Returns a bundle's manifest and the sha256 of its file.

    Raises BundleError if there is no bundle, or if `Manifest.read` does, or if the backend is unknown.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"there is no bundle at {folder}", "lcm-compile build --base demo --gpu cpu")
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}", "lcm-compile build --out DIR")
    manifest, digest = BundleManifest.read(folder)
    if manifest.backend not in BACKENDS:
        raise BundleError(f"{path} names the backend {manifest.backend!r}, which is unknown here", REBUILD)
    return manifest, digest


def check_inside(manifest: Path, name: str) -> None:
    """Raises BundleError if a file that a manifest names is outside its folder, by its name or by a link."""
    plain, folder = PurePosixPath(name), manifest.parent
    outside = plain.is_absolute() or ".." in plain.parts or "\\" in name or not name
    try:
        outside = outside or not (folder / plain).resolve().is_relative_to(folder.resolve())
        (folder / plain).is_file()
    except (OSError, ValueError, RuntimeError):  # a name that is too long or has a NUL, or links in a ring
        outside = True
    if outside:
        raise BundleError(
            f"{manifest} names {name[:100]!r}, which is not inside {folder}",
            "do not use this folder; get it again from the person who built it",
        )
