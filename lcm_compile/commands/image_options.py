"""The options of `run` for pictures that begin at a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lcm_compile.errors import UsageError

if TYPE_CHECKING:
    from lcm_compile.pipeline.request import Request


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --image, --strength and --mask; each sets the field of Request of its name."""
    for option in reversed(
        (
            click.option("--image", metavar="PICTURE", help="Begin at this picture, in place of noise."),
            click.option(
                "--strength",
                type=float,
                help="Share of the steps drawn from --image, 0 to 1; by default 0.8, or 1 with --mask.",
            ),
            click.option(
                "--mask",
                metavar="PICTURE|alpha",
                help="Repaint only what is white here; or alpha: what is transparent in --image.",
            ),
        )
    ):
        command = option(command)
    return command


def open_images(asked: MutableMapping[str, Any]) -> list[Path]:
    """Opens the `image` and the `mask` among the fields of a request, once for all its pictures.

    Returns the paths of their files. Raises UsageError if one can't be read.
    """
    from lcm_compile.pipeline.source_picture import ALPHA, source_picture

    paths = []
    for name in ("image", "mask"):
        given = asked.get(name)
        if given is not None and (name, given) != ("mask", ALPHA):
            asked[name] = source_picture(given, name)
            paths.append(Path(given).expanduser())
    return paths


def with_images(request: Request, given: MutableMapping[str, Any], folders: Iterable[Path]) -> Request:
    """Returns a saved picture's request with the `given` fields, and with its image and mask opened.

    Those that are not given are searched for in the folders. Raises UsageError if one is not there.
    """
    from lcm_compile.pipeline.source_picture import ALPHA, find_again

    open_images(given)
    folders = [*folders]
    own = {}
    for name in ("image", "mask"):
        named = getattr(request, name)
        if named is None or name in given:
            continue
        if name == "mask" and named.alpha and "image" in given:
            given[name] = ALPHA
        else:
            own[name] = find_again(named, folders, name)
    return replace(request, **{**own, **given})


def refuse_replacing(paths: Iterable[Path], images: Iterable[Path]) -> None:
    """Raises UsageError if a picture would be saved in the place of one that it begins at."""
    files = [image.resolve() for image in images]
    for path in paths:
        if path.resolve() in files:
            raise UsageError(
                f"--out {path} is what the picture begins at, and would be lost", "give another --out"
            )


def told(request: Request) -> Mapping[str, Any]:
    """Returns what a picture begins at, for JSON."""
    return {
        "image": request.image and asdict(request.image),
        "strength": request.denoising_strength if request.image else None,
        "mask": request.mask and asdict(request.mask),
    }
