"""Manifests of bundles and exports: what one holds, how it was made, and what was proved of it."""

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
from lcm_compile.spec import BuildSpec, Shape
from lcm_compile.system.cache import Digests
from lcm_compile.system.dataclass_json import from_json, json_text
from lcm_compile.system.stopwatch import Cost
from lcm_compile.targets import GpuTarget

MANIFEST = "manifest.json"
SCHEMA = 2


@dataclass(frozen=True)
class StageFile:
    """A stage's contract, its file (an engine, or in an export a graph) and how it computes.

    `largest_activation` is the peak seen in fp32 over a real picture; `fp32_layers` are those that fp16
    would have overflowed, `quantized_layers` those whose products are in 8 bits: such a stage is lossy.
    """

    contract: StageContract
    file: str
    precision: Precision
    fp32_layers: tuple[str, ...] = ()
    largest_activation: float | None = None
    quantized_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerSettings:
    """Which stage input a tokenizer feeds, and how it pads."""

    input: str
    file: str
    max_length: int
    pad_token_id: int


@dataclass(frozen=True)
class PipelineSettings:
    """All that the LCM loop needs to know besides the stages' contracts."""

    shape: Shape
    scheduler: SchedulerSettings
    tokenizers: tuple[TokenizerSettings, ...]
    zero_negative_prompt: bool
    sample_prompt: str


@dataclass(frozen=True)
class Parity:
    """One figure. `checked` says what was compared: the engine, or the graph where no engine runs here."""

    db: float
    floor: float
    checked: str

    @property
    def passed(self) -> bool:
        return self.db >= self.floor

    def to_dict(self) -> dict[str, Any]:
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
    """What bundles and exports both tell. `lossy`: the stages that draw with loss by choice, each with why.

    A kind of them has a name, the name of the manifest's file, and a way to get a whole one again.
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

    def named_files(self) -> list[str]:
        """What something else of the manifest than `files` names."""
        return [
            *(stage.file for stage in self.stages),
            *(tokenizer.file for tokenizer in self.pipeline.tokenizers),
            *self.proof.files,
        ]

    def write(self, folder: Path) -> None:
        text = json_text({"schema": SCHEMA, **asdict(self)}, indent=1)
        (folder / self.FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, str]:
        """The manifest in a folder, and its sha256. BundleError where it is broken, newer or hostile."""
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
        """BundleError for a file that is missing or whose sha256 is another (remembered by stat)."""
        digests = Digests()
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                again = f"copy the whole folder, or {self.AGAIN}"
                raise BundleError(f"{path} is missing from the {self.KIND}", again)
            if digests.sha256(path) != expected:
                again = f"copy the {self.KIND} again, or {self.AGAIN}"
                raise BundleError(f"{path} is damaged: its sha256 is not the manifest's", again)
        digests.save()


@dataclass(frozen=True, kw_only=True)
class BundleManifest(Manifest):
    """manifest.json: the engines of one target."""

    KIND, FILE, AGAIN = "bundle", MANIFEST, REBUILD

    target: GpuTarget
    backend: str
    created: str


def read_manifest(folder: Path) -> tuple[BundleManifest, str]:
    """A bundle's manifest and its sha256. BundleError where there is none, or it is not as it should be."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"there is no bundle at {folder}", "lcm-compile build --base demo --gpu cpu")
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}", "lcm-compile build --out DIR")
    manifest, digest = BundleManifest.read(folder)
    if manifest.backend not in BACKENDS:
        raise BundleError(f"{path} names the backend {manifest.backend!r}, which is none here", REBUILD)
    return manifest, digest


def check_inside(manifest: Path, name: str) -> None:
    """BundleError for a file of the manifest's that would lie outside its folder, by name or by a link."""
    plain, folder = PurePosixPath(name), manifest.parent
    outside = plain.is_absolute() or ".." in plain.parts or "\\" in name or not name
    try:
        outside = outside or not (folder / plain).resolve().is_relative_to(folder.resolve())
        (folder / plain).is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a ring of links
        outside = True
    if outside:
        raise BundleError(
            f"{manifest} names {name[:100]!r}, which is no place inside {folder}",
            "do not use this folder; get it again from whoever built it",
        )
