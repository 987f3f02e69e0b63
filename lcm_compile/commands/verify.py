"""`verify`: replays a bundle's proof on its engines on this machine."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lcm_compile.commands.options import json_option, quiet_option
from lcm_compile.errors import ParityError

if TYPE_CHECKING:
    from lcm_compile.bundles.bundle import EngineBundle
    from lcm_compile.bundles.manifest import Parity


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--bisect", is_flag=True, help="Find the first layer of each engine whose result differs.")
@click.option(
    "--graphs",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="With --bisect: the export to compare with. Only bundles for onnxruntime can do without.",
)
@json_option
@quiet_option
def verify(bundle: Path | None, bisect: bool, graphs: Path | None, as_json: bool) -> None:
    """Check that a bundle computes what torch does; exit 3 if not.

    The inputs and outputs that torch recorded at the build are replayed on the engines, on this machine.
    """
    from lcm_compile.bundles.bundle import open_bundle
    from lcm_compile.bundles.sizes import further_sizes
    from lcm_compile.commands.find_bundle import find_bundle
    from lcm_compile.output.console import note, print_json
    from lcm_compile.output.reports import print_parity
    from lcm_compile.proof.parity import require
    from lcm_compile.proof.verify import verify as verify_bundle

    if graphs is not None and not bisect:
        raise click.UsageError("--graphs needs --bisect.")
    found = find_bundle(bundle, None, None)
    if bisect:
        note(f"verifying {found.folder}")
        bisect_layers(found, graphs, as_json)
        return
    figures: dict[str, Parity] = {}
    for one in (found, *map(open_bundle, further_sizes(found.folder))):
        note(f"verifying {one.folder}")
        size = "" if one is found else f"{one.folder.name} "
        figures |= {size + name: figure for name, figure in verify_bundle(one).items()}
    if as_json:
        passed = all(figure.passed for figure in figures.values())
        stages = {name: {**figure.to_dict(), "passed": figure.passed} for name, figure in figures.items()}
        print_json({"bundle": str(found.folder), "passed": passed, "parity": stages})
    else:
        print_parity(figures)
    if not figures:
        note("nothing was compared, because the proof is of another batch; the picture is not flat")
    try:
        require(figures)
    except ParityError as error:
        error.hint = f"{found.manifest.spec.command()} --force"
        raise


def bisect_layers(bundle: EngineBundle, graphs: Path | None, as_json: bool) -> None:
    """Prints each stage's first layer that differs. Raises ParityError if a stage's outputs do."""
    from lcm_compile.bundles.export_manifest import open_export
    from lcm_compile.output.console import print_json
    from lcm_compile.proof.bisect import bisect

    export = None if graphs is None else open_export(graphs)
    found = {}
    for name, stage in bisect(bundle, export):
        found[name] = stage
        if not as_json:
            print(textwrap.fill(f"{name}: {stage}", 79, subsequent_indent="  "))
    failed = [name for name, stage in found.items() if not stage.passed]
    if as_json:
        stages = {name: {**asdict(stage), "passed": stage.passed} for name, stage in found.items()}
        print_json({"bundle": str(bundle.folder), "passed": not failed, "bisected": stages})
    if failed:
        raise ParityError(
            f"the engines do not compute what torch does: {', '.join(failed)}",
            f"{bundle.manifest.spec.command()} --force, or another --backend",
        )
