"""The key of a build: the content of all its inputs. Two builds with the same key give the same engines.

This file also says why a build is a hit or a miss. A miss is explained against the most similar bundle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_compile.bundles.manifest import BundleManifest, read_manifest
from lcm_compile.bundles.store import bundles_folder
from lcm_compile.checkpoint.checkpoint import Checkpoint
from lcm_compile.checkpoint.find import same_base
from lcm_compile.engines import Backend
from lcm_compile.errors import BundleError
from lcm_compile.export import EXPORTERS
from lcm_compile.lora.find import PlannedLora
from lcm_compile.spec import BuildSpec, Shape
from lcm_compile.system.cache import Digests
from lcm_compile.system.versions import installed_version
from lcm_compile.targets import GpuTarget
from lcm_compile.version import __version__

NAME_LENGTH = 40  # how many characters of the base's name are in the name of a bundle's folder
REASONS_SHOWN = 8
# The inputs that a command line chooses, by the start of their names. They are listed first.
ASKED = (
    "ControlNet",
    "IP-Adapter",
    "LoRA",
    "T2I-Adapter",
    "backend",
    "clip skip",
    "embedding",
    "few-step",
    "pictures",
    "precision",
    "prompt tokens",
    "shape",
    "target",
    "whole loop",
)
SOURCES = ("*.py", "*.cpp", "*.hpp")
PACKAGE = Path(__file__).parents[1]
# Folders and files of the package that change no graph and no engine. Editing them does not change the key.
SHAPES_NOTHING = {
    *("output", "commands", "training", "demo", "benchmarks", "serving"),
    *("__init__.py", "__main__.py", "cli.py"),
}


def export_key(
    spec: BuildSpec,
    checkpoint: Checkpoint,
    loras: tuple[PlannedLora, ...],
    shape: Shape,
    precisions: Mapping[str, str],
    graph_format: str,
    digests: Digests,
) -> dict[str, str]:
    """Returns everything that the exported graphs depend on: each input's name and its content, never a path.

    Raises CheckpointError if a file of the base can't be read.
    """
    key = {f"base {name}": digest for name, digest in checkpoint.content(digests.sha256).items()}
    for i, lora in enumerate(loras, 1):
        key[f"LoRA {i}"] = lora.sha256
        key[f"LoRA {i} weight"] = lora.spec.effective
        if lora.spec.name is not None:
            key[f"LoRA {i} at run time"] = lora.spec.name
    for i, embedding in enumerate(checkpoint.embeddings, 1):
        key[f"embedding {i}"] = digests.sha256(embedding.path)
        key[f"embedding {i} word"] = embedding.spec.token or embedding.path.stem
    key["shape"] = str(shape)
    key |= spec.graph_inputs
    key |= {f"precision of {stage}": precision for stage, precision in precisions.items()}
    key["graph format"] = graph_format
    for package in EXPORTERS[graph_format]:
        key[f"{package} version"] = str(installed_version((package,)))
    key["lcm-compile"] = f"{__version__} {code_digest(digests)}"
    return key


def bundle_key(
    graphs: Mapping[str, str], name: str, backend: Backend, options: Mapping[str, Any], target: GpuTarget
) -> dict[str, str]:
    """Returns everything that a bundle depends on: its graphs, by their key, and what builds from them."""
    return {
        **graphs,
        "target": " ".join((target.name, *target.capabilities)),
        "backend": name,
        "backend version": str(installed_version(backend.PACKAGES)),
        "builder options": json.dumps(options, sort_keys=True),
    }


def bundle_name(base: str, target: GpuTarget, key: Mapping[str, str]) -> str:
    """Returns the name of a bundle's folder: base, target and the first digits of its key."""
    name = "".join(c if c.isalnum() else "-" for c in base)[:NAME_LENGTH] or "base"
    return f"{name}-{target.name}-{key_digest(key)[:16]}"


