"""`build`: the heavy modules are imported inside."""

from __future__ import annotations

from pathlib import Path

import click

from lcm_compile.commands.options import json_option, quiet_option


@click.command()
@click.option(
    "--base",
    required=True,
    metavar="BASE",
    help="demo, a family (sdxl, sd15, …), a folder, a file or a hub id.",
)
@click.option("--gpu", required=True, metavar="TARGET", help="See lcm-compile targets.")
@click.option("--weights", metavar="random[:SEED]", help="Random weights of a family's architecture.")
@click.option("--config", metavar="DIR", help="Settings and tokenizers of a base that is one file.")
@click.option("--vae", metavar="VAE", help="In place of the base's: a hub id, a folder or a file.")
@click.option("--lcm-lora", metavar="PATH[:W]", help="The LCM-LoRA; default: the family's own.")
@click.option("--no-lcm", is_flag=True, help="No LCM-LoRA: the base is an LCM already.")
@click.option("--lora", "loras", multiple=True, metavar="PATH[:W]", help="A style LoRA; may be repeated.")
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
    base: str,
    gpu: str,
    weights: str | None,
    config: str | None,
    vae: str | None,
    lcm_lora: str | None,
    no_lcm: bool,
    loras: tuple[str, ...],
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
) -> None:
    """Build a bundle of engines."""
    from lcm_compile.compile import build_planned
    from lcm_compile.console import Parts, note, print_json
    from lcm_compile.plan import make_plan
    from lcm_compile.reports import describe_bundle, print_plan, told_parity
    from lcm_compile.spec import BuildSpec, LoraSpec

    spec = BuildSpec(
        base=base,
        gpu=gpu,
        lcm_lora=LoraSpec.parse(lcm_lora) if lcm_lora is not None else None,
        no_lcm=no_lcm,
        loras=tuple(LoraSpec.parse(lora) for lora in loras),
        height=height,
        width=width,
        batch=batch,
        precision=precision,
        backend=backend,
        weights=weights,
        config=config,
        vae=vae,
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
