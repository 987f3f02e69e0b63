"""`build`: builds a bundle of engines, or one for each target."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lcm_compile.commands.options import base_options, base_settings, graph_options, json_option, quiet_option
from lcm_compile.errors import Interrupted

if TYPE_CHECKING:
    from lcm_compile.builder.plan import ExportPlan, Plan
    from lcm_compile.bundles.bundle import EngineBundle


# How many times as fast bf16 must be for `build` to tell of it.
WORTH_TELLING = 1.1


def read_sizes(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> list[tuple[int, int]]:
    """Returns sizes such as `512x768`, without those that are given twice. Raises BadParameter for others."""
    found: dict[tuple[int, int], None] = {}
    for text in texts:
        numbers = re.fullmatch(r"\s*(\d{1,6})\s*[x×]\s*(\d{1,6})\s*", text)
        if numbers is None:
            raise click.BadParameter(f"{text!r} is not HEIGHTxWIDTH, in pixels")
        found[int(numbers[1]), int(numbers[2])] = None
    return [*found]


@click.command()
@base_options
@click.option("--from", "graphs", type=click.Path(path_type=Path), help="Build from this export, not --base.")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="TARGET",
    help="A name from lcm-compile targets; repeatable.",
)
@graph_options
@click.option("--backend", default="auto", show_default=True, help="auto, or a name from lcm-compile doctor.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the bundle; by default one in the store."
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="HEIGHTxWIDTH",
    callback=read_sizes,
    help="A size of pictures in pixels; several are in one bundle; repeatable.",
)
@click.option("--into", type=click.Path(path_type=Path), help="Add each --size to this bundle.")
@click.option(
    "--on",
    type=click.Choice(["ray"]),
    help="Build on a node of the Ray cluster that has the GPU, and copy the bundle here.",
)
@click.option("--force", is_flag=True, help="Build even if this bundle exists already.")
@click.option("--dry-run", is_flag=True, help="Print what would be built and why, then stop.")
@json_option
@quiet_option
@click.pass_context
def build(
    context: click.Context,
    graphs: Path | None,
    gpus: tuple[str, ...],
    backend: str,
    out: Path | None,
    sizes: list[tuple[int, int]],
    into: Path | None,
    on: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **model: Any,
) -> None:
    """Build a bundle of engines, or several: one for each --gpu.

    The model is fused and exported once for all of them. With --from the build starts from graphs that
    lcm-compile export has written, perhaps on another machine. A bundle draws pictures of each --size, the
    first one by default; --into adds sizes to a bundle, and nothing else of it changes.
    """
    from lcm_compile.builder.build import build_plans, plan_size
    from lcm_compile.output.console import BuildProgress, note

    if into is not None:
        add_sizes(context, into, sizes, force, dry_run, as_json)
        return
    if not gpus:
        raise click.UsageError("Missing option '--gpu'.")
    if graphs is not None:
        refuse_model_options(context)
    if sizes:
        if model["height"] is not None or model["width"] is not None:
            raise click.UsageError("--size and --height or --width can't be given together")
        model["height"], model["width"] = sizes[0]
    if on is not None:
        if graphs is not None or dry_run or len(sizes) > 1:
            raise click.UsageError(
                "--on ray builds one size from --base; it takes no --from and no --dry-run"
            )
        show_bundles(*built_on_ray(gpus, backend, out, force, model), as_json)
        return
    plans = make_plans(graphs, gpus, backend, out, force, model)
    if (export := plans[0].export) and not plans[0].hit:
        from lcm_compile.output.reports import licence_line, loss_lines

        remarks = *export.checkpoint.notes, *loss_lines(export.lossy), licence_line(export)
        for remark in (*remarks, *other_methods(export), bf16_remark(plans[0], dry_run)):
            if remark:
                note(remark)
    planned = [*plans, *(further for plan in plans for further in further_plans(plan, sizes))]
    if dry_run:
        check_additions(plans)
        show_plans(planned, as_json)
        return
    for plan in planned:
        note_reasons(plan)
    note_memory(planned)
    with BuildProgress() as progress:
        try:
            built = build_plans(plans, force, progress)
            folders = [bundle.folder for _, bundle in built]
            for height, width in sizes[1:]:
                sized = [plan_size(folder, height, width, force) for folder in folders]
                built += build_plans(sized, force, progress)
        except KeyboardInterrupt as stop:
            done = [str(plan.folder) for plan in plans if not plan.hit and is_built(plan)]
            if not done:
                raise
            raise Interrupted(f"interrupted; these bundles are complete: {', '.join(done)}") from stop
    for plan, (followed, _) in zip(plans, built, strict=False):  # the further sizes come after them
        if followed.hit and not plan.hit:
            note(f"hit: another process built it; {'; '.join(followed.reasons)}")
    show_bundles(built, progress.seconds, as_json)


def built_on_ray(
    gpus: Sequence[str], backend: str, out: Path | None, force: bool, model: Mapping[str, Any]
) -> tuple[list[tuple[None, EngineBundle]], float]:
    """Builds a bundle for each target on a node that has it. Returns them, and the seconds that it took."""
    from lcm_compile.builder.on_ray import build_on_ray
    from lcm_compile.output.console import BuildProgress
    from lcm_compile.spec import BuildSpec

    built: list[tuple[None, EngineBundle]] = []
    with BuildProgress() as progress:
        for name, folder in outs(gpus, out).items():
            spec = BuildSpec(gpu=name, backend=backend, **base_settings(**model))
            built.append((None, build_on_ray(spec, folder, force=force, report=progress)))
    return built, progress.seconds


def outs(gpus: Sequence[str], out: Path | None) -> dict[str, Path | None]:
    """Returns the folder of each target's bundle, by the target's name: of several, `out/<target>`."""
    from lcm_compile.targets import find_target

    names = list(dict.fromkeys(find_target(gpu).name for gpu in gpus))
    return {name: out / name if out is not None and len(names) > 1 else out for name in names}


def beside(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names but one."""
    return tuple(other for other in names if other != name)