def code_digest(digests: Digests) -> str:
    """Returns 16 hex digits: the start of the sha256 of all source that can shape a graph or an engine.

    The name and content of every file in `lcm_compile`, `export` and `engines` count, except for those listed
    in SHAPES_NOTHING. So a new folder counts until it is listed there.
    """
    from lcm_compile import engines, export

    found = {}
    # In an installed package the last two folders are inside the first; in a clone they are next to it.
    for root, place in (
        (PACKAGE, ""),
        (Path(export.__path__[0]), "export/"),
        (Path(engines.__path__[0]), "engines/"),
    ):
        for path in (path for pattern in SOURCES for path in root.rglob(pattern)):
            name = place + path.relative_to(root).as_posix()
            if not {name, name.partition("/")[0]} & SHAPES_NOTHING:
                found[name] = digests.sha256(path)
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def key_digest(key: Mapping[str, str]) -> str:
    """Returns the sha256 of a key in hex."""
    return hashlib.sha256(json.dumps(dict(sorted(key.items()))).encode()).hexdigest()


def explain(spec: BuildSpec, key: Mapping[str, str], folder: Path, force: bool) -> tuple[bool, list[str]]:
    """Returns whether `folder` already holds the build with this key, and the reasons in words.

    For a miss, the reasons list the inputs that differ from the bundle in `folder`. If there is none, they
    are compared with the most similar bundle in the store that is of the same base and kind.
    """
    existing = existing_manifest(folder)
    if existing and existing.key == key:
        if force:
            return False, [f"--force: {folder.name} holds this very build and is built again"]
        return True, [f"all {len(key)} inputs are those of {folder.name}"]
    if existing:
        return False, [f"differs from {folder.name}:", *differences(key, existing.key)]
    near = [
        (manifest, other.name)
        for other in sorted(bundles_folder().glob("[!.]*"))
        if (manifest := existing_manifest(other))
        and (same_base(spec.base, manifest.spec.base) or base_inputs(key) == base_inputs(manifest.key))
        and kind_of(spec) == kind_of(manifest.spec)
    ]
    if not near:
        return False, [f"there is no bundle yet to compare with, of {spec.base} with {kind_of(spec)}"]
    nearest, name = min(near, key=lambda found: len(differences(key, found[0].key)))
    changed = differences(key, nearest.key)
    if not changed:
        return False, [f"there is no bundle at {folder} yet ({name} is the same build)"]
    return False, [f"differs from {name}:", *changed]


def base_inputs(key: Mapping[str, str]) -> dict[str, str]:
    """Returns the inputs that are files and settings of the base."""
    return {name: content for name, content in key.items() if name.startswith("base ")}


def kind_of(spec: BuildSpec) -> str:
    """Returns in words what a bundle must have in common with a spec to be compared with it."""
    weights = "its own weights" if spec.random_seed is None else "random weights"
    return f"{weights} and one graph for {'the complete loop' if spec.whole_loop else 'each stage'}"


def briefly(reasons: Sequence[str]) -> list[str]:
    """Returns the first reasons that `explain` gave, and the number of the others."""
    shown = list(reasons[: 1 + REASONS_SHOWN])
    more = len(reasons) - len(shown)
    return [*shown, f"and {more} more inputs, which --dry-run lists"] if more else shown


def existing_manifest(folder: Path) -> BundleManifest | None:
    """Returns the manifest of the bundle in a folder, or None if there is none that can be read."""
    try:
        return read_manifest(folder)[0]
    except BundleError:
        return None


def differences(new: Mapping[str, str], old: Mapping[str, str]) -> list[str]:
    """Returns each input that differs, in words. Digests are cut to their first 12 digits."""

    def short(value: str) -> str:
        return value[:12] if len(value) == 64 else value

    found = []
    for name in sorted({*new, *old}, key=lambda name: (not name.startswith(ASKED), name)):
        if name not in old:
            found.append(f"{name} is new ({short(new[name])})")
        elif name not in new:
            found.append(f"{name} is gone (was {short(old[name])})")
        elif new[name] != old[name]:
            found.append(f"{name} changed: {short(old[name])} → {short(new[name])}")
    return found
