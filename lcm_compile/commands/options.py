"""Options that several commands share, as decorators."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import click


def quiet_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --quiet. The console handles it, and the command has no parameter for it."""
    option = click.option(
        "--quiet",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=set_quiet,
        help="Show no progress and no hints.",
    )
    return option(command)


def set_quiet(context: click.Context, parameter: click.Parameter, quiet: bool) -> None:
    """Silences the console and the Hugging Face hub client.

    The client reads its environment variable when it is first imported, so this runs before that.
    """
    from lcm_compile.output.console import be_quiet

    be_quiet(quiet)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --json, as the parameter `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def read_seeds(context: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """Returns seeds such as `7`, `1,2,3` or `1..8` as a list. Raises BadParameter if one is no number."""
    if text is None:
        return None
    from lcm_compile.output.grid import whole_numbers
    from lcm_compile.spec import MOST_IMAGES

    seeds: list[int] = []
    for word in text.split(","):
        try:
            seeds += whole_numbers(word, MOST_IMAGES)
        except ValueError:
            raise click.BadParameter(f"{word!r} is not a valid integer, nor a range such as 1..8") from None
    return seeds


def read_lora_weights(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> Any:
    """Returns `NAME=W` and `NAME=W@PART=W,…` as LoraSpecs. Raises BadParameter for all else."""
    from lcm_compile.errors import UsageError
    from lcm_compile.spec import LoraSpec

    found = []
    for text in texts:
        name, equals, weight = text.partition("=")
        if not (name and equals and weight):
            raise click.BadParameter(f"{text!r} is not NAME=0.8, nor NAME=0.8@text=0.5")
        try:
            found.append(LoraSpec.parse(f"{name}:{weight}"))
        except UsageError as error:
            raise click.BadParameter(error.message) from None
    return tuple(found)


def pair_option(name: str, form: str, text: str) -> Callable[..., Any]:
    """Returns an option whose value is two whole numbers, in the form that `form` shows."""

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
        if value is None:
            return None
        numbers = re.fullmatch(r"\s*(\d{1,9})\s*[x×,]\s*(\d{1,9})\s*", value)
        if numbers is None:
            raise click.BadParameter(f"{value!r} is not {form}, in pixels")
        return int(numbers[1]), int(numbers[2])

    return click.option(name, metavar=form, callback=read, help=f"{text}.")


def request_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that describe what to draw; each sets the field of Request of its name."""
    for option in reversed(
        (
            click.option(
                "--negative-prompt", help="What the picture should not show; needs guidance above 1."
            ),
            click.option(
                "--prompt-syntax",
                default="plain",
                show_default=True,
                help="plain; or webui: (word:1.2), ((word)), [word], BREAK and escapes.",
            ),
            click.option("--prompt-2", help="What SDXL's second text encoder reads in PROMPT's place."),
            click.option("--negative-prompt-2", help="And in the negative prompt's place."),
            click.option(
                "--control",
                multiple=True,
                metavar="PICTURE",
                help="The picture that the bundle's ControlNet or T2I-Adapter reads; repeated for several, "
                "ControlNets' first.",
            ),
            click.option(
                "--control-detector",
                multiple=True,
                metavar="canny[:LOW,HIGH]|none",
                help="Make the ControlNet's picture of a photo; repeatable, one for all or for each.",
            ),
            click.option(
                "--control-weight",
                multiple=True,
                type=float,
                help="Its strength, by default the bundle's; repeatable, as are the next two.",
            ),
            click.option(
                "--control-start",
                multiple=True,
                type=float,
                help="Share of the steps, 0 to 1, before which it does nothing.",
            ),
            click.option(
                "--control-end",
                multiple=True,
                type=float,
                help="Share of the steps, 0 to 1, after which it does nothing.",
            ),
            pair_option("--original-size", "HEIGHTxWIDTH", "The size that SDXL is told a picture had"),
            pair_option("--crop", "TOP,LEFT", "Where SDXL is told it was cropped; by default at 0,0"),
            pair_option("--target-size", "HEIGHTxWIDTH", "The size that SDXL is told to aim at"),
            click.option(
                "--sampler",
                help="lcm, tcd, ddim, euler, euler-karras, euler-a, dpm++2m, dpm++2m-karras, dpm++2m-sde or "
                "dpm++2m-sde-karras; by default the bundle's.",
            ),
            click.option("--steps", type=int, help="Denoising steps, 1 or more; by default the bundle's."),
            click.option(
                "--guidance-scale",
                type=float,
                help="Strength of guidance, by default the bundle's; 1 is none, and up to 2 suits LCM.",
            ),
            click.option(
                "--guidance-rescale",
                type=float,
                default=0.0,
                help="Bring this share, 0 to 1, of a guided picture's contrast back.",
            ),
            click.option(
                "--eta", type=float, help="Share of noise, 0 to 1, that tcd and ddim add again in each step."
            ),
            click.option(
                "--seed",
                metavar="SEED[,SEED…]",
                callback=read_seeds,
                help="Seed of the noise, by default a random one, which is printed; 1,2,3 or 1..8 draws a "
                "picture for each.",
            ),
            click.option(
                "--lora-weight",
                "lora_weights",
                multiple=True,
                metavar="NAME=W[@PART=W,…]",
                callback=read_lora_weights,
                help="The weight of a LoRA that the bundle takes at run time; repeatable.",
            ),
            click.option(
                "--lora",
                "loras",
                multiple=True,
                metavar="FILE|ID[:W][@PART=W,…]",
                help="A LoRA for one of the bundle's slots, and its weight; repeatable.",
            ),
            click.option(
                "--hires",
                type=float,
                metavar="FACTOR",
                help="Enlarge what is drawn, such as by 2, and draw on with the bundle's larger size.",
            ),
            click.option("--hires-upscaler", help="How --hires enlarges: latent, the default, or lanczos."),
            click.option(
                "--hires-strength",
                type=float,
                help="Share of the second pass's steps that are drawn, 0 to 1; by default 0.7.",
            ),
            click.option("--hires-steps", type=int, help="Steps of the second pass; by default --steps."),
            click.option("--num-images", type=int, default=1, show_default=True, help="Pictures to draw."),
            click.option("--index", type=int, help="Draw only this one of --num-images, counted from 0."),
        )
    ):
        command = option(command)
    return command


lora_skip_option = click.option(
    "--lora-skip",
    multiple=True,
    metavar="PATTERN",
    help="Leave the LoRA's keys out that match, such as 'bundle_emb.*'; repeatable.",
)


def base_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that name a base and its LoRAs. `base_settings` reads them."""
    for option in reversed(
        (
            click.option(
                "--base",
                metavar="BASE",
                help="demo, a family (sdxl, sd15, …), a folder, a file or a hub id.",
            ),
            click.option(
                "--weights", metavar="random[:SEED]", help="Use random weights instead of the base's."
            ),
            click.option(
                "--config",
                metavar="DIR",
                help="Folder with the configs and tokenizers of a base that is one file.",
            ),
            click.option(
                "--vae",
                metavar="VAE",
                help="Another VAE: a hub id, a folder, a file, or taesd (small and fast, but lossy).",
            ),
            click.option(
                "--lcm-lora",
                metavar="PATH[:W][:runtime[:NAME]]",
                help="An LCM-LoRA and its weight; by default the family's own.",
            ),
            click.option(
                "--few-step",
                metavar="METHOD[:VARIANT]",
                help="lcm, dmd2, lightning, hyper, tcd, pcm, flash or turbo: how few steps draw a picture.",
            ),
            click.option(
                "--few-step-lora",
                metavar="PATH[:W]",
                help="That method's LoRA and its weight; by default the one published for the family.",
            ),
            click.option(
                "--no-lcm",
                is_flag=True,
                help="Fuse no few-step LoRA: for ordinary pictures, or if the base has one already.",
            ),
            click.option(
                "--lora",
                "loras",
                multiple=True,
                metavar="FILE|ID[:W][:runtime[:NAME]][@PART=W,…]",
                help="A LoRA to fuse and its weight, for all or each part, or with :runtime the weight that "
                "run --lora-weight may change; repeatable.",
            ),
            click.option(
                "--embedding",
                "embeddings",
                multiple=True,
                metavar="FILE|ID[:WORD]",
                help="A textual inversion, and its word in prompts; repeatable.",
            ),
            lora_skip_option,
        )
    ):
        command = option(command)
    return command


def guide_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --controlnet and --t2i-adapter, as specs in the parameters `controlnets` and `t2i_adapters`."""

    def read(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[Any, ...]:
        from lcm_compile.spec import ControlNetSpec, T2IAdapterSpec

        kind = ControlNetSpec if parameter.name == "controlnets" else T2IAdapterSpec
        return tuple(kind.parse(text) for text in texts)

    for option, parameter, what in (
        ("--t2i-adapter", "t2i_adapters", "T2I-Adapter"),
        ("--controlnet", "controlnets", "ControlNet"),
    ):
        command = click.option(
            option,
            parameter,
            multiple=True,
            metavar="DIR|FILE|ID[:W]",
            callback=read,
            help=f"A {what}: run --control gives its picture, W is its usual strength; repeatable.",
        )(command)
    return command


def ip_adapter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --ip-adapter, as an IpAdapterSpec or None in the parameter `ip_adapter`, and --ip-encoder."""

    def read(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> Any:
        from lcm_compile.spec import IpAdapterSpec

        if len(texts) > 1:
            raise click.BadParameter(f"{len(texts)} IP-Adapters are given, and a bundle has one")
        return IpAdapterSpec.parse(texts[0]) if texts else None

    adapter = click.option(
        "--ip-adapter",
        multiple=True,  # so that a second one is refused, and not taken for the only one
        metavar="FILE|ID:FILE[:W]",
        callback=read,
        help="An IP-Adapter, whose picture run --ip-image gives, and its usual weight.",
    )
    encoder = click.option(
        "--ip-encoder",
        metavar="DIR|ID[:DIR]",
        help="Its image encoder; by default the image_encoder beside it, or beside its folder.",
    )
    return adapter(encoder(command))


def base_settings(
    *,
    lcm_lora: str | None,
    few_step_lora: str | None,
    loras: tuple[str, ...],
    embeddings: tuple[str, ...],
    **others: Any,
) -> dict[str, Any]:
    """Returns options as the fields of a BuildSpec.

    LoRAs and textual inversions are parsed; all others have their fields' values.

    Raises click.UsageError if there is no --base.
    """
    if others["base"] is None:
        raise click.UsageError("Missing option '--base'.")
    from lcm_compile.spec import EmbeddingSpec, LoraSpec

    return {
        "lcm_lora": LoraSpec.parse(lcm_lora) if lcm_lora is not None else None,
        "few_step_lora": LoraSpec.parse(few_step_lora) if few_step_lora is not None else None,
        "loras": tuple(LoraSpec.parse(lora) for lora in loras),
        "embeddings": tuple(EmbeddingSpec.parse(embedding) for embedding in embeddings),
        **others,
    }


def graph_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that change a model's graphs: their shape, precision and rewrites."""
    for option in reversed(
        (
            click.option("--height", type=int, help="Height in pixels; by default the checkpoint's."),
            click.option("--width", type=int, help="Width in pixels; by default the checkpoint's."),
            click.option(
                "--batch",
                type=int,
                default=1,
                show_default=True,
                help="Pictures that one call of an engine draws.",
            ),
            click.option(
                "--prompt-tokens",
                type=int,
                default=77,
                show_default=True,
                help="Room for a prompt: 154 or 231 for two or three chunks of 77 tokens, or more.",
            ),
            click.option(
                "--clip-skip",
                type=int,
                help="Last layers of the text encoders to skip; webui's Clip skip is 1 more.",
            ),
            click.option(
                "--lora-slots",
                type=int,
                default=0,
                show_default=True,
                help="LoRAs that run --lora can put into the finished bundle.",
            ),
            click.option(
                "--lora-rank",
                type=int,
                default=64,
                show_default=True,
                help="The highest rank of LoRAs in these slots.",
            ),
            click.option(
                "--precision",
                default="auto",
                show_default=True,
                help="auto, fp32, fp16 or bf16; int8 and fp8 are lossy.",
            ),
            click.option(
                "--without",
                multiple=True,
                metavar="REWRITE",
                help="Omit one rewrite: context, qkv, upsampling, lcm-step, rgb8 or winograd; repeatable.",
            ),
            guide_options,
            ip_adapter_options,
            click.option(
                "--image",
                is_flag=True,
                help="Also build the VAE's encoder: run --image then draws from a picture.",
            ),
            click.option(
                "--whole-loop", is_flag=True, help="Build one graph that draws a complete 4-step picture."
            ),
        )
    ):
        command = option(command)
    return command
