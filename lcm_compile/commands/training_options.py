"""The options that `distill` and `train-lora` share, and the loop that runs a training to its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lcm_compile.commands.options import json_option, quiet_option
from lcm_compile.errors import Interrupted
from lcm_compile.output.console import Bar, be_quiet, note, print_json

if TYPE_CHECKING:
    from lcm_compile.training.count import Size
    from lcm_compile.training.loop import Progress

LOSSES_AVERAGED = 50  # last losses in the loss that is shown, and steps between lines of progress


def training_options(steps: int, rank: int, batch: int) -> Callable[[Any], Any]:
    """Returns a decorator that adds the shared options to a command, with the command's own defaults."""
    options = [
        click.option("--steps", type=int, default=steps, show_default=True, help="Optimizer steps."),
        click.option("--rank", type=int, default=rank, show_default=True, help="Rank of the LoRA."),
        click.option("--lr", type=float, default=1e-4, show_default=True, help="Learning rate."),
        click.option(
            "--batch",
            type=int,
            default=batch,
            show_default=True,
            help="Pictures per batch on each device; a step takes batch × accumulation × devices pictures.",
        ),
        click.option(
            "--gradient-accumulation",
            type=int,
            default=1,
            show_default=True,
            help="Batches per step: more pictures in the same memory.",
        ),
        click.option("--gradient-checkpointing", is_flag=True, help="Use less memory; slower by a third."),
        click.option(
            "--mixed-precision",
            default="auto",
            show_default=True,
            help="auto (bf16 on a GPU), no, bf16 or fp16.",
        ),
        click.option(
            "--ema",
            type=float,
            default=0.0,
            metavar="DECAY",
            help="Write a running mean of the weights with this decay.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random."),
        click.option(
            "--save-every",
            type=int,
            default=100,
            show_default=True,
            metavar="STEPS",
            help="Save a state every STEPS steps, for --resume.",
        ),
        click.option("--resume", is_flag=True, help="Continue from the state next to --out."),
        click.option("--dry-run", is_flag=True, help="Print what would be trained and written, then stop."),
        json_option,
        quiet_option,
    ]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def wanted(out: Path | None) -> Path:
    """Returns `out`. Raises click.UsageError if it is None, which only --dry-run allows."""
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    return out


def print_size(size: Size, as_json: bool) -> None:
    """Prints the size of a training, for --dry-run."""
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
) -> None:
    """Runs a training to its end while showing the loss, then prints what was written and the next command.

    `doing` labels the bar, and `written` is the JSON key of the output's path.
    Raises Interrupted if Ctrl-C stops a training that has saved a state.
    """
    from accelerate import PartialState

    from lcm_compile.training.state import state_path

    main = PartialState().is_main_process
    if not main:
        be_quiet(True)  # of several processes one shows the progress
    losses: list[float] = []
    try:
        with Bar(doing) as bar:
            for done in progress:
                losses = done.losses
                recent = sum(losses[-LOSSES_AVERAGED:]) / len(losses[-LOSSES_AVERAGED:])
                bar.update(done.step, done.total, f"loss {recent:.4f}")
                if done.step % LOSSES_AVERAGED == 0 and not sys.stderr.isatty():
                    note(f"step {done.step}/{done.total} loss {recent:.4f}")
    except KeyboardInterrupt as stop:
        if not state_path(out).is_file():
            raise
        raise Interrupted(
            f"interrupted; {state_path(out)} holds the last save", "run the same command with --resume"
        ) from stop
    if not main:
        return
    if as_json:
        print_json({written: str(out), "steps": len(losses), "loss": losses})
    else:
        print(out)
        note(next_command)
