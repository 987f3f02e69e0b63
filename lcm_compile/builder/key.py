"""The key of a build: the content of all its inputs. Two builds with the same key give the same engines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from lcm_compile.checkpoint.checkpoint import Checkpoint
from lcm_compile.engines import Backend
from lcm_compile.export import EXPORTERS
from lcm_compile.lora.find import PlannedLora
from lcm_compile.spec import Shape
from lcm_compile.system.cache import Digests
from lcm_compile.system.versions import installed_version
from lcm_compile.targets import GpuTarget
from lcm_compile.version import __version__

NAME_LENGTH = 40  # how many characters of the base's name are in the name of a bundle's folder
PACKAGE = Path(__file__).parents[1]
# Folders and files of the package that shape neither a graph nor an engine. An edit of one keeps bundles
# valid.
SHAPES_NOTHING = {
    *("output", "commands", "training", "demo", "benchmarks", "serving"),
    *("__init__.py", "__main__.py", "cli.py"),
}


def export_key(
    checkpoint: Checkpoint,
    loras: tuple[PlannedLora, ...],
    shape: Shape,
    rewrites: Collection[str],
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
    key["shape"] = str(shape)
    key["rewrites"] = ", ".join(rewrites)
    key |= {f"precision of {stage}": precision for stage, precision in precisions.items()}
    key["graph format"] = graph_format
    for package in EXPORTERS[graph_format]:
        key[f"{package} version"] = str(installed_version((package,)))
    key["lcm-compile"] = f"{__version__} {code_digest(digests)}"
    return key


def engine_key(name: str, backend: Backend, target: GpuTarget) -> dict[str, str]:
    """Returns everything that the engines depend on besides the graphs, by the name of each input."""
    return {
        "target": f"{target.name} {target.compute_capability or ''}".strip(),
        "backend": name,
        "backend version": str(installed_version(backend.PACKAGES)),
        "builder options": json.dumps(backend.options(target), sort_keys=True),
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
        for path in root.rglob("*.py"):
            name = place + path.relative_to(root).as_posix()
            if not {name, name.partition("/")[0]} & SHAPES_NOTHING:
                found[name] = digests.sha256(path)
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def key_digest(key: Mapping[str, str]) -> str:
    """Returns the sha256 of a key in hex."""
    return hashlib.sha256(json.dumps(dict(sorted(key.items()))).encode()).hexdigest()
