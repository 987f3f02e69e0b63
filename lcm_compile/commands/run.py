"""`run`: draws one picture, several, or a sheet of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lcm_compile.commands.image_options import (
    image_options,
    open_images,
    refuse_replacing,
    sources_of,
    told,
    with_images,
)
from lcm_compile.commands.options import json_option, quiet_option, request_options
from lcm_compile.errors import Interrupted, UsageError
from lcm_compile.graphs import ENCODE_IMAGE, IP_IMAGE, T2I_ADAPTERS

if TYPE_CHECKING:
    import numpy as np

    from lcm_compile.bundles.bundle import EngineBundle
    from lcm_compile.output.grid import Axis
    from lcm_compile.output.images import Names
    from lcm_compile.pipeline.pipeline import Pipeline
    from lcm_compile.pipeline.request import Request

CUT_SHOWN = 200  # characters of the end of a prompt that did not fit
TOLD = "lcm_compile.told"  # in the meta data of click's context


@click.command()
@click.argument("prompt", required=False)
@click.option("--bundle", "--engine", "folder", type=click.Path(path_type=Path), help="A bundle's folder.")
@click.option("--base", metavar="BASE", help="The base of the bundle; needs --gpu.")
@click.option("--gpu", metavar="TARGET", help="The target of the bundle; needs --base.")
@click.option("--height", type=int, help="Height in pixels, of those that the bundle draws.")
@click.option("--width", type=int, help="Width in pixels, of those that the bundle draws.")
@request_options
@image_options
@click.option("--stdin", is_flag=True, help="Read a prompt from each line of stdin; the engines load once.")
@click.option("--grid", metavar="AXES", help="Draw a sheet of all combinations: steps=1..8,guidance=1,1.5.")
@click.option(
    "--again",
    metavar="PICTURE",
    type=click.Path(path_type=Path),
    help="Draw a saved picture again; a prompt or an option that is given replaces the picture's own.",
)
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
    height: int | None,
    width: int | None,
    seed: list[int] | None,
    sampler: str | None,
    steps: int | None,
    guidance_scale: float | None,
    eta: float | None,
    index: int | None,
    stdin: bool,
    grid: str | None,
    again: Path | None,
    out: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Draw a picture, or with --grid a labelled sheet of many.

    The axes of a grid are steps, seed, guidance, strength and prompt=FILE, a file of a prompt a line. Numbers
    are written as 1..8 or 1,1.5. The first axis runs across the sheet, the others down it.
    """
    from lcm_compile.commands.find_bundle import find_bundle, of_size
    from lcm_compile.output.console import note
    from lcm_compile.pipeline.load import load

    if stdin and (grid is not None or prompt is not None):
        raise click.UsageError("--stdin gives the prompts: give neither PROMPT nor --grid with it")
    if again is not None:
        if stdin or grid is not None or is_given(context, "num_images"):
            raise click.UsageError("--again draws one picture: drop --stdin, --grid and --num-images")
        if seed is not None and len(seed) > 1:
            raise click.UsageError("--again draws one picture: give it one --seed")
        if height is not None or width is not None:
            raise click.UsageError("--again draws a picture of its own size: drop --height and --width")
        given = {"prompt": prompt, "sampler": sampler, "steps": steps, "index": index, **asked}
        given |= {"guidance_scale": guidance_scale, "eta": eta}
        given["seed"] = seed[0] if seed else None
        given = {name: value for name, value in given.items() if is_given(context, name)}
        if sampler is not None:
            given.setdefault("eta", None)  # the picture's own was for its sampler
        draw_again(again, given, folder, base, gpu, out, as_json)
        return
    bundle = of_size(find_bundle(folder, base, gpu), height, width)
    settings = bundle.manifest.pipeline
    prompt = settings.sample_prompt if prompt is None else prompt
    asked |= {"prompt": prompt, "index": index, **settings.drawing(sampler, steps, guidance_scale, eta)}
    if grid is not None:
        axes = read_axes(context, grid)
        if seed is not None and len(seed) > 1:
            listed = ",".join(map(str, seed))
            raise click.UsageError(f"several seeds are an axis of a sheet: --grid {grid},seed={listed}")
        draw_sheet(bundle, read_requests(seed, out, asked)[0][0], grid, axes, out, as_json)
        return
    if stdin:
        requests, _ = read_requests(seed, out, asked, bundle)
        draw_lines(bundle, requests, seed is None, out, as_json)
        return
    # The engines load while what draws with them is imported, and what is asked for is checked.
    with load(bundle, wait=False) as pipeline, telling_what_was_saved() as saved:
        from lcm_compile.output.images import Names

        requests, sources = read_requests(seed, out, asked, bundle)
        paths = paths_for(requests, Names(), out)
        refuse_replacing(paths, sources)
        if seed is None:
            note(f"seed {requests[0].seed}")
        draw_pictures(pipeline, bundle, requests, paths, saved, as_json)


