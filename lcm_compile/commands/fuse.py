"""`fuse`: writes a base with its LoRAs merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lcm_compile.commands.options import base_options, base_settings, quiet_option


@click.command()
@base_options
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="A new folder, or a .safetensors file."
)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Type of the written weights.",
)
@quiet_option
def fuse(out: Path, precision: str, **base: Any) -> None:
    """Write a base with its LoRAs merged into the weights.

    The output is a folder in the layout of diffusers, or one file for webui and ComfyUI.
    """
    from lcm_compile.lora.fuse import fuse as write_fused
    from lcm_compile.output.console import BuildProgress, note
    from lcm_compile.output.reports import loss_lines, skip_lines
    from lcm_compile.spec import BuildSpec

    with BuildProgress() as progress:
        checkpoint, loras = write_fused(BuildSpec(**base_settings(**base)), out, precision, progress)
    print(out)
    for remark in (
        *checkpoint.notes,
        *loss_lines(checkpoint.lossy),
        *skip_lines([lora.to_dict() for lora in loras]),
    ):
        note(remark)
    # The absolute path, because a bare name may be that of a family.
    ordinary = " --no-lcm" if base["no_lcm"] and base["few_step"] is None else ""
    note(f"lcm-compile build --base {out.resolve()}{ordinary} --gpu … builds engines of it")
