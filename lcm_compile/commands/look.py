"""The commands that change nothing: `verify`, `inspect`, `targets`, `doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from lcm_compile.commands.options import json_option, quiet_option
from lcm_compile.errors import ParityError


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@json_option
@quiet_option
def verify(bundle: Path | None, as_json: bool, quiet: bool) -> None:
    """Replay a bundle's proof on its engines here; exit 3 on a miss."""
    from lcm_compile.console import note, print_json
    from lcm_compile.lookup import find_bundle
    from lcm_compile.proof.parity import require
    from lcm_compile.proof.verify import verify as verify_bundle
    from lcm_compile.reports import print_parity

    found = find_bundle(bundle, None, None)
    note(f"verifying {found.folder}", quiet)
    figures = verify_bundle(found)
    if as_json:
        passed = all(figure.passed for figure in figures.values())
        stages = {name: {**figure.to_dict(), "passed": figure.passed} for name, figure in figures.items()}
        print_json({"bundle": str(found.folder), "passed": passed, "parity": stages})
    else:
        print_parity(figures)
    try:
        require(figures)
    except ParityError as error:
        error.hint = f"{found.manifest.spec.command()} --force"
        raise


@click.command()
@click.argument("name")
@click.option("--base", metavar="BASE", help="Hold a LoRA to this base: its modules and its weights.")
@json_option
def inspect(name: str, base: str | None, as_json: bool) -> None:
    """Tell what a bundle, a LoRA or a checkpoint is."""
    from lcm_compile.console import print_json
    from lcm_compile.inspection import examine
    from lcm_compile.reports import print_checkpoint, print_description, print_lora

    data = examine(name, base)
    if as_json:
        print_json(data)
    elif "lora" in data:
        print_lora(data)
    elif "components" in data:
        print_checkpoint(data)
    else:
        print_description(name, data)


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the GPUs that engines are built for."""
    from lcm_compile.console import print_json, print_table
    from lcm_compile.targets import GIB, TARGETS

    if as_json:
        print_json([target.to_dict() for target in TARGETS.values()])
        return
    print_table(
        ("target", "device", "capability", "memory", "computes in"),
        [
            (
                t.name,
                t.description,
                t.compute_capability or "",
                f"{t.memory_bytes // GIB} GiB" if t.memory_bytes else "",
                " ".join(t.precisions),
            )
            for t in TARGETS.values()
        ],
    )


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Find out which backends work here, by computing with each."""
    from lcm_compile.builder.doctor import examine
    from lcm_compile.console import Parts, print_json, print_table

    with Parts() as parts:
        found = examine(parts)
    if as_json:
        print_json([diagnosis.to_dict() for diagnosis in found])
        return
    print_table(
        ("backend", "version", "runs here", "builds for", "ms on this CPU", "why"),
        [
            (
                d.backend,
                (d.version or "").split(" ")[-1] or "missing",
                "yes" if d.runs else "no",
                f"{len(d.builds_for)} targets"
                if len(d.builds_for) > 1
                else "".join(d.builds_for) or "nothing",
                "" if d.milliseconds is None else f"{d.milliseconds:.1f}",
                d.reason,
            )
            for d in found
        ],
    )
