"""The options of `run` for pictures that begin at a picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lcm_compile.errors import UsageError

if TYPE_CHECKING:
    from lcm_compile.pipeline.request import Request
    from lcm_compile.pipeline.source_picture import SourcePicture


# The fields of Request that are pictures, with their names in options and messages.
PICTURES = {"image": "image", "mask": "mask", "ip_image": "ip-image"}


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --image, --strength, --mask and --outpaint, and --ip-image and --ip-weight.

    `open_images` makes fields of Request of them.
    """
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
            click.option(
                "--outpaint",
                metavar="LEFT,TOP,RIGHT,BOTTOM",
                callback=read_border,
                help="Extend --image by so many pixels, and draw what is there; in place of --mask.",
            ),
            click.option(
                "--ip-image", metavar="PICTURE", help="The picture that the bundle's IP-Adapter reads."
            ),
            click.option(
                "--ip-weight",
                type=float,
                help="How strongly --ip-image counts, usually 0 to 1; by default the bundle's.",
            ),
        )
    ):
        command = option(command)
    return command


def read_border(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Returns the numbers of --outpaint. Raises BadParameter unless they are four."""
    if value is None:
        return None
    if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9}){3}\s*", value):
        raise click.BadParameter(f"{value!r} is not LEFT,TOP,RIGHT,BOTTOM, in pixels")
    return tuple(int(side) for side in value.split(","))


def open_images(asked: MutableMapping[str, Any]) -> list[Path]:
    """Opens the PICTURES and the `control` of a request, once for all its pictures.

    An `outpaint` among them becomes the first two. Returns the paths of their files. Raises UsageError if one
    can't be read.
    """
    from lcm_compile.pipeline.control_picture import control_pictures
    from lcm_compile.pipeline.source_picture import ALPHA, begun_at, source_picture
    from lcm_compile.system.files import user_path

    paths = []
    for name, called in PICTURES.items():
        given = asked.get(name)
        if isinstance(given, str) and (name, given) != ("mask", ALPHA):
            asked[name] = source_picture(given, called)
            paths.append(user_path(given))
    paths += map(user_path, asked.get("control", ()))
    if (detectors := asked.pop("control_detector", None)) or "control" in asked:
        asked["control"] = control_pictures(asked.get("control"), detectors)
    if (border := asked.pop("outpaint", None)) is not None:
        asked.update(begun_at(asked.get("image"), asked.get("mask"), border))
    return paths


def with_images(request: Request, given: MutableMapping[str, Any], folders: Iterable[Path]) -> Request:
    """Returns a saved picture's request with the `given` fields, and with its PICTURES and control opened.

    Those that are not given are searched for in the folders. Raises UsageError if one is not there.
    """
    from lcm_compile.pipeline.control_picture import control_pictures
    from lcm_compile.pipeline.source_picture import ALPHA, find_again, outpainted

    folders = [*folders]
    if given.get("outpaint") and "image" not in given and request.image is not None:
        given["image"] = find_again(replace(request.image, border=()), folders, "image")
    detectors = None if "control" in given else given.pop("control_detector", None)
    open_images(given)
    own: dict[str, Any] = {}
    for name, called in PICTURES.items():
        named = getattr(request, name)
        if named is None or name in given:
            continue
        if name == "mask" and named.alpha and "image" in given:
            given[name] = ALPHA
        elif name == "mask" and named.border and "image" in given:
            given.update(outpainted(given["image"], named.border))
        else:
            own[name] = find_again(named, folders, called)
    if "control" not in given:
        found = [find_again(named, folders, "control") for named in request.control]
        own["control"] = control_pictures(found, detectors)
    return replace(request, **{**own, **given})


def sources_of(request: Request) -> list[SourcePicture]:
    """Returns the pictures that a request is given and that have the name of a file."""
    given = [*(getattr(request, name) for name in PICTURES), *request.control]
    return [one for one in given if one is not None and one.name]


def refuse_replacing(paths: Iterable[Path], images: Iterable[Path]) -> None:
    """Raises UsageError if a picture would be saved in the place of one that it is drawn from."""
    files = [image.resolve() for image in images]
    for path in paths:
        if path.resolve() in files:
            raise UsageError(
                f"--out {path} is what the picture is drawn from, and would be lost", "give another --out"
            )


def told(request: Request) -> Mapping[str, Any]:
    """Returns the pictures that a picture is drawn from, and how it is enlarged, for JSON."""
    from lcm_compile.output.picture_settings import hires_facts

    names = "name", "sha256", "alpha", "border"
    pictures = {name: getattr(request, name) for name in PICTURES}
    facts = {
        called: picture and {name: getattr(picture, name) for name in names}
        for called, picture in pictures.items()
    }
    return {
        **facts,
        "strength": request.denoising_strength if request.image else None,
        "ip_weight": request.ip_weight,
        "hires": hires_facts(request),
    }
