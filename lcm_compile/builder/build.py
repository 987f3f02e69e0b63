"""Builds bundles: plan → export (each stage is prepared and checked) → engines → bundle."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lcm_compile.builder.estimate import disk_for, estimate_plan
from lcm_compile.builder.export import WAITING, caller, exported
from lcm_compile.builder.key import briefly, key_digest
from lcm_compile.builder.plan import Plan, make_plan, plan_again
from lcm_compile.bundles.bundle import (
    EngineBundle,
    list_files,
    open_bundle,
    publishing,
    reporting_full_disk,
)
from lcm_compile.bundles.export_manifest import Export
from lcm_compile.bundles.manifest import BundleManifest, StageFile, read_manifest
from lcm_compile.bundles.sizes import size_folder
from lcm_compile.bundles.store import remember
from lcm_compile.errors import BundleError, CheckpointError
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
    """Builds a bundle and returns it. If a bundle already holds exactly this build, returns that one.

    `out` is the bundle's folder, by default one in the user's store. `report` is called with each task's name
    when it starts, and again with its cost when it ends. Raises UsageError, CheckpointError, LoraError or
    BackendError if the build can't be done, and ParityError if the engines do not draw what torch draws.
    After an error nothing is published.
    """
    plan = make_plan(spec, None if out is None else Path(out), force, report)
    return build_plans([plan], force, report)[0][1]


def plan_size(bundle: Path, height: int, width: int, force: bool = False) -> Plan:
    """Returns the plan of a further size of a bundle, which is built as the bundle was.

    Raises BundleError if the bundle is out of date: it is not what the same build would be now.
    """
    spec = read_manifest(bundle)[0].spec
    main = make_plan(spec, bundle)
    if not main.hit:
        reasons = "\n  ".join(briefly(main.reasons))
        raise BundleError(
            f"{bundle} is out of date, and a size of it would be another model's: a new build {reasons}",
            f"{spec.command()} --out {shlex.quote(str(bundle))}",
        )
    chosen = replace(spec, height=height, width=width, backend=main.backend_name)
    return make_plan(chosen, size_folder(bundle, height, width), force)


def add_size(
    bundle: str | Path, height: int, width: int, *, force: bool = False, report: Report = silent
) -> EngineBundle:
    """Builds a further size of a bundle into it, and returns that size, which is a bundle too.

    `load(bundle, height=…, width=…)` draws with it. Nothing else of the bundle changes. Raises BundleError if
    the bundle is out of date, and otherwise what `build` raises.
    """
    return build_plans([plan_size(Path(bundle), height, width, force)], force, report)[0][1]


def build_plans(plans: Sequence[Plan], force: bool, report: Report) -> list[tuple[Plan, EngineBundle]]:
    """Builds the bundles of several plans, and returns each bundle with the plan that was followed for it.

    Plans that need the same graphs share one export. Raises what `build` raises.
    """
    followed = {plan.folder: plan for plan in plans}
    groups = group_by_graphs(plans)
    for n, group in enumerate(groups, 1):
        later = [plan for others in groups[n:] for plan in others]
        followed |= {plan.folder: plan for plan in build_group(group, later, force, report)}
    for folder in followed:
        remember(folder)
    return [(followed[plan.folder], open_bundle(plan.folder)) for plan in plans]


def group_by_graphs(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Returns the plans that are not hits, in groups. Plans in one group share the export of their graphs.

    A plan that starts from an existing export is a group of its own.
    """
    groups: dict[str, list[Plan]] = {}
    for plan in plans:
        if not plan.hit:
            name = str(plan.folder)
            if export := plan.export:
                name = " ".join((key_digest(export.key), export.checked, str(export.proof_shape)))
            groups.setdefault(name, []).append(plan)
    return list(groups.values())


