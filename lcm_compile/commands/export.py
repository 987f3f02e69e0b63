"""`export`: writes a model's graphs, for `build --from`, or a bundle's models for Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lcm_compile.commands.options import base_options, base_settings, graph_options, json_option, quiet_option


@click.command()
@click.argument("bundle", required=False, metavar="[[NAME=]BUNDLE]")
@base_options
@graph_options
@click.option(
    "--format", "graph_format", default="onnx", show_default=True, help="onnx, torchscript or torch_export."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the export.")
@click.option(
    "--triton",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write a BUNDLE's stages into a Triton model repository, a model for each.",
)
@click.option(
    "--triton-whole",
    is_flag=True,
    help="Write one model instead, which draws pictures with this package in Triton's Python backend.",
)
@json_option
@quiet_option
def export(
    bundle: str | None,
    graph_format: str,
    out: Path | None,
    triton: Path | None,
    triton_whole: bool,
    as_json: bool,
    **model: Any,
) -> None:
    """Write a model's graphs, for build --from on another machine; or a BUNDLE's models for Triton.

    A machine with enough memory fuses and exports the model, in fp16 unless --precision is given. The GPU
    machine then builds the engines; it needs neither the checkpoint nor much memory.
    """
    if triton is not None or bundle is not None or triton_whole:
        if triton is None or bundle is None or out is not None or model["base"] is not None:
            raise click.UsageError("A repository is of a BUNDLE: lcm-compile export BUNDLE --triton DIR.")
        export_for_triton(bundle, triton, triton_whole, as_json)
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    from lcm_compile.builder.export import export as export_graphs
    from lcm_compile.builder.plan import plan_graphs
    from lcm_compile.bundles.export_manifest import EXPORT
    from lcm_compile.output.console import BuildProgress, note, print_json
    from lcm_compile.output.reports import fp32_layer_lines, loss_lines, parity_line, skip_lines
    from lcm_compile.spec import BuildSpec

    spec = BuildSpec(**base_settings(**model))
    plan = plan_graphs(spec, graph_format)
    for remark in (*plan.checkpoint.notes, *loss_lines(plan.lossy)):
        note(remark)
    with BuildProgress() as progress:
        manifest = export_graphs(spec, out, graph_format, report=progress)
    if as_json:
        print_json({"export": str(out), "parity": {k: v.to_dict() for k, v in manifest.parity.items()}})
        return
    print(out)
    note(f"exported in {progress.seconds:.1f} s; {parity_line(manifest.parity)}")
    for remark in skip_lines(manifest.loras):
        note(remark)
    for remark in fp32_layer_lines(manifest.stages):
        note(f"{remark}: {out / EXPORT} lists them")


def export_for_triton(bundle: str, repository: Path, whole: bool, as_json: bool) -> None:
    """Writes a bundle's models into a model repository of Triton, and prints where they are."""
    from lcm_compile.output.console import note, print_json
    from lcm_compile.serving.catalog import open_catalog
    from lcm_compile.serving.triton import write_repository

    model = open_catalog([bundle]).default
    names = write_repository(model.first, model.name, repository, whole)
    if as_json:
        print_json({"repository": str(repository), "models": names})
        return
    for name in names:
        print(repository / name)
    note(f"tritonserver --model-repository {repository.absolute()} serves {'them' if names[1:] else 'it'}")
