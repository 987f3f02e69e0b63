"""`run`: draws one picture, several, or a sheet of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lcm_compile.commands.options import json_option, quiet_option, request_options
from lcm_compile.errors import UsageError
from lcm_compile.version import __version__

if TYPE_CHECKING:
    from lcm_compile.bundles.bundle import EngineBundle
    from lcm_compile.bundles.manifest import StageFile
    from lcm_compile.output.grid import Axis
    from lcm_compile.pipeline.pipeline import Pipeline
    from lcm_compile.pipeline.request import Request

GUIDANCE_HINT = 2.0  # a scale above it gets a hint
CUT_SHOWN = 200  # characters of the end of a prompt that did not fit


@click.command()
@click.argument("prompt", required=False)
@click.option("--bundle", "--engine", "folder", type=click.Path(path_type=Path), help="A bundle's folder.")
@click.option("--base", metavar="BASE", help="The base of the bundle; needs --gpu.")
@click.option("--gpu", metavar="TARGET", help="The target of the bundle; needs --base.")
@request_options
@click.option("--stdin", is_flag=True, help="Read a prompt from each line of stdin; the engines load once.")
@click.option("--grid", metavar="AXES", help="Draw a sheet of all combinations: steps=1..8,guidance=1,1.5.")
@click.option("--out", type=click.Path(path_type=Path), help="A file, or a folder for several pictures.")
@json_option
@quiet_option
@click.pass_context
def run(
    context: click.Context,
    prompt: str | None,
    folder: Path | None,
    base: str | None,
    gpu: str | None,
    seed: int | None,
    guidance_scale: float | None,
    stdin: bool,
    grid: str | None,
    out: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Draw a picture, or with --grid a labelled sheet of many.

    The axes of a grid are steps, seed, guidance and prompt=FILE, a file with a prompt on each line. Numbers
    are written as 1..8 or 1,1.5. The first axis runs across the sheet, the others down it.
    """
    from lcm_compile.commands.find_bundle import find_bundle
    from lcm_compile.output.console import note
    from lcm_compile.output.images import picture_paths
    from lcm_compile.pipeline.check import check_request
    from lcm_compile.pipeline.load import load
    from lcm_compile.pipeline.request import Request, draw_seed

    if stdin and (grid is not None or prompt is not None):
        raise click.UsageError("--stdin gives the prompts: give neither PROMPT nor --grid with it")
    bundle = find_bundle(folder, base, gpu)
    settings = bundle.manifest.pipeline
    prompt = settings.sample_prompt if prompt is None else prompt
    scale = settings.guidance_scale if guidance_scale is None else guidance_scale
    request = Request(prompt, draw_seed() if seed is None else seed, guidance_scale=scale, **asked)
    if grid is not None:
        draw_sheet(bundle, request, grid, read_axes(context, grid), out, as_json)
        return
    check_request(bundle, request)
    note_remarks(bundle, request)
    if stdin:
        draw_lines(bundle, request, seed is None, out, as_json)
        return
    paths = picture_paths(out, prompt, request.seed, request.num_images)
    if seed is None:
        note(f"seed {request.seed}")
    with load(bundle, wait=False) as pipeline:
        draw_pictures(pipeline, bundle, request, paths, as_json)


def draw_lines(
    bundle: EngineBundle, request: Request, new_seeds: bool, out: Path | None, as_json: bool
) -> None:
    """Draws a picture for each line of stdin, which is its prompt; the rest is as in `request`.

    `new_seeds` gives each prompt a random seed of its own. Raises UsageError if `out` is not a folder.
    """
    from lcm_compile.output.images import picture_paths
    from lcm_compile.pipeline.load import load
    from lcm_compile.pipeline.request import draw_seed

    if out is not None and not out.is_dir():
        raise UsageError(f"--out {out} is no folder, and --stdin may give many pictures", f"mkdir {out}")
    with load(bundle, wait=False) as pipeline:
        for line in sys.stdin:
            if line.strip():
                seed = draw_seed() if new_seeds else request.seed
                own = replace(request, prompt=line.strip(), seed=seed)
                paths = picture_paths(folder_of(out, own), own.prompt, own.seed, own.num_images)
                draw_pictures(pipeline, bundle, own, paths, as_json, one_line=True)


def folder_of(out: Path | None, request: Request) -> Path | None:
    """Returns the folder for the pictures of one prompt of many; several get a folder in `out`."""
    from lcm_compile.output.images import slug

    if out is None or request.num_images == 1:
        return out
    return out / f"{slug(request.prompt)}-{request.seed}"


def draw_pictures(
    pipeline: Pipeline,
    bundle: EngineBundle,
    request: Request,
    paths: Sequence[Path],
    as_json: bool,
    one_line: bool = False,
) -> None:
    """Draws one request into files, and prints their paths."""
    from lcm_compile.output.console import Bar, note, print_json
    from lcm_compile.output.images import save_picture

    with Bar("drawing") as bar:
        drawing = pipeline.draw(request, bar.update)
    warn_of_cut(bundle, drawing.cut)
    metadata = {**png_text(request), **made_by(bundle)}
    for i, (image, path) in enumerate(zip(drawing.images(), paths, strict=True)):
        save_picture(image, path, {**metadata, "index": str(i)})
    if as_json:
        print_json(
            {
                "prompt": request.prompt,
                "images": [{"path": str(p), "seed": request.seed, "index": i} for i, p in enumerate(paths)],
                "steps": request.steps,
                "guidance_scale": request.guidance_scale,
                "engine": str(bundle.folder),
                "ms": drawing.ms,
                "cuda_graph": drawing.cuda_graph,
            },
            one_line,
        )
        return
    for path in paths:
        print(path, flush=True)
    note(timing_line(drawing.ms))


