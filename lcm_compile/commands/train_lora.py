"""`train-lora`: makes a LoRA of a subject or a style, by DreamBooth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lcm_compile.commands.training_options import follow, print_size, training_options, wanted
from lcm_compile.output.console import note


@click.command()
@click.option("--base", required=True, metavar="BASE", help="The model to teach: demo, a family or a folder.")
@click.option("--out", type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option("--data", metavar="DIR|demo", help="A folder of 16 to 50 pictures of the subject or style.")
@click.option(
    "--prompt", metavar="TEXT", help="Caption of pictures that have none, such as: a photo of sks dog."
)
@click.option("--modules", default="attention", show_default=True, help="Modules to adapt: attention or all.")
@click.option(
    "--prior-data",
    metavar="DIR",
    help="A folder of class pictures, so that the base does not forget the class.",
)
@click.option(
    "--prior-prompt",
    metavar="TEXT",
    help="Caption of class pictures that have none, such as: a photo of a dog.",
)
@click.option(
    "--prior-images",
    type=int,
    default=0,
    metavar="N",
    help="Let the base draw class pictures until there are N.",
)
@click.option(
    "--prior-weight",
    type=float,
    default=1.0,
    show_default=True,
    help="Weight of the class pictures in the loss.",
)
@click.option(
    "--snr-gamma", type=float, metavar="GAMMA", help="Weight timesteps by min-SNR; 1 to 5 helps with a style."
)
@training_options(steps=500, rank=4, batch=1)
def train_lora(out: Path | None, resume: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Teach a base a subject or a style: DreamBooth with a LoRA."""
    from lcm_compile.training.count import count_lora
    from lcm_compile.training.dreambooth import MODULES, StyleSpec
    from lcm_compile.training.dreambooth import train_lora as start

    spec = StyleSpec(**options)
    if dry_run:
        print_size(count_lora(spec.base, spec.rank, MODULES[spec.modules]), as_json)
        return
    out = wanted(out)
    progress = start(spec, out, resume, note)
    next_command = f"lcm-compile build --base {spec.base} --gpu cpu --lora {out}"
    follow(progress, out, "training", "lora", next_command, as_json)
