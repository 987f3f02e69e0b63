"""Options that many commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click


def quiet_option(command: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option("--quiet", is_flag=True, callback=be_quiet, help="No progress and no hints.")
    return option(command)


def be_quiet(context: click.Context, parameter: click.Parameter, quiet: bool) -> bool:
    """Said to the hub's client as well, which reads it when it is first imported."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return quiet


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")(command)


def base_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a checkpoint is made of, for `base_settings`."""
    for option in reversed(
        (
            click.option(
                "--base",
                metavar="BASE",
                help="demo, a family (sdxl, sd15, …), a folder, a file or a hub id.",
            ),
            click.option(
                "--weights", metavar="random[:SEED]", help="Random weights of a family's architecture."
            ),
            click.option(
                "--config", metavar="DIR", help="Settings and tokenizers of a base that is one file."
            ),
            click.option(
                "--vae",
                metavar="VAE",
                help="Instead of the base's: a hub id, a folder, a file, or taesd, the tiny one (lossy).",
            ),
            click.option("--lcm-lora", metavar="PATH[:W]", help="The LCM-LoRA; default: the family's own."),
            click.option("--no-lcm", is_flag=True, help="No LCM-LoRA: the base is an LCM already."),
            click.option(
                "--lora",
                "loras",
                multiple=True,
                metavar="FILE|ID[:W][@PART=W,…]",
                help="A style; repeatable.",
            ),
        )
    ):
        command = option(command)
    return command


def base_settings(*, lcm_lora: str | None, loras: tuple[str, ...], **others: Any) -> dict[str, Any]:
    """The fields of a BuildSpec that `base_options` name; UsageError where there is no base."""
    if others["base"] is None:
        raise click.UsageError("Missing option '--base'.")
    from lcm_compile.spec import LoraSpec

    return {
        "lcm_lora": LoraSpec.parse(lcm_lora) if lcm_lora is not None else None,
        "loras": tuple(LoraSpec.parse(lora) for lora in loras),
        **others,
    }


def graph_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a model's graphs are shaped."""
    for option in reversed(
        (
            click.option("--height", type=int, help="Pixels; default: the checkpoint's size."),
            click.option("--width", type=int, help="Pixels; default: the checkpoint's size."),
            click.option(
                "--batch", type=int, default=1, show_default=True, help="Pictures in one call of the engines."
            ),
            click.option(
                "--precision",
                default="auto",
                show_default=True,
                help="auto, fp32, fp16, bf16; lossy: int8, fp8.",
            ),
            click.option(
                "--without",
                multiple=True,
                metavar="REWRITE",
                help="Leave a rewrite for LCM out: context, qkv, upsampling, lcm-step, rgb8. Repeatable.",
            ),
            click.option("--whole-loop", is_flag=True, help="One graph that draws the whole 4-step picture."),
        )
    ):
        command = option(command)
    return command
