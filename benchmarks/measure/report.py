"""A benchmark's report: its raw samples, with the machine and the versions they were taken with."""

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
    """Where samples were taken. `device` is the name of what ran the engines: the GPU or the processor.

    `cores` is how many this process could run on, and `threads` how many each program drew with.
    """

    device: str
    processor: str
    cores: int
    versions: Mapping[str, str]
    taken: str  # ISO 8601, UTC
    gpu_driver: str | None = None
    threads: int | None = None
    peak_flops: Mapping[str, float] = field(default_factory=dict)  # FLOP per second, by precision
    bandwidth: float | None = None  # bytes per second


@dataclass(frozen=True)
class RivalSamples:
    """A rival's samples for one case. Its sample i was taken right before or after the case's sample i.

    `batch` is how many pictures one sample draws, None if that is as many as the case's samples draw.
    """

    samples_ms: tuple[float, ...]
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    parity_db: float | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Case:
    """One thing that was timed: the picture, a stage, or a phase of a cold start. None means not measured.

    A sample of a stage covers all of its calls for one picture, or for one batch of pictures. `flop` and
    `weight_bytes` are what the original model, without rewrites, computes and reads for that; `limit_ms` is
    the least time that this device could take for it.

    `groups` holds how many consecutive samples each process took, if several processes took them.
    `environment` is where the samples were taken, if that differs from the report's environment. `passes` is
    how often the stage ran for a sample. Raises ValueError if there are no samples, if one is not above zero,
    or if rivals or groups do not match them.
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
    passes: int = 1

    def __post_init__(self) -> None:
        sides = {"": self.samples_ms, **{f" of {name}": r.samples_ms for name, r in self.rivals.items()}}
        for side, samples in sides.items():
            if not samples or min(samples) <= 0:
                raise ValueError(f"case {self.name!r}: there are no samples{side}, or not all are above zero")
            if len(samples) != len(self.samples_ms):
                raise ValueError(f"case {self.name!r}: the samples{side} do not pair with the case's")
        if self.groups and (min(self.groups) < 1 or sum(self.groups) != len(self.samples_ms)):
            raise ValueError(f"case {self.name!r}: its groups do not add up to its samples")


@dataclass(frozen=True)
class Benchmark:
    """The settings of a run of `bench`, with which `compare` takes the same samples again, here or elsewhere.

    The fields from `backend` on say what was measured; `bundle` is the bundle's digest.
    """

    spec: BuildSpec
    against: tuple[str, ...]
    runs: int
    seconds: float
    backend: str = ""
    precisions: Mapping[str, Precision] = field(default_factory=dict)
    shape: Shape | None = None
    bundle: str = ""


@dataclass(frozen=True)
class Loosening:
    """When and why a baseline was replaced by a new report, even by a worse one."""

    when: str  # ISO 8601, UTC
    why: str


@dataclass(frozen=True)
class BenchmarkReport:
    """A complete benchmark, as it is saved. The first case of `bench`'s own reports is the picture.

    Raises ValueError if two cases share a name.
    """

    environment: Environment
    benchmark: Benchmark
    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()  # warnings for the reader of the figures
    loosened: tuple[Loosening, ...] = ()

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if len(set(names)) != len(names):
            raise ValueError("two cases have one name")

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as the JSON file holds it."""
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: Path) -> None:
        """Writes the report to `path` as JSON, atomically."""
        write_atomically(path, json_text(self.to_dict(), indent=1))


def read_report(path: Path) -> BenchmarkReport:
    """Reads a saved report. Raises UsageError, which names the file and the field, if it is not valid."""
    hint = "lcm-compile bench --save FILE writes one"
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise UsageError(f"{path} is not a benchmark report of schema {SCHEMA}", hint)
        return from_json(BenchmarkReport, {k: v for k, v in data.items() if k != "schema"})
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a benchmark report: {error}", hint) from error