def further_plans(plan: Plan, sizes: Sequence[tuple[int, int]]) -> list[Plan]:
    """Returns the plans of the sizes after the first, of a bundle that may not be there yet."""
    from lcm_compile.builder.plan import make_plan
    from lcm_compile.bundles.sizes import size_folder

    return [
        make_plan(replace(plan.spec, height=height, width=width), size_folder(plan.folder, height, width))
        for height, width in sizes[1:]
    ]


def add_sizes(
    context: click.Context,
    into: Path,
    sizes: Sequence[tuple[int, int]],
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Builds sizes into a bundle, or shows what would be built.

    Raises click.UsageError for any option that says what to build, and BundleError if the bundle is out of
    date.
    """
    from lcm_compile.builder.build import build_plans, plan_size
    from lcm_compile.bundles.sizes import first_of
    from lcm_compile.output.console import BuildProgress

    refuse_model_options(context, "--into", {"into", "sizes", "force", "dry_run", "as_json", "quiet"})
    if not sizes:
        raise click.UsageError("--into adds sizes to a bundle: give it a --size HEIGHTxWIDTH")
    bundle = first_of(into)
    plans = [plan_size(bundle, height, width, force) for height, width in sizes]
    if dry_run:
        show_plans(plans, as_json)
        return
    for plan in plans:
        note_reasons(plan)
    note_memory(plans)
    with BuildProgress() as progress:
        built = build_plans(plans, force, progress)
    show_bundles(built, progress.seconds, as_json)


def bf16_remark(plan: Plan, dry_run: bool) -> str | None:
    """Returns what bf16 would gain where fp32 was not asked for, or None.

    It is measured only before a large model is built: a small one takes less time than measuring.
    """
    from lcm_compile.builder.fastest_backend import bf16_gain
    from lcm_compile.output.console import BuildProgress

    export = plan.export
    if export is None or not plan.target.is_cpu or plan.spec.precision != "auto":
        return None
    with BuildProgress() as progress:
        gain = bf16_gain(export.is_large and not dry_run, progress)
    if gain is None or gain < WORTH_TELLING:
        return None
    return (
        f"in fp32, as on every CPU; this one computes a small network {gain:.1f} × as fast in bf16 "
        "(--precision bf16), whose pictures differ slightly"
    )


def other_methods(export: ExportPlan) -> list[str]:
    """Returns a warning for each LoRA that is of another few-step method than it is fused as, by its looks.

    Raises LoraError if a LoRA can't be read.
    """
    from lcm_compile.lora.few_step_method import few_step_method
    from lcm_compile.lora.read import read_lora

    found = []
    fused_as = export.few_step.method if export.few_step else None
    for planned in export.loras:
        looks = few_step_method(read_lora(planned.path, export.spec.lora_skip), planned.sha256)
        if looks is None or looks.sure == "possible":
            continue
        option = ":".join(filter(None, (looks.method, looks.variant)))
        if looks.unsupported:
            found.append(f"warning: {planned.spec.source} is {looks.unsupported} ({looks.because})")
        elif planned.role == "style" or looks.method != fused_as:
            found.append(
                f"warning: {planned.spec.source} is a {looks.method} LoRA ({looks.because}); "
                f"--few-step {option} --few-step-lora {planned.spec.source} fuses it as one"
            )
    return found


def is_built(plan: Plan) -> bool:
    """Returns whether the bundle of a plan is there, with the plan's key."""
    from lcm_compile.bundles.manifest import read_manifest
    from lcm_compile.errors import BundleError

    try:
        return read_manifest(plan.folder)[0].key == plan.key
    except BundleError:
        return False


def make_plans(
    graphs: Path | None,
    gpus: Sequence[str],
    backend: str,
    out: Path | None,
    force: bool,
    model: Mapping[str, Any],
) -> list[Plan]:
    """Returns one plan for each target. With several targets, each bundle goes to `out/<target>`.

    Raises UsageError, CheckpointError or LoraError if a bundle can't be planned.
    """
    from lcm_compile.builder.plan import make_plan, make_plan_from
    from lcm_compile.bundles.export_manifest import open_export
    from lcm_compile.output.console import BuildProgress
    from lcm_compile.spec import BuildSpec

    folders = outs(gpus, out)
    with BuildProgress() as progress:
        if graphs is not None:
            export = open_export(graphs)
            return [
                make_plan_from(export, name, backend, folder, force, progress, beside(name, folders))
                for name, folder in folders.items()
            ]
        settings = base_settings(**model)
        specs = [BuildSpec(gpu=g, beside=beside(g, folders), backend=backend, **settings) for g in folders]
        return [make_plan(spec, folders[spec.gpu], force, progress) for spec in specs]


def check_additions(plans: Sequence[Plan]) -> None:
    """Raises LoraError or CheckpointError if a LoRA or a textual inversion does not fit the base.

    All the plans have the same.
    """
    missed = next((plan.export for plan in plans if plan.export and not plan.hit), None)
    if missed and missed.adds_to_base:
        from lcm_compile.builder.export import check_fit
        from lcm_compile.builder.prepared import LoraFiles

        check_fit(missed, LoraFiles(missed))


def note_memory(plans: Sequence[Plan]) -> None:
    """Warns if a build takes more memory than this machine or container has left: it may be killed."""
    from lcm_compile.builder.estimate import estimate_plan
    from lcm_compile.output.console import note, size_text
    from lcm_compile.output.reports import lacks_memory

    costs = [estimate_plan(plan) for plan in plans if not plan.hit]
    most = max(costs, key=lambda cost: cost.memory_bytes, default=None)
    if most and (lack := lacks_memory(most)):
        note(
            f"warning: the build takes about {size_text(most.memory_bytes)} of memory, and {lack}",
            always=True,
        )


def show_plans(plans: Sequence[Plan], as_json: bool) -> None:
    """Prints each plan for --dry-run, with an estimate of the build's time, memory and disk space."""
    from lcm_compile.builder.estimate import estimate_plan
    from lcm_compile.output.console import print_json
    from lcm_compile.output.reports import print_plan

    costs = [None if plan.hit else estimate_plan(plan) for plan in plans]
    if as_json:
        rows = [
            {**plan.to_dict(), "estimate": cost and cost.to_dict()}
            for plan, cost in zip(plans, costs, strict=True)
        ]
        print_json(rows if len(rows) > 1 else rows[0])
        return
    for plan, cost in zip(plans, costs, strict=True):
        print_plan(plan, cost)


def note_reasons(plan: Plan) -> None:
    """Writes to stderr why a plan is a hit or a miss, and why its backend was chosen."""
    from lcm_compile.builder.key import briefly
    from lcm_compile.output.console import note

    kind = "hit" if plan.hit else "miss"
    note(f"{kind}: {'; '.join(briefly(plan.reasons))}".replace(":;", ":"))
    if plan.passed_over and not plan.hit:
        note(backend_text(plan.backend_name, plan.passed_over))


def show_bundles(built: Sequence[tuple[Plan | None, EngineBundle]], seconds: float, as_json: bool) -> None:
    """Prints each bundle's folder, or its complete description as JSON; writes hints to stderr.

    A bundle has no plan here if another machine built it.
    """
    from lcm_compile.output.console import note, print_json
    from lcm_compile.output.describe import describe_bundle
    from lcm_compile.output.reports import fp32_layer_lines, parity_line, skip_lines

    if as_json:
        rows = [
            {
                **describe_bundle(b.folder, b.manifest, b.digest),
                **({} if p is None else {"hit": p.hit, "reasons": list(p.reasons)}),
            }
            for p, b in built
        ]
        print_json(rows if len(rows) > 1 else rows[0])
        return
    for _, bundle in built:
        print(bundle.folder)
    new = [bundle for plan, bundle in built if plan is None or not plan.hit]
    if new:
        note(f"built in {seconds:.1f} s; {parity_line(new[0].manifest.parity)}")
    for remark in skip_lines(new[0].manifest.loras) if new else ():
        note(remark)
    for bundle in new:
        for remark in fp32_layer_lines(bundle.manifest.stages):
            note(f"{remark}: lcm-compile inspect {shlex.quote(str(bundle.folder))}")


def backend_text(name: str, passed_over: Iterable[str]) -> str:
    """Returns lines that name the chosen backend, and say why each preferred one was not chosen."""
    lines = [textwrap.fill(why, 79, initial_indent="  not ", subsequent_indent="    ") for why in passed_over]
    return "\n".join((f"backend {name}", *lines))


FREE = {"graphs", "gpus", "backend", "out", "on", "force", "dry_run", "as_json", "quiet"}


def refuse_model_options(context: click.Context, by: str = "--from", free: Collection[str] = FREE) -> None:
    """Raises click.UsageError for an option whose value an export, or a bundle, has fixed already.

    `by` is the option that names that, and `free` are those that may be given with it.
    """
    fixed = "the export" if by == "--from" else "the bundle"
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in free:
            raise click.UsageError(
                f"{parameter.opts[0]} and {by} can't be given together: {fixed} has fixed it"
            )
