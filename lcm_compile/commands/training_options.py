"""What `distill` and `train-lora` share: their options, and following a training to its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lcm_compile.commands.options import json_option, quiet_option
from lcm_compile.errors import LcmCompileError
from lcm_compile.output.console import Bar, note, print_json

if TYPE_CHECKING:
    from lcm_compile.training.count import Size
    from lcm_compile.training.loop import Progress

LOSSES_MEANT = 50
INTERRUPTED = 130


def training_options(steps: int, rank: int, batch: int) -> Callable[[Any], Any]:
    """The options that distill and train-lora share, with the defaults that they do not."""
    options = [
        click.option("--steps", type=int, default=steps, show_default=True, help="Of the optimiser."),
        click.option("--rank", type=int, default=rank, show_default=True),
        click.option("--lr", type=float, default=1e-4, show_default=True),
        click.option(
            "--batch",
            type=int,
            default=batch,
            show_default=True,
            help="Pictures at once on each device; a step takes batch × accumulation × devices of them.",
        ),
        click.option(
            "--gradient-accumulation",
            type=int,
            default=1,
            show_default=True,
            help="Batches a step: more pictures in the same memory.",
        ),
        click.option("--gradient-checkpointing", is_flag=True, help="Less memory, and slower by a third."),
        click.option(
            "--mixed-precision",
            default="auto",
            show_default=True,
            help="auto (bf16 on a GPU), no, bf16 or fp16.",
        ),
        click.option(
            "--ema", type=float, default=0.0, metavar="DECAY", help="Write a running mean of the weights."
        ),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option(
            "--save-every",
            type=int,
            default=100,
            show_default=True,
            metavar="STEPS",
            help="What a killed training loses at most.",
        ),
        click.option("--resume", is_flag=True, help="Go on from the state beside --out."),
        click.option("--dry-run", is_flag=True, help="Count what would be trained, and stop."),
        json_option,
        quiet_option,
    ]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def wanted(out: Path | None) -> Path:
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    return out


def print_size(size: Size, as_json: bool) -> None:
    if as_json:
        print_json(asdict(size))
        return
    print(f"{size.trainable_parameters / 1e6:.1f} M trainable parameters")
    if size.modules:
        print(f"{size.modules} adapted modules")
    print(f"{size.file_bytes / 1e6:.1f} MB to be written")
    print(f"{size.unet_parameters / 1e6:.1f} M parameters of the UNet")


def follow(
    progress: Generator[Progress, None, Path],
    out: Path,
    doing: str,
    written: str,
    next_command: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Trains to the end, showing the loss, and prints what is written."""
    from accelerate import PartialState

    from lcm_compile.training.state import state_path

    main = PartialState().is_main_process
    quiet = quiet or not main
    losses: list[float] = []
    try:
        with Bar(doing, quiet) as bar:
            for done in progress:
                losses = done.losses
                recent = sum(losses[-LOSSES_MEANT:]) / len(losses[-LOSSES_MEANT:])
                bar.update(done.step, done.total, f"loss {recent:.4f}")
                if done.step % LOSSES_MEANT == 0 and not sys.stderr.isatty():
                    note(f"step {done.step}/{done.total} loss {recent:.4f}", quiet)
    except KeyboardInterrupt as stop:
        if not state_path(out).is_file():
            raise
        error = LcmCompileError(
            f"interrupted; {state_path(out)} holds the last save", "the same with --resume"
        )
        error.exit_code = INTERRUPTED
        raise error from stop
    if not main:
        return
    if as_json:
        print_json({written: str(out), "steps": len(losses), "loss": losses})
    else:
        print(out)
        note(next_command, quiet)
