"""`targets`: lists the devices that engines can be built for."""

from __future__ import annotations

import click

from lcm_compile.commands.options import json_option


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the devices that engines can be built for."""
    from lcm_compile.output.console import print_json, print_table
    from lcm_compile.targets import GIB, RTX, TARGETS

    listed = (*TARGETS.values(), RTX)
    if as_json:
        print_json([target.to_dict() for target in listed])
        return
    print_table(
        ("target", "device", "capability", "memory", "computes in"),
        [
            (
                t.name,
                t.description,
                "several" if t.further_capabilities else t.compute_capability or "",
                f"{t.memory_bytes // GIB} GiB" if t.memory_bytes else "",
                " ".join(t.precisions),
            )
            for t in listed
        ],
    )
