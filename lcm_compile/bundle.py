"""A bundle: one self-contained folder of engines, tokenizers, settings and proof, told by manifest.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lcm_compile.errors import BundleError, UsageError
from lcm_compile.scheduler import SchedulerSettings
from lcm_compile.spec import BuildSpec, Shape, StageContract
from lcm_compile.store import Digests, home, lock
from lcm_compile.targets import GpuTarget

MANIFEST = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True)
class StageEngine:
    """A stage's contract, its engine file and how it was computed.

    `largest_activation` is the peak seen in fp32 over a real picture; `fp32_layers` are those that fp16
    would have overflowed.
    """

    contract: StageContract
    engine: str
    precision: str
    fp32_layers: tuple[str, ...] = ()
    largest_activation: float | None = None


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
class BundleManifest:
    spec: BuildSpec
    target: GpuTarget
    backend: str
    key: Mapping[str, str]
    architecture: str
    pipeline: PipelineSettings
    stages: tuple[StageEngine, ...]
    loras: tuple[Mapping[str, Any], ...]
    parity: Mapping[str, Mapping[str, Any]]
    proof: Mapping[str, Any]
    toolchain: Mapping[str, str]
    seconds: Mapping[str, float]
    created: str
    files: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BundleManifest:
        """KeyError, TypeError, ValueError or UsageError for what is no manifest of this schema."""
        values = {k: v for k, v in data.items() if k != "schema"}
        pipeline = values["pipeline"]
        values["spec"] = BuildSpec.from_dict(values["spec"])
        values["target"] = GpuTarget(
            **{**values["target"], "precisions": tuple(values["target"]["precisions"])}
        )
        values["pipeline"] = PipelineSettings(
            shape=Shape(**pipeline["shape"]),
            scheduler=SchedulerSettings.from_dict(pipeline["scheduler"]),
            tokenizers=tuple(TokenizerSettings(**t) for t in pipeline["tokenizers"]),
            zero_negative_prompt=pipeline["zero_negative_prompt"],
            sample_prompt=pipeline["sample_prompt"],
        )
        values["stages"] = tuple(
            StageEngine(
                StageContract.from_dict(stage["contract"]),
                stage["engine"],
                stage["precision"],
                tuple(stage["fp32_layers"]),
                stage["largest_activation"],
            )
            for stage in values["stages"]
        )
        values["loras"] = tuple(values["loras"])
        manifest = cls(**values)
        if not all(isinstance(x, str) for pair in manifest.files.items() for x in pair):
            raise TypeError("files maps paths to digests")
        return manifest


@dataclass(frozen=True)
class EngineBundle:
    """A bundle on disk whose manifest was read and whose files were checked."""

    folder: Path
    manifest: BundleManifest
    digest: str

    def path(self, name: str) -> Path:
        return self.folder / name


def key_digest(key: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(key.items()))).encode()).hexdigest()


def read_manifest(folder: Path) -> tuple[BundleManifest, str]:
    """The manifest and its sha256. BundleError where there is none, or it is broken, newer or hostile."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"there is no bundle at {folder}", "lcm-compile build --base demo --gpu cpu")
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}", "lcm-compile build --out DIR")
    rebuild = "build the bundle again with --force"
    try:
        raw = path.read_bytes()
        data = json.loads(raw)
        schema = data["schema"]
        if schema != SCHEMA:
            raise BundleError(f"{path} has schema {schema!r}; this lcm-compile reads {SCHEMA}", rebuild)
        manifest = BundleManifest.from_dict(data)
    except (ValueError, KeyError, TypeError, AttributeError, UsageError, RecursionError) as error:
        raise BundleError(f"{path} is broken: {type(error).__name__}: {error}", rebuild) from error
    for name in [*manifest.files, *named_files(manifest)]:
        check_inside(folder, name)
    unlisted = [name for name in named_files(manifest) if name not in manifest.files]
    if unlisted:
        raise BundleError(f"{path} names {unlisted[0]} but holds no digest for it", rebuild)
    return manifest, hashlib.sha256(raw).hexdigest()


def named_files(manifest: BundleManifest) -> list[str]:
    proof = manifest.proof.get("files", [])
    if not isinstance(proof, list):
        raise BundleError("the manifest's list of proof files is no list")
    return [
        *(stage.engine for stage in manifest.stages),
        *(tokenizer.file for tokenizer in manifest.pipeline.tokenizers),
        *proof,
    ]


def check_inside(folder: Path, name: Any) -> None:
    """BundleError for a path that would leave the bundle, by name or by a link."""
    plain = PurePosixPath(str(name))
    outside = plain.is_absolute() or ".." in plain.parts or "\\" in str(name) or not str(name)
    if outside or not (folder / plain).resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{folder / MANIFEST} names {name!r}, which is outside the bundle")


def open_bundle(folder: Path) -> EngineBundle:
    """Reads the manifest and checks every file's digest (remembered by stat, so a second time is quick)."""
    manifest, digest = read_manifest(folder)
    digests = Digests()
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(
                f"{path} is missing from the bundle", "copy the whole folder, or build it again"
            )
        if digests.sha256(path) != expected:
            raise BundleError(
                f"{path} is damaged: its sha256 is not the manifest's",
                "copy the bundle again, or build it again with --force",
            )
    digests.save()
    return EngineBundle(folder, manifest, digest)


def list_files(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but the manifest, by its path with forward slashes."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = digest
    return files


def check_destination(folder: Path) -> None:
    """UsageError unless a bundle can be put there: nothing, an empty folder, or an older bundle."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file", "give a new folder to --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UsageError(
            f"--out {folder} is a folder with other things in it, which a bundle would replace",
            "give a new folder to --out",
        )
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"--out {folder} can't be written", "give a folder that you may write to --out")


@contextlib.contextmanager
def publishing(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder to build in, which becomes `folder` when the block ends without an error.

    One process at a time; what a killed one left behind is removed. At every moment `folder` is the old
    bundle, none, or the whole new one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{folder.name}.part"
    old = folder.parent / f".{folder.name}.old"
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    with lock(home() / "locks" / name, waiting):
        if old.exists() and not folder.exists():  # killed between the two renames below
            old.rename(folder)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            if (part / MANIFEST).is_file():
                sync(part)
                if folder.exists():
                    folder.rename(old)
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def sync(folder: Path) -> None:
    """Puts every file on the disk before the folder gets its name, so that a power cut leaves no half."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