def build_group(group: Sequence[Plan], later: Sequence[Plan], force: bool, report: Report) -> list[Plan]:
    """Builds bundles that need the same graphs, and returns the plans that were followed.

    The plans are made again first: a bundle that another process has built by now is a hit. The disk must
    have room for the bundles of `later` too. Raises CheckpointError if the base or a LoRA changed since the
    plan was made, and otherwise what `build` raises.
    """
    with ExitStack() as stack:
        folders = {
            folder: stack.enter_context(publishing(folder, lambda: report(WAITING, None)))
            # Every build locks its folders in sorted order, so that no two builds wait for each other.
            for folder in sorted(plan.folder for plan in group)
        }
        plans = [plan_again(plan, force) for plan in group]
        if {plan.folder for plan in plans} != folders.keys():
            raise CheckpointError(CHANGED, "build again")
        missing = {plan.folder: plan for plan in plans if not plan.hit}
        if missing:
            check_room([*missing.values(), *later])
            label = " for {}" if len(missing) > 1 else ""
            built: dict[tuple[str | None, ...], Path] = {}
            with exported(next(iter(missing.values())), folders[next(iter(missing))], report) as export:
                for folder, plan in missing.items():
                    same = built.get(engines_of(plan))
                    build_into(folders[folder], export, plan, report, label.format(plan.target.name), same)
                    built[engines_of(plan)] = folders[folder]
            if [plan_again(plan, force).key for plan in plans] != [plan.key for plan in plans]:
                raise CheckpointError(CHANGED, "build again")
    return plans


def check_room(plans: Sequence[Plan]) -> None:
    """Raises LcmCompileError if the disk has no room to build all of these plans."""
    check_space(plans[0].folder, disk_for([estimate_plan(plan) for plan in plans]))


def engines_of(plan: Plan) -> tuple[str | None, ...]:
    """Returns what engines depend on besides their graphs. It can be equal for two targets: A10 and A10G."""
    key = plan.key
    capability = plan.target.compute_capability
    return plan.backend_name, key["backend version"], key["builder options"], capability


def build_into(
    folder: Path, export: Export, plan: Plan, report: Report, label: str = "", same: Path | None = None
) -> None:
    """Fills an empty folder with a bundle: the engines of an export, the tokenizers, the proof, the manifest.

    `label` is added to the names of the reported tasks. `same` is a bundle with identical engines, which are
    copied from it. Raises BackendError if an engine can't be built, and ParityError if the engines run on
    this machine and do not compute what torch computes.
    """
    watch, graphs = Stopwatch(report), export.manifest
    for name in ("tokenizers", "proof"):
        shutil.copytree(export.folder / name, folder / name)
    stages: list[StageFile] = []
    with reporting_full_disk(folder.parent):
        if same is not None:
            with watch.task(f"copy the engines{label}"):
                shutil.copytree(same / "engines", folder / "engines")
            stages += read_manifest(same)[0].stages
        else:
            (folder / "engines").mkdir()
            for stage in graphs.stages:
                with watch.task(f"build {stage.contract.name}{label}"):
                    stages.append(build_stage(folder, export, stage, plan))
    manifest = BundleManifest(
        spec=plan.spec,
        target=plan.target,
        backend=plan.backend_name,
        key=plan.key,
        architecture=graphs.architecture,
        pipeline=graphs.pipeline,
        stages=tuple(stages),
        loras=graphs.loras,
        embeddings=graphs.embeddings,
        parity=graphs.parity,
        proof=graphs.proof,
        toolchain={
            **graphs.toolchain,
            **versions_of(("numpy", "tokenizers")),
            plan.backend_name: str(installed_version(plan.backend.PACKAGES)).split(" ")[-1],
        },
        costs={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=list_files(folder, but=export.folder),
        lossy=graphs.lossy,
    )
    if plan.backend.cannot_run(plan.target) is None:
        manifest.write(folder)  # verify loads the bundle, and loading reads the manifest
        call = caller(graphs.is_large)
        with watch.task(f"check the engines{label}"):
            figures = call(verify.verify, EngineBundle(folder, manifest, ""))
        parity.require(figures)
        manifest = replace(manifest, parity={**manifest.parity, **figures})
    replace(manifest, costs={**graphs.costs, **watch.costs}).write(folder)


def build_stage(folder: Path, export: Export, stage: StageFile, plan: Plan) -> StageFile:
    """Builds one engine in `folder/engines` and returns its entry in the manifest. Raises BackendError."""
    build_engine = caller(export.manifest.is_large)
    path = build_engine(
        plan.backend.build, export.graph(stage), plan.target, folder / "engines", plan.options
    )
    return replace(stage, file=path.relative_to(folder).as_posix())
