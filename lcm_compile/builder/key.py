"""Two builds with the same key are the same: what a key holds, how keys are compared, and a miss is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.bundles.store import bundles_folder
from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.engines import Backend
from lcm_compile.errors import BundleError
from lcm_compile.export import EXPORTERS
from lcm_compile.lora.find import PlannedLora
from lcm_compile.spec import Shape
from lcm_compile.system.cache import Digests
from lcm_compile.system.versions import installed_version
from lcm_compile.targets import GpuTarget
from lcm_compile.version import __version__

NAME_LENGTH = 40
REASONS_SHOWN = 8
# Folders and files of the package that shape neither a graph nor an engine: an edit there is no miss.
SHAPES_NOTHING = {
    *("output", "commands", "training", "demo", "benchmarks", "serving"),
    *("__init__.py", "__main__.py", "cli.py"),
}
# How the names of those inputs begin that a command line chooses.
ASKED = ("LoRA", "backend", "precision", "shape", "target", "whole loop")


def export_key(
    checkpoint: Checkpoint,
    loras: tuple[PlannedLora, ...],
    shape: Shape,
    rewrites: Collection[str],
    precisions: Mapping[str, str],
    graph_format: str,
    digests: Digests,
) -> dict[str, str]:
    """All that the exported graphs depend on, as content: no path is in it."""
    key = {f"base {name}": digest for name, digest in checkpoint.content(digests.sha256).items()}
    for i, lora in enumerate(loras, 1):
        key[f"LoRA {i}"] = lora.sha256
        key[f"LoRA {i} weight"] = lora.spec.effective
    key["shape"] = str(shape)
    key["rewrites"] = ", ".join(rewrites)
    key |= {f"precision of {stage}": precision for stage, precision in precisions.items()}
    key["graph format"] = graph_format
    for package in EXPORTERS[graph_format]:
        key[f"{package} version"] = str(installed_version((package,)))
    key["lcm-compile"] = f"{__version__} {code_digest(digests)}"
    return key


def engine_key(name: str, backend: Backend, target: GpuTarget) -> dict[str, str]:
    """All that the engines depend on besides the graphs."""
    return {
        "target": f"{target.name} {target.compute_capability or ''}".strip(),
        "backend": name,
        "backend version": str(installed_version(backend.PACKAGES)),
        "builder options": json.dumps(backend.options(target), sort_keys=True),
    }


def bundle_name(base: str, target: GpuTarget, key: Mapping[str, str]) -> str:
    name = "".join(c if c.isalnum() else "-" for c in base)[:NAME_LENGTH] or "base"
    return f"{name}-{target.name}-{key_digest(key)[:16]}"


def code_digest(digests: Digests) -> str:
    """The first 16 digits of the sha256 of all source that can shape a graph or an engine.

    Every file below `lcm_compile`, `export` and `engines` counts by its name and content, but for those of
    SHAPES_NOTHING: a new folder counts unless it is named there.
    """
    import lcm_compile
    from lcm_compile import engines, export

    found = {}
    # Installed, the last two lie inside the first; in a clone they lie beside it.
    for module, place in ((lcm_compile, ""), (export, "export/"), (engines, "engines/")):
        root = Path(module.__path__[0])
        for path in root.rglob("*.py"):
            name = place + path.relative_to(root).as_posix()
            if not {name, name.partition("/")[0]} & SHAPES_NOTHING:
                found[name] = digests.sha256(path)
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def explain(key: Mapping[str, str], folder: Path, force: bool) -> tuple[bool, list[str]]:
    """Whether `folder` already holds this build, and why; a miss is told against the nearest bundle."""
    existing = existing_key(folder)
    if existing == dict(key):
        if force:
            return False, [f"--force: {folder.name} holds this very build and is built again"]
        return True, [f"all {len(key)} inputs are those of {folder.name}"]
    nearest, name = existing, folder.name
    if nearest is None:
        candidates = [
            (candidate, other.name)
            for other in sorted(bundles_folder().glob("[!.]*"))
            if (candidate := existing_key(other)) is not None
        ]
        if not candidates:
            return False, ["there is no bundle yet"]
        nearest, name = min(candidates, key=lambda c: len(differences(key, c[0])))
    changed = differences(key, nearest)
    if not changed:
        return False, [f"there is no bundle at {folder} yet ({name} is the same build)"]
    return False, [f"differs from {name}:", *changed]


def briefly(reasons: Sequence[str]) -> list[str]:
    """The first of `explain`'s reasons, and how many more there are."""
    shown = list(reasons[: 1 + REASONS_SHOWN])
    more = len(reasons) - len(shown)
    return [*shown, f"and {more} more inputs, which --dry-run lists"] if more else shown


def existing_key(folder: Path) -> dict[str, str] | None:
    try:
        return dict(read_manifest(folder)[0].key)
    except BundleError:
        return None


def differences(new: Mapping[str, str], old: Mapping[str, str]) -> list[str]:
    """Each input that differs, in words, what was asked for first; digests are cut to their first digits."""

    def short(value: str) -> str:
        return value[:12] if len(value) == 64 else value

    told = []
    for name in sorted({*new, *old}, key=lambda name: (not name.startswith(ASKED), name)):
        if name not in old:
            told.append(f"{name} is new ({short(new[name])})")
        elif name not in new:
            told.append(f"{name} is gone (was {short(old[name])})")
        elif new[name] != old[name]:
            told.append(f"{name} changed: {short(old[name])} → {short(new[name])}")
    return told


def key_digest(key: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(key.items()))).encode()).hexdigest()