def timing_line(ms: Mapping[str, Any]) -> str:
    """Returns a line with the milliseconds of a picture and of its stages."""
    if "step" not in ms:  # one graph draws everything
        return f"{ms['total']:.0f} ms"
    return (
        f"{ms['total']:.0f} ms (encode {ms['encode'] + ms['context']:.0f}, "
        f"{len(ms['step'])} steps {sum(ms['step']):.0f}, decode {ms['decode']:.0f})"
    )


def read_axes(context: click.Context, grid: str) -> tuple[Axis, ...]:
    """Returns the axes of --grid. Raises UsageError for an option that one of the axes sets too."""
    from lcm_compile.output.grid import FIELDS, parse_grid

    axes = parse_grid(grid)
    for parameter in (*(FIELDS[axis.name] for axis in axes), "num_images"):
        if context.get_parameter_source(parameter) is ParameterSource.COMMANDLINE:
            named = "PROMPT" if parameter == "prompt" else f"--{parameter.replace('_', '-')}"
            raise click.UsageError(f"{named} and --grid can't be given together: the grid sets it")
    return axes


def draw_sheet(
    bundle: EngineBundle, fixed: Request, grid: str, axes: Sequence[Axis], out: Path | None, as_json: bool
) -> None:
    """Draws every combination of a grid's axes into one sheet; `fixed` has the values that no axis sets."""
    from lcm_compile.output.console import Bar, note, print_json
    from lcm_compile.output.grid import FIELDS, draw_grid, requests
    from lcm_compile.output.images import save_picture, sheet_path
    from lcm_compile.pipeline.check import check_request
    from lcm_compile.pipeline.load import load

    asked = requests(axes, fixed)
    for request in asked:
        check_request(bundle, request)
    path = sheet_path(out, fixed.prompt)
    note_remarks(bundle, max(asked, key=lambda request: request.guidance_scale))
    with load(bundle) as pipeline, Bar("drawing") as bar:
        sheet, drawings = draw_grid(pipeline, axes, fixed, bar.update)
    warn_of_cut(bundle, max((drawing.cut for drawing in drawings), key=len))
    varied = [FIELDS[axis.name] for axis in axes]
    shared = {name: value for name, value in png_text(fixed).items() if name not in varied}
    save_picture(sheet, path, {**shared, "grid": grid, **made_by(bundle)})
    if as_json:
        pictures = [{**asdict(one), "ms": drawing.ms} for one, drawing in zip(asked, drawings, strict=True)]
        print_json({"sheet": str(path), "engine": str(bundle.folder), "pictures": pictures})
        return
    print(path)
    seconds = sum(drawing.ms["total"] for drawing in drawings) / 1000
    note(f"{len(drawings)} pictures in {seconds:.1f} s")


def note_remarks(bundle: EngineBundle, request: Request) -> None:
    """Writes hints for a better picture to stderr, and warnings of what limits the bundle's quality."""
    from lcm_compile.output.console import note
    from lcm_compile.output.reports import loss_lines

    scale, manifest = request.guidance_scale, bundle.manifest
    if takes_guidance(manifest.stages):
        if request.negative_prompt:
            note("hint: --negative-prompt does nothing here: a full LCM has no second pass to read it")
    elif scale > GUIDANCE_HINT:
        note(f"hint: LCM works best with guidance from 1 to 2; {scale:g} may oversaturate the picture")
    elif request.negative_prompt and scale <= 1:
        note("hint: --negative-prompt does nothing at guidance 1; try --guidance-scale 1.5")
    if weights := manifest.spec.weights:
        note(f"warning: {bundle.folder.name} has {weights} weights: its pictures are noise", always=True)
    for line in loss_lines(manifest.lossy):
        note(line)


def takes_guidance(stages: Iterable[StageFile]) -> bool:
    """Returns whether one of the stages reads the guidance scale, as those of a full LCM do."""
    return any(tensor.name == "guidance" for stage in stages for tensor in stage.contract.inputs)


def warn_of_cut(bundle: EngineBundle, cut: str) -> None:
    """Warns of the end of a prompt that did not fit, even with --quiet, because it changes the picture."""
    from lcm_compile.output.console import note

    if cut:
        shown = cut if len(cut) <= CUT_SHOWN else f"{cut[:CUT_SHOWN]}…"
        longest = bundle.manifest.pipeline.tokenizers[0].max_length
        note(f"warning: the prompt is over {longest} tokens; cut: {shown!r}", always=True)


def png_text(request: Request) -> dict[str, str]:
    """Returns a request's settings as the text chunks of a PNG."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or "",
        "seed": str(request.seed),
        "steps": str(request.steps),
        "guidance_scale": f"{request.guidance_scale:g}",
    }


def made_by(bundle: EngineBundle) -> dict[str, str]:
    """Returns the bundle and the software that draw a picture, as the text chunks of a PNG."""
    weights = bundle.manifest.spec.weights
    random = {"weights": weights} if weights else {}
    return {"bundle": bundle.digest, "software": f"lcm-compile {__version__}", **random}
