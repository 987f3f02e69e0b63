"""Finds the bundle that a command's options name."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lcm_compile.bundles.bundle import EngineBundle, open_bundle
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.bundles.sizes import folder_of_size, further_sizes
from lcm_compile.bundles.store import recent, remember
from lcm_compile.engines import find_backend
from lcm_compile.errors import BundleError, LcmCompileError, UsageError
from lcm_compile.spec import BuildSpec
from lcm_compile.targets import find_target


def find_bundle(bundle: Path | None, base: str | None, gpu: str | None) -> EngineBundle:
    """Returns the named bundle, that of `base` for `gpu`, or the last used one that runs here.

    Raises UsageError if the options contradict each other, and BundleError if there is no such bundle, it is
    damaged, or it is out of date.
    """
    if bundle is not None:
        if base or gpu:
            raise UsageError("--bundle names the bundle already; drop --base and --gpu")
        return open_used(bundle)
    if base and gpu:
        return find_bundle_of(base, gpu)
    if base or gpu:
        raise UsageError("--base and --gpu go together")
    reasons = []
    for folder in recent():
        try:
            manifest, _ = read_manifest(folder)
        except BundleError as error:
            reasons.append(error.message)
            continue
        reason = find_backend(manifest.backend).cannot_run(manifest.target)
        if reason is None:
            return open_used(folder)
        reasons.append(f"{folder.name}: {reason}")
    message = "\n  ".join(["no bundle here runs on this machine:", *reasons[:5]])
    raise BundleError(
        message if reasons else "there is no bundle yet", "lcm-compile build --base demo --gpu cpu"
    )


def of_size(bundle: EngineBundle, height: int | None, width: int | None) -> EngineBundle:
    """Returns the bundle, or that of one of its sizes. Raises UsageError if there is none of this size."""
    if height is None and width is None:
        return bundle
    folder = folder_of_size(bundle.folder, height, width)
    return bundle if folder == bundle.folder else open_used(folder)


def find_bundle_of(base: str, gpu: str) -> EngineBundle:
    """Returns the last used bundle of a base for a target, with any LoRAs fused into it.

    Raises BundleError if there is none, or if the base or a LoRA has changed since the build: a base's name
    never runs an outdated engine.
    """
    # A tenth of a second that a `run` of the last used bundle does not need.
    from lcm_compile.builder.key import briefly
    from lcm_compile.builder.plan import make_plan
    from lcm_compile.checkpoint.find import same_base

    target = find_target(gpu).name
    for folder in recent():
        try:
            manifest, _ = read_manifest(folder)
        except BundleError:
            continue
        if manifest.target.name == target and same_base(manifest.spec.base, base):
            try:
                plan = make_plan(manifest.spec, folder)
            except LcmCompileError:  # the base or a LoRA is missing, so nothing can be compared
                return open_used(folder)
            if not plan.hit:
                reasons_now = "\n  ".join(briefly(plan.reasons))
                raise BundleError(
                    f"the bundle of {base} for {target} is out of date: a new build {reasons_now}",
                    manifest.spec.command(),
                )
            return open_used(folder)
    raise BundleError(
        f"there is no bundle of {base} for {target}",
        f"{BuildSpec(base=base, gpu=target).command()}, or name a bundle with --bundle",
    )


def find_drawer(picture: Path, digest: str, model: str) -> EngineBundle:
    """Returns the bundle that drew a picture, by the digest that the picture's file tells.

    Raises BundleError if there is none on this machine.
    """
    from lcm_compile.bundles.inventory import list_bundles

    for stored in list_bundles():
        for folder in (stored.folder, *further_sizes(stored.folder)):
            with contextlib.suppress(BundleError):
                if read_manifest(folder)[1] == digest:
                    return open_used(folder)
    raise BundleError(
        f"the bundle that drew {picture} is not on this machine: one of {model}, digest {digest[:10]}",
        "--bundle FOLDER draws the picture's settings with another",
    )


def open_used(folder: Path) -> EngineBundle:
    """Returns the bundle of a folder, and makes it the last used one. Raises BundleError if it is damaged."""
    bundle = open_bundle(folder)
    remember(folder)
    return bundle
