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

    `name` is the base's short name, and `is_large` says whether its models are handled in processes of their
    own. `parity` holds the figures of the graphs; it is empty if the engines themselves will be checked.
    """

    KIND, FILE, AGAIN = "export", EXPORT, "lcm-compile export, again"

    name: str
    graph_format: str
    is_large: bool

    @property
    def precision(self) -> Precision:
        """The precision of the stage that asks the most of a target."""
        return max((stage.precision for stage in self.stages), key=lambda precision: precision.is_quantized)


@dataclass(frozen=True)
class Export:
    """An export on the disk whose manifest was read and whose files were checked."""

    folder: Path
    manifest: ExportManifest

    @property
    def is_large(self) -> bool:
        """Whether each engine is built in a process of its own."""
        return self.manifest.is_large

    def graph(self, stage: StageFile) -> ExportedGraph:
        """Returns the graph of one of the manifest's stages."""
        return ExportedGraph(self.folder / stage.file, stage.precision, stage.contract)


def open_export(folder: Path) -> Export:
    """Returns the export in a folder, after checking every file's digest.

    Raises BundleError if there is no export, if it is broken or damaged, if this version can't read it, or if
    its manifest names files outside the folder.
    """
    if not (folder / EXPORT).is_file():
        raise BundleError(f"{folder} is not an export: it has no {EXPORT}", "lcm-compile export --out DIR")
    manifest, _ = ExportManifest.read(folder)
    manifest.check_files(folder)
    return Export(folder, manifest)
