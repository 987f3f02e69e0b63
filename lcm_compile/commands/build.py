"""`build`: the heavy modules are imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lcm_compile.commands.options import base_options, base_settings, json_option, quiet_option


@click.command()
@base_options
@click.option("--gpu", required=True, metavar="TARGET", help="See lcm-compile targets.")
@click.option("--height", type=int, help="Pixels; default: the checkpoint's size.")
@click.option("--width", type=int, help="Pixels; default: the checkpoint's size.")
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures in one call of the engines.")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, fp16 or bf16.")
@click.option("--backend", default="auto", show_default=True, help="auto, or one of lcm-compile doctor.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle; default: the store.")
@click.option("--force", is_flag=True, help="Build even if this very bundle exists.")
@click.option("--dry-run", is_flag=True, help="Print what would be done and why, and stop.")
@json_option
@quiet_option
def build(
    gpu: str,
    height: int | None,
    width: int | None,
    batch: int,
    precision: str,
    backend: str,
    out: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **base: Any,
) -> None:
    """Build a bundle of engines."""
    from lcm_compile.compile import build_planned
    from lcm_compile.console import Parts, note, print_json
    from lcm_compile.plan import make_plan
    from lcm_compile.reports import describe_bundle, print_plan, told_parity
    from lcm_compile.spec import BuildSpec

    spec = BuildSpec(
        gpu=gpu,
        height=height,
        width=width,
        batch=batch,
        precision=precision,
        backend=backend,
        **base_settings(**base),
    )
    plan = make_plan(spec, out, force)
    for told in () if plan.hit else plan.checkpoint.notes:
        note(told, quiet)
    if dry_run:
        if as_json:
            print_json(plan.to_dict())
        else:
            print_plan(plan)
        return
    note(f"{'hit' if plan.hit else 'miss'}: {'; '.join(plan.reasons)}".replace(":;", ":"), quiet)
    with Parts(quiet) as parts:
        followed, bundle = build_planned(spec, out, force, parts)
    if followed.hit and not plan.hit:
        note(f"hit: another process built it; {'; '.join(followed.reasons)}", quiet)
    plan = followed
    if as_json:
        described = describe_bundle(bundle.folder, bundle.manifest, bundle.digest)
        print_json({**described, "hit": plan.hit, "reasons": list(plan.reasons)})
        return
    print(bundle.folder)
    if not plan.hit:
        note(f"built in {parts.seconds:.1f} s; {told_parity(bundle.manifest.parity)}", quiet)
