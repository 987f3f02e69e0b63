"""An export: a folder of graphs, tokenizers and proof, from which engines are built here or elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lcm_compile.cost import Cost
from lcm_compile.errors import BundleError, UsageError
from lcm_compile.manifest import Parity, PipelineSettings, Proof, StageFile, check_inside
from lcm_compile.schema import from_json, json_text
from lcm_compile.spec import BuildSpec, ExportedGraph, is_quantized
from lcm_compile.store import Digests

EXPORT = "export.json"
SCHEMA = 2
AGAIN = "lcm-compile export, again"


@dataclass(frozen=True)
class ExportManifest:
    """`parity` holds the graphs' own figures; none where the engines are checked themselves."""

    name: str
    spec: BuildSpec
    key: Mapping[str, str]
    architecture: str
    graph_format: str
    is_large: bool
    pipeline: PipelineSettings
    stages: tuple[StageFile, ...]
    loras: tuple[Mapping[str, Any], ...]
    parity: Mapping[str, Parity]
    proof: Proof
    toolchain: Mapping[str, str]
    costs: Mapping[str, Cost]
    files: Mapping[str, str] = field(default_factory=dict)
    lossy: Mapping[str, str] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """That of the stage which asks the most of a target."""
        return max((stage.precision for stage in self.stages), key=is_quantized)

    def graph(self, folder: Path, stage: StageFile) -> ExportedGraph:
        return ExportedGraph(folder / stage.file, stage.precision, stage.contract)

    def write(self, folder: Path) -> None:
        data = {"schema": SCHEMA, **asdict(self)}
        (folder / EXPORT).write_text(json_text(data, indent=1), encoding="utf-8")


def read_export(folder: Path) -> ExportManifest:
    """BundleError where there is no export, or it is broken, damaged, newer or hostile."""
    path = folder / EXPORT
    if not path.is_file():
        raise BundleError(f"{folder} is no export: it has no {EXPORT}", "lcm-compile export --out DIR")
    try:
        data = json.loads(path.read_bytes())
        schema = data.pop("schema", None) if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise BundleError(f"{path} has schema {schema!r}; this lcm-compile reads {SCHEMA}", AGAIN)
        manifest = from_json(ExportManifest, data)
    except (ValueError, UsageError, RecursionError, OSError) as error:
        raise BundleError(f"{path} is broken: {error}", AGAIN) from error
    named = [
        *(stage.file for stage in manifest.stages),
        *(tokenizer.file for tokenizer in manifest.pipeline.tokenizers),
        *manifest.proof.files,
    ]
    for name in (*manifest.files, *named):
        check_inside(folder, name)
    missing = [name for name in {*named, *manifest.files} if not (folder / name).is_file()]
    if missing:
        raise BundleError(f"the export lacks {folder / sorted(missing)[0]}", "copy the whole folder")
    digests = Digests()
    for name, expected in manifest.files.items():
        if digests.sha256(folder / name) != expected:
            raise BundleError(f"{folder / name} is damaged: its sha256 is not the export's", "copy it again")
    digests.save()
    return manifest
