"""The main path of a build: plan → export (each stage prepared and checked) → engines → bundle."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lcm_compile.builder.estimate import disk_for, estimate_plan
from lcm_compile.builder.export import WAITING, caller, exported
from lcm_compile.builder.key import key_digest
from lcm_compile.builder.plan import Plan, make_plan, make_plan_from
from lcm_compile.bundles.bundle import (
    EngineBundle,
    list_files,
    open_bundle,
    publishing,
    reporting_full_disk,
)
from lcm_compile.bundles.export_manifest import ExportManifest, read_export
from lcm_compile.bundles.manifest import BundleManifest, StageFile, read_manifest
from lcm_compile.bundles.store import remember
from lcm_compile.errors import CheckpointError
from lcm_compile.proof import parity, verify
from lcm_compile.spec import BuildSpec
from lcm_compile.system.files import check_space
from lcm_compile.system.stopwatch import Report, Stopwatch, silent
from lcm_compile.system.versions import installed_version, versions_of

CHANGED = "the base or a LoRA changed while it was being built"


def build(
    spec: BuildSpec,
    out: str | Path | None = None,
    *,
    force: bool = False,
    report: Report = silent,
) -> EngineBundle:
    """Builds a bundle, or returns the one that already holds this very build.

    `out` is the bundle's folder, by default one in the user's store; `report` is told each part's name as
    it starts, and its cost as it ends. Raises UsageError, CheckpointError, LoraError, BackendError, and
    ParityError when the engines do not draw what torch draws; nothing is published then.
    """
    return build_targets([(spec, None if out is None else Path(out))], force, report)[0][1]


def build_targets(
    asked: Sequence[tuple[BuildSpec, Path | None]], force: bool, report: Report
) -> list[tuple[Plan, EngineBundle]]:
    """Bundles for several specs, each with the plan that was followed; the same graphs are made once."""
    plans = [make_plan(spec, out, force, report) for spec, out in asked]
    sharing: dict[str, list[int]] = {}
    for i, plan in enumerate(plans):
        if not plan.hit:
            assert plan.export is not None
            shared = [key_digest(plan.export.key), plan.export.checked, str(plan.export.proof_shape)]
            sharing.setdefault(" ".join(shared), []).append(i)
    groups = list(sharing.values())
    for n, members in enumerate(groups, 1):
        wanted = {plans[i].folder for i in members}
        later = [plans[i] for group in groups[n:] for i in group]
        followed = build_sharing([asked[i] for i in members], wanted, later, force, report)
        for i, plan in zip(members, followed, strict=True):
            plans[i] = plan
    for plan in plans:
        remember(plan.folder)
    return [(plan, open_bundle(plan.folder)) for plan in plans]


def build_sharing(
    asked: Sequence[tuple[BuildSpec, Path | None]],
    wanted: Iterable[Path],
    later: Sequence[Plan],
    force: bool,
    report: Report,
) -> list[Plan]:
    """Builds bundles that need the same graphs into the folders `wanted`.

    Those that another process built meanwhile are hits. The disk must have room for those of `later` too.
    """

    def plan_again() -> list[Plan]:
        return [make_plan(spec, out, force) for spec, out in asked]

    with ExitStack() as stack:
        folders = {
            folder: stack.enter_context(publishing(folder, lambda: report(WAITING, None)))
            for folder in sorted(wanted)  # in one order: no two builds wait for each other
        }
        plans = plan_again()
        if {plan.folder for plan in plans} != folders.keys():
            raise CheckpointError(CHANGED, "build again")
        missing = {plan.folder: plan for plan in plans if not plan.hit}
        if missing:
            several = len(missing) > 1
            check_room([*missing.values(), *later])
            built: dict[tuple[str | None, ...], Path] = {}
            with exported(next(iter(missing.values())), folders[next(iter(missing))], report) as export:
                for folder, plan in missing.items():
                    twin = built.get(engines_of(plan))
                    build_into(folders[folder], *export, plan, report, several, twin)
                    built[engines_of(plan)] = folders[folder]
            if [plan.key for plan in plan_again()] != [plan.key for plan in plans]:
                raise CheckpointError(CHANGED, "build again")
    return plans


def check_room(plans: Sequence[Plan], graphs: Path | None = None) -> None:
    """LcmCompileError where the disk has no room to build all of these, from the export `graphs` if given."""
    check_space(plans[0].folder, disk_for([estimate_plan(plan, graphs) for plan in plans]))


def engines_of(plan: Plan) -> tuple[str | None, ...]:
    """What engines depend on besides their graphs: an A10's are an A10G's."""
    key = plan.key
    capability = plan.target.compute_capability
    return plan.backend_name, key["backend version"], key["builder options"], capability


def build_from(
    graphs: Path,
    gpu: str,
    backend: str = "auto",
    out: Path | None = None,
    *,
    force: bool = False,
    report: Report = silent,
) -> tuple[Plan, EngineBundle]:
    """A bundle for one target from an export, here or on a machine that never had the model.

    Raises UsageError, BackendError, ParityError, and BundleError where the export is damaged.
    """
    return build_targets_from(graphs, [(gpu, out)], backend, force, report)[0]


def build_targets_from(
    graphs: Path, asked: Sequence[tuple[str, Path | None]], backend: str, force: bool, report: Report
) -> list[tuple[Plan, EngineBundle]]:
    """Bundles for several targets from an export, each with the plan that was followed; see build_from."""
    done = []
    for n, (gpu, out) in enumerate(asked, 1):
        plan = make_plan_from(graphs, gpu, backend, out, force, report)
        if not plan.hit:
            with publishing(plan.folder, lambda: report(WAITING, None)) as folder:
                plan, *later = [make_plan_from(graphs, g, backend, o, force) for g, o in asked[n - 1 :]]
                if not plan.hit:
                    check_room([plan, *(p for p in later if not p.hit)], graphs)
                    build_into(folder, graphs, read_export(graphs), plan, report)
        remember(plan.folder)
        done.append((plan, open_bundle(plan.folder)))
    return done


def build_into(
    folder: Path,
    graphs: Path,
    export: ExportManifest,
    plan: Plan,
    report: Report,
    several: bool = False,
    twin: Path | None = None,
) -> None:
    """Fills an empty folder with the engines of an export, or those of its `twin`, and with the manifest."""
    watch = Stopwatch(report)
    told = f" for {plan.target.name}" if several else ""
    for name in ("tokenizers", "proof"):
        shutil.copytree(graphs / name, folder / name)
    stages: list[StageFile] = []
    with reporting_full_disk(folder.parent):
        if twin is not None:
            with watch.part(f"copy the engines{told}"):
                shutil.copytree(twin / "engines", folder / "engines")
            stages += read_manifest(twin)[0].stages
        else:
            (folder / "engines").mkdir()
            stages += [
                build_stage(folder, graphs, export, stage, plan, watch, told) for stage in export.stages
            ]
    manifest = BundleManifest(
        spec=plan.spec,
        target=plan.target,
        backend=plan.backend_name,
        key=plan.key,
        architecture=export.architecture,
        pipeline=export.pipeline,
        stages=tuple(stages),
        loras=export.loras,
        parity=export.parity,
        proof=export.proof,
        toolchain={
            **export.toolchain,
            **versions_of(("numpy", "tokenizers")),
            plan.backend_name: str(installed_version(plan.backend.PACKAGES)).split(" ")[-1],
        },
        costs={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=list_files(folder, but=graphs),
        lossy=export.lossy,
    )
    if plan.backend.cannot_run(plan.target) is None:
        manifest.write(folder)  # a bundle that is loaded has one
        call = caller(export.is_large)
        with watch.part(f"check the engines{told}"):
            figures = call(verify.verify, EngineBundle(folder, manifest, ""))
        parity.require(figures)
        manifest = replace(manifest, parity={**manifest.parity, **figures})
    replace(manifest, costs={**export.costs, **watch.costs}).write(folder)


def build_stage(
    folder: Path,
    graphs: Path,
    export: ExportManifest,
    stage: StageFile,
    plan: Plan,
    watch: Stopwatch,
    told: str,
) -> StageFile:
    """One engine, in `folder`/engines."""
    call = caller(export.is_large)
    with watch.part(f"build {stage.contract.name}{told}"):
        path = call(plan.backend.build, export.graph(graphs, stage), plan.target, folder / "engines")
    return replace(stage, file=path.relative_to(folder).as_posix())