def read_requests(
    seeds: Sequence[int] | None, out: Path | None, asked: dict[str, Any], bundle: EngineBundle | None = None
) -> tuple[list[Request], list[Path]]:
    """Returns a request for each picture that is asked for, and the paths of the pictures they begin at.

    Without `seeds` a random one is drawn. If a bundle is given, it is checked whether it can draw them.
    Raises UsageError if a picture can't be read, `out` is one of them, or a request can't be drawn.
    """
    from lcm_compile.pipeline.check import check_request
    from lcm_compile.pipeline.request import draw_seed, requests_for

    sources = open_images(asked)
    refuse_replacing([] if out is None else [out], sources)
    first, *more = seeds or [draw_seed()]
    requests = requests_for([first, *more] if more else first, **asked)
    if bundle is not None:
        check_request(bundle, requests[0])  # which differ in their seeds alone
        note_remarks(bundle, requests[0])
    return requests, sources


def paths_for(
    requests: Sequence[Request], names: Names, out: Path | None, others: bool = False
) -> list[Path]:
    """Returns the paths of pictures, each of one request, after making their folder.

    Several pictures of one seed are numbered in a folder, which is in `out` if it holds `others` too. One
    picture, and each of several seeds, is named after its prompt and seed. Raises UsageError if they can't be
    written there.
    """
    from lcm_compile.output.images import paths_in, picture_paths

    first = requests[0]
    image = next((one.sha256 for one in (first.image, first.ip_image) if one), "")
    if len({request.seed for request in requests}) > 1:
        own = [names.name(request.prompt, request.seed, image) for request in requests]
        return paths_in(Path() if out is None else out, own)
    name = names.name(first.prompt, first.seed, image)
    if len(requests) < first.num_images:
        name += f"-{first.index or 0:03d}"
    place = out / name if others and out is not None and len(requests) > 1 else out
    return picture_paths(place, name, len(requests))


def draw_lines(
    bundle: EngineBundle, requests: Sequence[Request], new_seeds: bool, out: Path | None, as_json: bool
) -> None:
    """Draws these requests for each line of stdin, which is their prompt.

    `new_seeds` gives each prompt a random seed of its own. Raises UsageError if `out` is not a folder.
    """
    from lcm_compile.output.images import Names
    from lcm_compile.pipeline.load import load
    from lcm_compile.pipeline.request import draw_seed
    from lcm_compile.system.files import text_lines

    if out is not None and not out.is_dir():
        raise UsageError(f"--out {out} is no folder, and --stdin may give many pictures", f"mkdir {out}")
    names = Names()
    with load(bundle, wait=False) as pipeline, telling_what_was_saved() as saved:
        for line in text_lines(sys.stdin.buffer, "stdin"):
            if line.strip():
                own = [replace(request, prompt=line.strip()) for request in requests]
                if new_seeds:
                    seed = draw_seed()
                    own = [replace(request, seed=seed) for request in own]
                paths = paths_for(own, names, out, others=True)
                draw_pictures(pipeline, bundle, own, paths, saved, as_json, one_line=True)


