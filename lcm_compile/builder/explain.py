"""Says why a build is a hit or a miss. A miss is explained against the bundle that is most like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lcm_compile.bundles.manifest import BundleManifest, read_manifest
from lcm_compile.bundles.store import bundles_folder
from lcm_compile.checkpoint.find import same_base
from lcm_compile.errors import BundleError
from lcm_compile.spec import BuildSpec

REASONS_SHOWN = 8
# The inputs that a command line chooses, by the start of their names. They are listed first.
ASKED = ("LoRA", "backend", "precision", "shape", "target", "whole loop")


def explain(spec: BuildSpec, key: Mapping[str, str], folder: Path, force: bool) -> tuple[bool, list[str]]:
    """Returns whether `folder` already holds the build with this key, and the reasons in words.

    If it does not, the reasons are the inputs that differ from the bundle in `folder`; if there is none, from
    the most similar bundle in the store that is of the same base and kind.
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
        return False, [f"there is no bundle of {spec.base} to compare with: none has {kind_of(spec)}"]
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
