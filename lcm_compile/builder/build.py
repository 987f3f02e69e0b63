"""Builds bundles: plan → export (each stage is prepared and checked) → engines → bundle."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from lcm_compile.builder.estimate import disk_for, estimate_plan, memory_for_engine
from lcm_compile.builder.export import HEAVY, WAITING, exported
from lcm_compile.builder.key import briefly, key_digest
from lcm_compile.builder.plan import Plan, make_plan, plan_again
from lcm_compile.builder.schedule import Schedule, scheduling
from lcm_compile.bundles.bundle import (
    EngineBundle,
    list_files,
    open_bundle,
    publishing,
    reporting_full_disk,
)
from lcm_compile.bundles.engine_reuse import find_engine, take_engine
from lcm_compile.bundles.export_manifest import Export
from lcm_compile.bundles.hard_links import link_or_copy
from lcm_compile.bundles.manifest import BundleManifest, StageFile, read_manifest
from lcm_compile.bundles.sizes import size_folder
from lcm_compile.bundles.store import remember
from lcm_compile.engines import FOR_SEVERAL
from lcm_compile.errors import BundleError, CheckpointError
from lcm_compile.graphs import ExportedGraph
from lcm_compile.proof import parity, verify
from lcm_compile.spec import BuildSpec
from lcm_compile.system.files import check_space
from lcm_compile.system.stopwatch import Report, Stopwatch, silent
from lcm_compile.system.versions import installed_version, versions_of

NOT_RUN = "the engine was compiled without the GPU, not yet run"
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
    """Returns the plans that are not hits, in groups. Plans in one group share the export of their graphs."""
    groups: dict[str, list[Plan]] = {}
    for plan in plans:
        if not plan.hit:
            if isinstance(plan.source, Export):
                name = str(plan.source.folder)
            else:
                name = " ".join(
                    (key_digest(plan.source.key), plan.source.checked, str(plan.source.proof_shape))
                )
            groups.setdefault(name, []).append(plan)
    return list(groups.values())


def build_group(group: Sequence[Plan], later: Sequence[Plan], force: bool, report: Report) -> list[Plan]:
    """Builds bundles that need the same graphs, and returns the plans that were followed.

    The plans are made again first: a bundle that another process has built by now is a hit. The disk must
    have room for the bundles of `later` too. Raises CheckpointError if the base or a LoRA changed since the
    plan was made, and otherwise what `build` raises.
    """
    watch = Stopwatch(report)
    with ExitStack() as stack:
        folders = {
            folder: stack.enter_context(publishing(folder, lambda: watch.task(WAITING)))
            # Every build locks its folders in sorted order, so that no two builds wait for each other.
            for folder in sorted(plan.folder for plan in group)
        }
        plans = [plan_again(plan, force) for plan in group]
        if {plan.folder for plan in plans} != folders.keys():
            raise CheckpointError(CHANGED, "build again")
        missing = {plan.folder: plan for plan in plans if not plan.hit}
        if missing:
            check_room([*missing.values(), *later])
            build_missing(missing, folders, force, report)
            if [plan_again(plan, force).key for plan in plans] != [plan.key for plan in plans]:
                raise CheckpointError(CHANGED, "build again")
    return plans


def build_missing(
    missing: Mapping[Path, Plan], folders: Mapping[Path, Path], force: bool, report: Report
) -> None:
    """Builds the bundles of plans that share an export, each in its folder of `folders`.

    Engines are built beside the export, each as soon as its graph is there. One that another bundle has is
    taken from there, unless the build is forced. Raises what `build` raises.
    """
    label = " for {}" if len(missing) > 1 else ""
    first, plan = next(iter(missing.items()))
    builders: dict[tuple[str | None, ...], Path] = {}  # the first of those whose engines are equal
    for folder, each in missing.items():
        builders.setdefault(engines_of(each), folder)
    watches = {folder: Stopwatch(report) for folder in missing}
    engines: dict[Path, dict[str, Future[tuple[Path, str]]]] = {folder: {} for folder in missing}

    with scheduling_of(plan) as schedule:

        def build_engine(graph: ExportedGraph, folder: Path) -> tuple[Path, str]:
            plan = missing[folder]
            name = f"{graph.contract.name}{label.format(plan.target.name)}"
            made_of = engine_digest(plan, graph)
            if not force and (same := find_engine(made_of)):
                with watches[folder].task(f"take {name} from {same.name}"), suppress(OSError, BundleError):
                    return take_engine(same, graph.contract.name, folders[folder]), made_of
            task = watches[folder].task(f"build {name}")
            args = graph, plan.target, folders[folder] / "engines", plan.options
            return schedule.call_beside(memory_for_engine(graph), task, plan.backend.build, *args), made_of

        def written(graph: ExportedGraph) -> None:
            for folder in builders.values():
                (folders[folder] / "engines").mkdir(exist_ok=True)
                name = graph.contract.name
                engines[folder][name] = schedule.beside("engines", build_engine, graph, folder)

        with exported(plan, folders[first], schedule, report, written) as export:
            for folder, plan in missing.items():
                same = builders[engines_of(plan)]
                with reporting_full_disk(folder.parent):
                    built = {name: engine.result() for name, engine in engines[same].items()}
                if same != folder:
                    copy_engines(folders[same], folders[folder])
                stages = [
                    replace(stage, file=path.relative_to(folders[same]).as_posix(), made_of=made_of)
                    for stage in export.manifest.stages
                    for path, made_of in [built[stage.contract.name]]
                ]
                name = label.format(plan.target.name)
                finish_bundle(folders[folder], export, plan, stages, schedule, watches[folder], name)


def scheduling_of(plan: Plan) -> AbstractContextManager[Schedule]:
    """Returns what calls the functions of a plan's build, as a context manager."""
    modules, memory = HEAVY if plan.export else (), estimate_plan(plan).memory_bytes
    return scheduling(plan.source.is_large, memory, modules)


