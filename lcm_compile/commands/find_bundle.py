"""Which bundle a command means."""

from __future__ import annotations

from pathlib import Path

from lcm_compile.builder.key import briefly
from lcm_compile.builder.plan import make_plan
from lcm_compile.bundles.bundle import EngineBundle, open_bundle
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.bundles.store import recent, remember
from lcm_compile.engines import find_backend
from lcm_compile.errors import BundleError, LcmCompileError, UsageError
from lcm_compile.spec import BuildSpec
from lcm_compile.targets import find_target


def find_bundle(engine: Path | None, base: str | None, gpu: str | None) -> EngineBundle:
    """The bundle that is named, or the one used last that runs on this machine."""
    if engine is not None:
        if base or gpu:
            raise UsageError("--engine names a bundle; drop --base and --gpu")
        return open_used(engine)
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
    told = "\n  ".join(["no bundle here runs on this machine:", *reasons[:5]])
    raise BundleError(
        told if reasons else "there is no bundle yet", "lcm-compile build --base demo --gpu cpu"
    )


def find_bundle_of(base: str, gpu: str) -> EngineBundle:
    """The bundle used last of a base, whatever was fused into it, for a target.

    BundleError where what it was built from has changed since: no stale engine is run by its base's name.
    """
    target = find_target(gpu).name
    for folder in recent():
        try:
            manifest, _ = read_manifest(folder)
        except BundleError:
            continue
        if manifest.target.name == target and same_base(manifest.spec.base, base):
            try:
                plan = make_plan(manifest.spec, folder)
            except LcmCompileError:  # the base or a LoRA is gone: the bundle is all there is
                return open_used(folder)
            if not plan.hit:
                told = "\n  ".join(briefly(plan.reasons))
                raise BundleError(
                    f"the bundle of {base} for {target} is out of date; what is there now {told}",
                    manifest.spec.command(),
                )
            return open_used(folder)
    raise BundleError(
        f"there is no bundle of {base} for {target}",
        f"{BuildSpec(base=base, gpu=target).command()}, or name a bundle with --engine",
    )


def open_used(folder: Path) -> EngineBundle:
    bundle = open_bundle(folder)
    remember(folder)
    return bundle


def same_base(one: str, other: str) -> bool:
    """Whether two words for a base are the same name, or lead to the same folder."""
    try:
        return one == other or Path(one).samefile(other)
    except OSError:
        return False
