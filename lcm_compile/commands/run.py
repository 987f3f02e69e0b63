"""`run`: one picture, several, or a sheet of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lcm_compile.commands.options import json_option, quiet_option
from lcm_compile.errors import UsageError
from lcm_compile.version import __version__

if TYPE_CHECKING:
    from lcm_compile.bundles.bundle import EngineBundle
    from lcm_compile.output.grid import Axis
    from lcm_compile.pipeline.pipeline import LcmPipeline
    from lcm_compile.pipeline.request import Request

GUIDANCE_HINT = 2.0
CUT_SHOWN = 200


@click.command()
@click.argument("prompt", required=False)
@click.option("--engine", type=click.Path(path_type=Path), help="A bundle's folder.")
@click.option("--base", metavar="BASE", help="With --gpu: the bundle built for these.")
@click.option("--gpu", metavar="TARGET", help="With --base.")
@click.option("--negative-prompt", help="What the picture should not be; needs guidance above 1.")
@click.option("--steps", type=int, default=4, show_default=True)
@click.option("--guidance-scale", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, help="Default: drawn at random and printed.")
@click.option("--num-images", type=int, default=1, show_default=True)
@click.option("--stdin", is_flag=True, help="A prompt on each line of stdin; the engines are loaded once.")
@click.option("--grid", metavar="AXES", help="One sheet of every combination: steps=1..8,guidance=1,1.5.")
@click.option("--out", type=click.Path(path_type=Path), help="A file, or a folder for several pictures.")
@json_option
@quiet_option
@click.pass_context
def run(
    context: click.Context,
    prompt: str | None,
    engine: Path | None,
    base: str | None,
    gpu: str | None,
    negative_prompt: str | None,
    steps: int,
    guidance_scale: float,
    seed: int | None,
    num_images: int,
    stdin: bool,
    grid: str | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw a picture, or with --grid a labelled sheet of many.

    The axes of a grid are steps, seed, guidance and prompt=FILE (a prompt on each line): numbers as 1..8
    or 1,1.5. The first runs across the sheet.
    """
    from lcm_compile.commands.find_bundle import find_bundle
    from lcm_compile.output.console import note
    from lcm_compile.output.images import picture_paths
    from lcm_compile.pipeline.check import check_request
    from lcm_compile.pipeline.load import load
    from lcm_compile.pipeline.request import Request, draw_seed

    if stdin and (grid is not None or prompt is not None):
        raise click.UsageError("--stdin gives the prompts: give neither PROMPT nor --grid with it")
    bundle = find_bundle(engine, base, gpu)
    settings = bundle.manifest.pipeline
    prompt = settings.sample_prompt if prompt is None else prompt
    request = Request(
        prompt, draw_seed() if seed is None else seed, negative_prompt, steps, guidance_scale, num_images
    )
    if grid is not None:
        draw_sheet(bundle, request, grid, read_axes(context, grid), out, as_json, quiet)
        return
    check_request(bundle, request)
    hint_at(request, quiet)
    warn_of_random(bundle)
    tell_loss(bundle, quiet)
    if stdin:
        if out is not None and not out.is_dir():
            raise UsageError(f"--out {out} is no folder, and --stdin may give many pictures", f"mkdir {out}")
        with load(bundle, wait=False) as pipeline:
            for line in sys.stdin:
                if line.strip():
                    own = replace(request, prompt=line.strip(), seed=draw_seed() if seed is None else seed)
                    paths = picture_paths(folder_of(out, own), own.prompt, own.seed, num_images)
                    draw_pictures(pipeline, bundle, own, paths, as_json, quiet, one_line=True)
        return
    paths = picture_paths(out, prompt, request.seed, num_images)
    if seed is None:
        note(f"seed {request.seed}", quiet)
    with load(bundle, wait=False) as pipeline:
        draw_pictures(pipeline, bundle, request, paths, as_json, quiet)


def folder_of(out: Path | None, request: Request) -> Path | None:
    """Where the pictures of one of many prompts go: several into a folder of their own in `out`."""
    from lcm_compile.output.images import slug

    if out is None or request.num_images == 1:
        return out
    return out / f"{slug(request.prompt)}-{request.seed}"


