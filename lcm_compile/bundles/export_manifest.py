"""An export: a folder of graphs, tokenizers and proof, from which engines are built here or elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lcm_compile.bundles.manifest import Manifest, StageFile
from lcm_compile.errors import BundleError
from lcm_compile.graphs import ExportedGraph
from lcm_compile.precisions import Precision

EXPORT = "export.json"


@dataclass(frozen=True, kw_only=True)
class ExportManifest(Manifest):
    """export.json: the graphs of one base.

    `parity` holds the graphs' own figures; none where the engines are checked themselves.
    """

    KIND, FILE, AGAIN = "export", EXPORT, "lcm-compile export, again"

    name: str
    graph_format: str
    is_large: bool

    @property
    def precision(self) -> Precision:
        """The precision of the stage that asks the most of a target."""
        return max((stage.precision for stage in self.stages), key=lambda precision: precision.is_quantized)

    def graph(self, folder: Path, stage: StageFile) -> ExportedGraph:
        return ExportedGraph(folder / stage.file, stage.precision, stage.contract)


def read_export(folder: Path) -> ExportManifest:
    """BundleError where there is no export, or it is broken, damaged, newer or hostile."""
    if not (folder / EXPORT).is_file():
        raise BundleError(f"{folder} is no export: it has no {EXPORT}", "lcm-compile export --out DIR")
    manifest, _ = ExportManifest.read(folder)
    manifest.check_files(folder)
    return manifest
