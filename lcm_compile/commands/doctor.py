"""`doctor`: shows which backends work on this machine."""

from __future__ import annotations

import click

from lcm_compile.commands.options import json_option


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show which backends work here, by computing with each."""
    from lcm_compile.builder.doctor import diagnose
    from lcm_compile.output.console import BuildProgress, print_json, print_table

    with BuildProgress() as progress:
        found = diagnose(progress)
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