def draw_pictures(
    pipeline: LcmPipeline,
    bundle: EngineBundle,
    request: Request,
    paths: Sequence[Path],
    as_json: bool,
    quiet: bool,
    one_line: bool = False,
) -> None:
    """Draws one request into files, and tells them."""
    from lcm_compile.output.console import Bar, note, print_json
    from lcm_compile.output.images import save_picture

    with Bar("drawing", quiet) as bar:
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
    note(timing_line(drawing.ms), quiet)


def timing_line(ms: Mapping[str, Any]) -> str:
    if "step" not in ms:  # one graph draws it all
        return f"{ms['total']:.0f} ms"
    return (
        f"{ms['total']:.0f} ms (encode {ms['encode'] + ms['context']:.0f}, "
        f"{len(ms['step'])} steps {sum(ms['step']):.0f}, decode {ms['decode']:.0f})"
    )


def read_axes(context: click.Context, grid: str) -> tuple[Axis, ...]:
    """The axes of --grid; UsageError for an option that sets what one of them sets too."""
    from lcm_compile.output.grid import FIELDS, parse_grid

    axes = parse_grid(grid)
    for parameter in (*(FIELDS[axis.name] for axis in axes), "num_images"):
        if context.get_parameter_source(parameter) is ParameterSource.COMMANDLINE:
            named = "PROMPT" if parameter == "prompt" else f"--{parameter.replace('_', '-')}"
            raise click.UsageError(f"{named} and --grid can't be given together: the grid sets it")
    return axes


def draw_sheet(
    bundle: EngineBundle,
    fixed: Request,
    grid: str,
    axes: Sequence[Axis],
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draws every combination of a grid's axes into one sheet."""
    from lcm_compile.output.console import Bar, note, print_json
    from lcm_compile.output.grid import FIELDS, draw_grid, requests
    from lcm_compile.output.images import save_picture, sheet_path
    from lcm_compile.pipeline.check import check_request
    from lcm_compile.pipeline.load import load

    asked = requests(axes, fixed)
    for request in asked:
        check_request(bundle, request)
    path = sheet_path(out, fixed.prompt)
    hint_at(max(asked, key=lambda request: request.guidance_scale), quiet)
    warn_of_random(bundle)
    tell_loss(bundle, quiet)
    with load(bundle) as pipeline, Bar("drawing", quiet) as bar:
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
    note(f"{len(drawings)} pictures in {seconds:.1f} s", quiet)


def hint_at(request: Request, quiet: bool) -> None:
    """What would draw better."""
    from lcm_compile.output.console import note

    scale = request.guidance_scale
    if scale > GUIDANCE_HINT:
        note(f"hint: LCM is at its best with guidance from 1 to 2; {scale:g} may look burnt", quiet)
    if request.negative_prompt and scale <= 1:
        note("hint: --negative-prompt does nothing at guidance 1; try --guidance-scale 1.5", quiet)


def warn_of_random(bundle: EngineBundle) -> None:
    from lcm_compile.output.console import note

    if weights := bundle.manifest.spec.weights:
        note(f"warning: {bundle.folder.name} has {weights} weights: its pictures are noise")


def tell_loss(bundle: EngineBundle, quiet: bool) -> None:
    from lcm_compile.output.console import note
    from lcm_compile.output.reports import loss_lines

    for told in loss_lines(bundle.manifest.lossy):
        note(told, quiet)


def warn_of_cut(bundle: EngineBundle, cut: str) -> None:
    """Tells the end of a prompt that did not fit; that is no hint, --quiet does not silence it."""
    from lcm_compile.output.console import note

    if cut:
        shown = cut if len(cut) <= CUT_SHOWN else f"{cut[:CUT_SHOWN]}…"
        longest = bundle.manifest.pipeline.tokenizers[0].max_length
        note(f"warning: the prompt is over {longest} tokens; cut: {shown!r}")


def png_text(request: Request) -> dict[str, str]:
    """A request as text chunks of a PNG."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or "",
        "seed": str(request.seed),
        "steps": str(request.steps),
        "guidance_scale": f"{request.guidance_scale:g}",
    }


def made_by(bundle: EngineBundle) -> dict[str, str]:
    """What drew a picture, as text chunks of a PNG."""
    weights = bundle.manifest.spec.weights
    told = {"weights": weights} if weights else {}
    return {"bundle": bundle.digest, "software": f"lcm-compile {__version__}", **told}
