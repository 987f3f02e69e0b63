"""`verify`: replays a bundle's proof on its engines on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from lcm_compile.commands.options import json_option, quiet_option
from lcm_compile.errors import ParityError


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@json_option
@quiet_option
def verify(bundle: Path | None, as_json: bool) -> None:
    """Check that a bundle computes what torch does; exit 3 if not.

    The inputs and outputs that torch recorded at the build are replayed on the engines, on this machine.
    """
    from lcm_compile.commands.find_bundle import find_bundle
    from lcm_compile.output.console import note, print_json
    from lcm_compile.output.reports import print_parity
    from lcm_compile.proof.parity import require
    from lcm_compile.proof.verify import verify as verify_bundle

    found = find_bundle(bundle, None, None)
    note(f"verifying {found.folder}")
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
