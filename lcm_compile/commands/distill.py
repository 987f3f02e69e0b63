"""`distill`: makes a few-step LoRA, or a complete LCM, from a base, or tunes one to other pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lcm_compile.commands.training_options import follow, print_size, training_options, wanted


@click.command()
@click.option("--base", required=True, metavar="BASE", help="The teacher: demo, a family or a folder.")
@click.option(
    "--method",
    default="lcm",
    show_default=True,
    help="lcm, or tcd: trajectory consistency, for --sampler tcd.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="The .safetensors file to write; with --full a folder."
)
@click.option(
    "--data", metavar="DIR|demo", help="A folder of captioned pictures, or demo (the demo base's default)."
)
@click.option("--full", is_flag=True, help="Train the complete UNet, for an LCM instead of a LoRA.")
@click.option(
    "--finetune", is_flag=True, help="Tune a full LCM, or the LCM-LoRA --lora, to --data without a teacher."
)
@click.option("--lora", metavar="FILE|ID", help="The LoRA that --finetune tunes; its rank stays.")
@click.option("--skip", type=int, default=20, show_default=True, help="Timesteps that one solver step spans.")
@click.option(
    "--guidance-min",
    type=float,
    default=3.0,
    show_default=True,
    help="Lowest guidance w to train with; the guidance scale is 1 + w.",
)
@click.option(
    "--guidance-max", type=float, default=15.0, show_default=True, help="Highest guidance w to train with."
)
@training_options(steps=1000, rank=64, batch=12)
def distill(out: Path | None, resume: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Teach a base to draw in a few steps, with a new LCM-LoRA."""
    from lcm_compile.output.console import note
    from lcm_compile.training.adapters import ADAPTED
    from lcm_compile.training.count import count_full, count_lora, count_tuning
    from lcm_compile.training.distill import DistillSpec
    from lcm_compile.training.distill import distill as start

    spec = DistillSpec(**options)
    if dry_run:
        if spec.finetune:
            size = count_tuning(spec.base, spec.lora, spec.method)
        else:
            size = count_full(spec.base) if spec.full else count_lora(spec.base, spec.rank, ADAPTED)
        print_size(size, as_json)
        return
    out = wanted(out)
    steps = start(spec, out, resume, note)
    # A LoRA is tuned as a LoRA; without one, --finetune has been given a full LCM.
    full = spec.full or (spec.finetune and spec.lora is None)
    doing = "tuning" if spec.finetune else "distilling"
    written = "checkpoint" if full else f"{spec.method}_lora"
    lora = {"lcm": "--lcm-lora", "tcd": "--few-step tcd --few-step-lora"}[spec.method]
    base = f"{out} --gpu cpu --no-lcm" if full else f"{spec.base} --gpu cpu {lora} {out}"
    follow(steps, out, doing, written, f"lcm-compile build --base {base}", as_json)
