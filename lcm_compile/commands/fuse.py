"""`fuse`: the heavy modules are imported inside."""

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
@click.option("--precision", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True)
@quiet_option
def fuse(out: Path, precision: str, quiet: bool, **base: Any) -> None:
    """Write a base with its LoRAs merged: a diffusers folder, or one file for webui and ComfyUI."""
    from lcm_compile.lora.fuse import fuse as write_fused
    from lcm_compile.output.console import BuildProgress, note
    from lcm_compile.spec import BuildSpec

    with BuildProgress(quiet) as parts:
        write_fused(BuildSpec(**base_settings(**base)), out, precision, parts)
    print(out)
    # The whole path: a bare name may be a family's.
    note(f"lcm-compile build --base {out.resolve()} --no-lcm --gpu … builds it", quiet)