def copy_engines(same: Path, folder: Path) -> None:
    """Makes hard links in a bundle's folder to the engines of one with identical engines."""
    shutil.copytree(same / "engines", folder / "engines", copy_function=link_or_copy)


def check_room(plans: Sequence[Plan]) -> None:
    """Raises LcmCompileError if the disk has no room to build all of these plans."""
    check_space(plans[0].folder, disk_for([estimate_plan(plan) for plan in plans]))


def engines_of(plan: Plan) -> tuple[str | None, ...]:
    """Returns what engines depend on besides their graphs. It can be equal for two targets: A10 and A10G.

    It is for all targets of one command whose backend builds one engine for several compute capabilities.
    """
    key = plan.key
    capability = None if plan.backend_name in FOR_SEVERAL else plan.target.compute_capability
    return plan.backend_name, key["backend version"], key["builder options"], capability


def engine_digest(plan: Plan, graph: ExportedGraph) -> str:
    """Returns the sha256 of all that an engine depends on: its graph with the weights, and what builds it."""
    found = [graph.contract.name, graph.precision.value, plan.key["lcm-compile"], *engines_of(plan)]
    for path in (graph.path, graph.weights):
        if path.exists():
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def finish_bundle(
    folder: Path,
    export: Export,
    plan: Plan,
    stages: Sequence[StageFile],
    schedule: Schedule,
    watch: Stopwatch,
    label: str = "",
) -> None:
    """Makes a bundle of a folder of engines: adds the tokenizers, the proof and the manifest.

    `stages` name the engines, by paths relative to the folder. `label` is added to the names of the tasks of
    `watch`. Raises ParityError if the engines run on this machine and do not compute what torch computes.
    """
    graphs = export.manifest
    for name in ("tokenizers", "proof"):
        shutil.copytree(export.folder / name, folder / name)
    runs, figures = plan.backend.cannot_run(plan.target) is None, graphs.parity
    if not runs:
        figures = {name: replace(f, checked=f"{f.checked}; {NOT_RUN}") for name, f in figures.items()}
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
        parity=figures,
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
    if runs:
        manifest.write(folder)  # verify loads the bundle, and loading reads the manifest
        task = watch.task(f"check the engines{label}")
        size = max(memory_for_engine(export.graph(stage)) for stage in graphs.stages)
        figures = schedule.call(size, task, verify.verify, EngineBundle(folder, manifest, ""))
        parity.require(figures)
        manifest = replace(manifest, parity={**manifest.parity, **figures})
    replace(manifest, costs={**graphs.costs, **watch.costs}).write(folder)