def draw_again(
    picture: Path,
    given: dict[str, Any],
    folder: Path | None,
    base: str | None,
    gpu: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Draws the picture that a file holds again, with the settings that the file tells.

    The `given` settings replace its own, and the bundle that the options name replaces the one that drew it.
    Raises LcmCompileError if the file holds no settings, or if the bundle is not known here.
    """
    from lcm_compile.commands.find_bundle import find_bundle, find_drawer
    from lcm_compile.output.console import note
    from lcm_compile.output.images import picture_paths
    from lcm_compile.output.picture_settings import digests_of, larger_digest, read_origin
    from lcm_compile.pipeline.check import check_request
    from lcm_compile.pipeline.load import load

    origin = read_origin(picture)
    named = folder is not None or base is not None or gpu is not None
    bundle = find_bundle(folder, base, gpu) if named else find_drawer(picture, origin.bundle, origin.model)
    if "loras" not in given and digests_of(origin.request.loras) != origin.lora_sha256:
        files = ", ".join(lora.source for lora in origin.request.loras)
        raise UsageError(f"{files} is not what drew {picture}: its content is another", "give --lora FILE")
    folders = picture.parent, Path()
    request = with_images(origin.request, given, folders)
    check_request(bundle, request)
    same = request.hires != origin.request.hires or origin.larger == larger_digest(bundle, request)
    if bundle.digest != origin.bundle or not same:
        note(f"warning: another bundle drew {picture}, so this picture may differ from it", always=True)
    note_remarks(bundle, request)
    paths = picture_paths(out, f"{picture.stem}-again", 1)
    refuse_replacing(paths, [folder / one.name for folder in folders for one in sources_of(request)])
    with load(bundle, wait=False) as pipeline, telling_what_was_saved() as saved:
        draw_pictures(pipeline, bundle, [request], paths, saved, as_json)


@contextlib.contextmanager
def telling_what_was_saved() -> Iterator[list[Path]]:
    """Yields a list for the paths of saved pictures. If the block is stopped, it tells how many there are.

    Raises Interrupted for Ctrl-C after the first picture.
    """
    from lcm_compile.output.console import note

    saved: list[Path] = []
    try:
        yield saved
    except BaseException as stop:
        if not saved:
            raise
        count = f"{len(saved)} pictures were" if len(saved) > 1 else "1 picture was"
        text = f"{count} saved, the last as {saved[-1]}"
        if isinstance(stop, KeyboardInterrupt):
            raise Interrupted(f"interrupted; {text}") from stop
        if isinstance(stop, Exception) and not isinstance(stop, BrokenPipeError):
            note(text)
        raise


def draw_pictures(
    pipeline: Pipeline,
    bundle: EngineBundle,
    requests: Sequence[Request],
    paths: Sequence[Path],
    saved: list[Path],
    as_json: bool,
    one_line: bool = False,
) -> None:
    """Draws requests of one picture each into files, each as soon as it is drawn, and prints their paths.

    They differ in their seeds and indices alone. Each path is added to `saved` when its picture is there.
    """
    from PIL import Image

    from lcm_compile.output.console import Bar, note, print_json
    from lcm_compile.output.images import save_picture
    from lcm_compile.output.picture_settings import control_facts, origin_of, parameters, settings_of
    from lcm_compile.pipeline.drawing import warning_of_one_colour

    note_syntax(requests[0])
    pipeline.prompts.loras.told = note_error
    places = zip(paths, requests, strict=True)

    def save(pictures: np.ndarray) -> None:
        if warning := warning_of_one_colour(pictures):
            note(f"warning: {warning}", always=True)
        for picture in pictures:
            path, request = next(places)
            origin = origin_of(bundle, request)
            image = Image.fromarray(picture)
            save_picture(image, path, settings_of(origin), parameters(origin, *image.size))
            saved.append(path)

    with Bar("drawing") as bar:
        drawing = pipeline.draw(requests, bar.update, save)
    warn_of_cut(bundle, drawing.cut)
    if as_json:
        first, weights = requests[0], bundle.manifest.pipeline.few_step
        print_json(
            {
                "prompt": first.prompt,
                "images": [
                    {"path": str(path), "seed": request.seed, "index": request.index}
                    for path, request in zip(paths, requests, strict=True)
                ],
                "sampler": first.sampler,
                "steps": first.steps,
                "guidance_scale": first.guidance_scale,
                "eta": first.eta,
                **told(origin_of(bundle, first).request),
                "lora_weights": {lora.source: lora.effective for lora in first.lora_weights},
                "loras": [str(lora) for lora in first.loras],
                "control": control_facts(origin_of(bundle, first).request),
                "few_step": weights.name if weights else None,
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


def note_error(path: Path, rank: int, error: float) -> None:
    """Writes to stderr how much of a LoRA a slot has no room for."""
    from lcm_compile.output.console import note
    from lcm_compile.pipeline.loras import error_text

    if is_first(text := error_text(path, rank, error)):  # a second pass tells it again
        note(f"warning: {text}", always=True)


def timing_line(ms: Mapping[str, Any]) -> str:
    """Returns a line with the milliseconds of a picture and of its stages."""
    if "step" not in ms:  # one graph draws everything
        return f"{ms['total']:.0f} ms"
    pictures = {"image": ENCODE_IMAGE, "ip-image": IP_IMAGE, "adapter": T2I_ADAPTERS[0]}
    image = "".join(f"{called} {ms[name]:.0f}, " for called, name in pictures.items() if name in ms)
    return (
        f"{ms['total']:.0f} ms ({image}encode {ms['encode'] + ms['context']:.0f}, "
        f"{len(ms['step'])} steps {sum(ms['step']):.0f}, decode {ms['decode']:.0f})"
    )


def is_given(context: click.Context, parameter: str) -> bool:
    """Returns whether a parameter is on the command line."""
    return context.get_parameter_source(parameter) is ParameterSource.COMMANDLINE


def read_axes(context: click.Context, grid: str) -> tuple[Axis, ...]:
    """Returns the axes of --grid. Raises UsageError for an option that one of the axes sets too."""
    from lcm_compile.output.grid import FIELDS, parse_grid

    axes = parse_grid(grid)
    for parameter in (*(FIELDS[axis.name] for axis in axes), "num_images", "index"):
        if is_given(context, parameter):
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
    from lcm_compile.output.picture_settings import origin_of, settings_of
    from lcm_compile.pipeline.check import check_request
    from lcm_compile.pipeline.load import load

    asked = requests(axes, fixed)
    for request in asked:
        check_request(bundle, request)
    for request in asked:
        note_syntax(request)
    path = sheet_path(out, fixed.prompt)
    note_remarks(bundle, max(asked, key=lambda request: request.guidance_scale))
    with load(bundle) as pipeline, Bar("drawing") as bar:
        sheet, drawings = draw_grid(pipeline, axes, fixed, bar.update)
    warn_of_cut(bundle, max((drawing.cut for drawing in drawings), key=len))
    varied = [FIELDS[axis.name] for axis in axes]
    settings = settings_of(origin_of(bundle, fixed))
    settings["request"] = {name: value for name, value in settings["request"].items() if name not in varied}
    save_picture(sheet, path, {"grid": grid, **settings})
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
    from lcm_compile.output.hints import drawing_hints
    from lcm_compile.output.reports import loss_lines

    manifest = bundle.manifest
    for hint in drawing_hints(manifest, request, bundle.folder.name):
        note(f"hint: {hint}")
    if weights := manifest.spec.weights:
        note(f"warning: {bundle.folder.name} has {weights} weights: its pictures are noise", always=True)
    for line in loss_lines(manifest.lossy):
        note(line)


def note_syntax(request: Request) -> None:
    """Writes a hint to stderr if a prompt looks like another syntax's; a command writes one at most."""
    from lcm_compile.output.console import note
    from lcm_compile.pipeline.syntax import hint_of

    hints = [hint for prompt in request.prompts if (hint := hint_of(prompt))]
    if hints and request.prompt_syntax == "plain" and is_first("hint of a syntax"):
        note(f"hint: {hints[0]}")


def is_first(what: str) -> bool:
    """Returns whether the running command asks for the first time whether this is the first."""
    told = click.get_current_context().meta.setdefault(TOLD, set())
    first = what not in told
    told.add(what)
    return first


def warn_of_cut(bundle: EngineBundle, cut: str) -> None:
    """Warns of the end of a prompt that did not fit, even with --quiet, because it changes the picture."""
    from lcm_compile.output.console import note
    from lcm_compile.spec import CHUNK_TOKENS, MOST_CHUNKS

    if cut:
        shown = cut if len(cut) <= CUT_SHOWN else f"{cut[:CUT_SHOWN]}…"
        longest = bundle.manifest.pipeline.tokenizers[0].length
        note(f"warning: the prompt is over {longest} tokens; cut: {shown!r}", always=True)
        if longest < CHUNK_TOKENS * MOST_CHUNKS and is_first("hint of more tokens"):
            note(f"hint: build --prompt-tokens {longest + CHUNK_TOKENS} makes a bundle that reads more")
