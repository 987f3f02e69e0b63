"""`build`: a bundle of engines, or one for each target."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from lcm_compile.commands.options import base_options, base_settings, graph_options, json_option, quiet_option


@click.command()
@base_options
@click.option("--from", "graphs", type=click.Path(path_type=Path), help="An export, instead of --base.")
@click.option(
    "--gpu",
    "gpus",
    required=True,
    multiple=True,
    metavar="TARGET",
    help="See lcm-compile targets; repeatable.",
)
@graph_options
@click.option("--backend", default="auto", show_default=True, help="auto, or one of lcm-compile doctor.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle; default: the store.")
@click.option("--force", is_flag=True, help="Build even if this very bundle exists.")
@click.option("--dry-run", is_flag=True, help="Print what would be done and why, and stop.")
@json_option
@quiet_option
@click.pass_context
def build(
    context: click.Context,
    graphs: Path | None,
    gpus: tuple[str, ...],
    backend: str,
    out: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **model: Any,
) -> None:
    """Build a bundle of engines, or with several --gpu one for each.

    The model is fused and exported once for all of them. With --from it was exported before, perhaps on
    another machine: see lcm-compile export.
    """
    from lcm_compile.builder.build import build_targets, build_targets_from
    from lcm_compile.builder.key import briefly
    from lcm_compile.builder.plan import make_plan, make_plan_from
    from lcm_compile.output.console import BuildProgress, note, print_json
    from lcm_compile.output.describe import describe_bundle
    from lcm_compile.output.reports import fp32_layer_lines, loss_lines, parity_line, print_plan
    from lcm_compile.spec import BuildSpec
    from lcm_compile.targets import find_target

    names = list(dict.fromkeys(find_target(gpu).name for gpu in gpus))
    # With several targets, --out is the folder of their bundles' folders.
    outs = [out / name if out is not None and len(names) > 1 else out for name in names]
    with BuildProgress(quiet) as parts:
        if graphs is not None:
            refuse_model_options(context)
            plans = [
                make_plan_from(graphs, n, backend, o, force, parts) for n, o in zip(names, outs, strict=True)
            ]
        else:
            specs = [BuildSpec(gpu=name, backend=backend, **base_settings(**model)) for name in names]
            plans = [make_plan(spec, o, force, parts) for spec, o in zip(specs, outs, strict=True)]
    lead = plans[0]
    if not lead.hit and lead.export is not None:
        checkpoint = lead.export.checkpoint
        for remark in (*checkpoint.notes, *loss_lines(lead.export.lossy)):
            note(remark, quiet)
    if dry_run:
        from lcm_compile.builder.estimate import estimate_plan

        costs = [None if plan.hit else estimate_plan(plan, graphs) for plan in plans]
        if as_json:
            dicts = [
                {**plan.to_dict(), "estimate": cost and cost.to_dict()}
                for plan, cost in zip(plans, costs, strict=True)
            ]
            print_json(dicts if len(dicts) > 1 else dicts[0])
            return
        for plan, cost in zip(plans, costs, strict=True):
            print_plan(plan, cost)
        return
    for plan in plans:
        note(f"{'hit' if plan.hit else 'miss'}: {'; '.join(briefly(plan.reasons))}".replace(":;", ":"), quiet)
        if plan.passed_over and not plan.hit:
            note(backend_text(plan.backend_name, plan.passed_over), quiet)
    with BuildProgress(quiet) as parts:
        if graphs is not None:
            done = build_targets_from(graphs, list(zip(names, outs, strict=True)), backend, force, parts)
        else:
            done = build_targets(list(zip(specs, outs, strict=True)), force, parts)
    for plan, (followed, _) in zip(plans, done, strict=True):
        if followed.hit and not plan.hit:
            note(f"hit: another process built it; {'; '.join(followed.reasons)}", quiet)
    if as_json:
        told = [
            {**describe_bundle(b.folder, b.manifest, b.digest), "hit": p.hit, "reasons": list(p.reasons)}
            for p, b in done
        ]
        print_json(told if len(told) > 1 else told[0])
        return
    for _, bundle in done:
        print(bundle.folder)
    built = [bundle for plan, bundle in done if not plan.hit]
    if built:
        note(f"built in {parts.seconds:.1f} s; {parity_line(built[0].manifest.parity)}", quiet)
    for bundle in built:
        for remark in fp32_layer_lines(bundle.manifest.stages):
            note(f"{remark}: lcm-compile inspect {shlex.quote(str(bundle.folder))}", quiet)


def backend_text(name: str, passed_over: Iterable[str]) -> str:
    """The backend, and a line or two for each that was passed over for it."""
    lines = [textwrap.fill(why, 79, initial_indent="  not ", subsequent_indent="    ") for why in passed_over]
    return "\n".join((f"backend {name}", *lines))


def refuse_model_options(context: click.Context) -> None:
    """UsageError for an option that an export has settled already."""
    free = {"graphs", "gpus", "backend", "out", "force", "dry_run", "as_json", "quiet"}
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in free:
            raise click.UsageError(
                f"{parameter.opts[0]} and --from can't be given together: the export has settled it"
            )
