"""`export`: writes a model's graphs, for `build --from`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lcm_compile.commands.options import base_options, base_settings, graph_options, json_option, quiet_option


@click.command()
@base_options
@graph_options
@click.option(
    "--format", "graph_format", default="onnx", show_default=True, help="onnx, torchscript or torch_export."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the export.")
@json_option
@quiet_option
def export(graph_format: str, out: Path, as_json: bool, **model: Any) -> None:
    """Write a model's graphs, for build --from on another machine.

    A machine with enough memory fuses and exports the model, in fp16 unless --precision is given. The GPU
    machine then builds the engines; it needs neither the checkpoint nor much memory.
    """
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
