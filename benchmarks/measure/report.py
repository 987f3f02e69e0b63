"""A benchmark's saved file: raw samples with the machine and the versions that they were taken with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lcm_compile.errors import UsageError
from lcm_compile.precisions import Precision
from lcm_compile.spec import BuildSpec, Shape
from lcm_compile.system.dataclass_json import from_json, json_text
from lcm_compile.system.files import write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class Environment:
    """Where samples were taken. `device` is what ran the engines: the GPU's name, or the processor's."""

    device: str
    processor: str
    cores: int
    versions: Mapping[str, str]
    taken: str  # ISO 8601, UTC
    gpu_driver: str | None = None
    threads: int | None = None
    peak_flops: Mapping[str, float] = field(default_factory=dict)  # a second, by precision
    bandwidth: float | None = None  # bytes a second


@dataclass(frozen=True)
class RivalSamples:
    """What was timed in turn with a case: sample i right before or after the case's sample i.

    `batch` is how many pictures a sample of it draws, where that is not as many as the case's.
    """

    samples_ms: tuple[float, ...]
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    parity_db: float | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Case:
    """One thing that was timed. None stands for what was not measured.

    `groups` tells how many consecutive samples each process took, where several did. `environment` is where
    they were taken, if not where the report's were. ValueError for samples that can't be.

    A sample of a stage is all of its calls for one picture, or batch of them. `flop` and `weight_bytes` are
    the plain model's for as much; `limit_ms` is the least that this device could take for that.
    """

    name: str
    samples_ms: tuple[float, ...]
    rivals: Mapping[str, RivalSamples] = field(default_factory=dict)
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    engine_bytes: int | None = None
    parity_db: float | None = None
    flop: float | None = None
    weight_bytes: int | None = None
    limit_ms: float | None = None
    groups: tuple[int, ...] = ()
    environment: Environment | None = None

    def __post_init__(self) -> None:
        sides = {"": self.samples_ms, **{f" of {name}": r.samples_ms for name, r in self.rivals.items()}}
        for side, samples in sides.items():
            if not samples or min(samples) <= 0:
                raise ValueError(f"case {self.name!r}: the samples{side} are none, or not all above zero")
            if len(samples) != len(self.samples_ms):
                raise ValueError(f"case {self.name!r}: the samples{side} do not pair with the case's")
        if self.groups and (min(self.groups) < 1 or sum(self.groups) != len(self.samples_ms)):
            raise ValueError(f"case {self.name!r}: its groups do not add up to its samples")


@dataclass(frozen=True)
class Benchmark:
    """What `bench` was asked for, so that `compare` can take the same samples on another machine."""

    spec: BuildSpec
    against: tuple[str, ...]
    runs: int
    seconds: float
    backend: str = ""
    precisions: Mapping[str, Precision] = field(default_factory=dict)
    shape: Shape | None = None
    bundle: str = ""  # its digest


@dataclass(frozen=True)
class Loosening:
    """When and why a baseline was replaced by whatever was measured."""

    when: str  # ISO 8601, UTC
    why: str


@dataclass(frozen=True)
class BenchmarkReport:
    environment: Environment
    benchmark: Benchmark
    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()  # what a reader of the figures must know
    loosened: tuple[Loosening, ...] = ()

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if len(set(names)) != len(names):
            raise ValueError("two cases have one name")

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: Path) -> None:
        write_atomically(path, json_text(self.to_dict(), indent=1))


def read_report(path: Path) -> BenchmarkReport:
    """UsageError, naming the place, for what is no report of this schema."""
    again = "lcm-compile bench --save FILE writes one"
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise UsageError(f"{path} is no benchmark report of schema {SCHEMA}", again)
        return from_json(BenchmarkReport, {k: v for k, v in data.items() if k != "schema"})
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no benchmark report: {error}", again) from error
