"""`inspect`: shows what a bundle, a LoRA, a checkpoint, a ControlNet or a T2I-Adapter is."""

from __future__ import annotations

import click

from lcm_compile.commands.options import json_option, lora_skip_option


@click.command()
@click.argument("name")
@click.option("--base", metavar="BASE", help="Compare a LoRA with the modules and weights of this base.")
@lora_skip_option
@json_option
def inspect(name: str, base: str | None, lora_skip: tuple[str, ...], as_json: bool) -> None:
    """Show what a bundle, a LoRA, a checkpoint, a ControlNet or a T2I-Adapter is."""
    from lcm_compile.output.console import print_json
    from lcm_compile.output.describe import describe
    from lcm_compile.output.reports import print_checkpoint, print_description, print_lora

    data = describe(name, base, lora_skip)
    if as_json:
        print_json(data)
    elif "lora" in data:
        print_lora(data)
    elif "components" in data:
        print_checkpoint(data)
    else:
        print_description(name, data)
