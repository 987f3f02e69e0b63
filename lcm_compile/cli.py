"""The command. stdout is data, stderr is progress and hints.

Exit codes: 0 ok · 1 this machine or these files · 2 usage · 3 a parity gate · 130 interrupted.
Everything heavy is imported inside the commands: `--help` costs Python and click.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click
from click.core import ParameterSource

import lcm_compile
from lcm_compile.errors import LcmCompileError, ParityError
from lcm_compile.options import json_option, quiet_option
from lcm_compile.training.commands import distill, train_lora

if TYPE_CHECKING:
    from lcm_compile.bundle import EngineBundle
    from lcm_compile.grid import Axis
    from lcm_compile.pipeline import Request

GUIDANCE_HINT = 2.0
CUT_SHOWN = 200
NO_ACCESS = "ls -ld shows who may use it; --out and LCM_COMPILE_HOME choose where things are written"


def main() -> NoReturn:
    """Runs the command and turns every error into a message and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths go out as the bytes they came in as
    try:
        cli.main(prog_name="lcm-compile", standalone_mode=False)
    except LcmCompileError as error:
        fail(error.message, error.hint, error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted; nothing was written", None, 130)
    except BrokenPipeError:
        sys.stdout = None  # type: ignore[assignment]
        sys.exit(0)
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        hint = {
            errno.ENOSPC: "free some room, or point --out or LCM_COMPILE_HOME at another disk",
            errno.EDQUOT: "free some room, or point --out or LCM_COMPILE_HOME at another disk",
            errno.EACCES: NO_ACCESS,
            errno.EPERM: NO_ACCESS,
            errno.EROFS: NO_ACCESS,
            errno.ENOTDIR: NO_ACCESS,
            errno.EEXIST: NO_ACCESS,
            errno.ENAMETOOLONG: "give a shorter name",
        }.get(error.errno or 0)
        fail(what, hint, 1)
    except Exception as error:
        # torch and ONNX Runtime have no error of their own for it.
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            fail("out of memory", "ask for less: a smaller size, batch or number of pictures", 1)
        fail(
            f"internal error: {type(error).__name__}: {error}",
            "LCM_COMPILE_DEBUG=1 shows where; please report it",
            1,
        )
    sys.exit(0)


def fail(message: str, hint: str | None, code: int) -> NoReturn:
    if os.environ.get("LCM_COMPILE_DEBUG") == "1":
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"  try: {hint}", file=sys.stderr)
    sys.exit(code)


class CommandsInOrder(click.Group):
    """Lists the commands as people use them, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=CommandsInOrder, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lcm_compile.__version__, prog_name="lcm-compile")
def cli() -> None:
    """Fuse an LCM-LoRA into Stable Diffusion, compile it for a named GPU, draw in 4 steps.

    \b
    lcm-compile build --base demo --gpu cpu
    lcm-compile run "a large red star on a striped pink background"
    """


@cli.command()
@click.option("--base", required=True, metavar="BASE", help="demo, a family (sdxl, sd15, …) or a folder.")
@click.option("--gpu", required=True, metavar="TARGET", help="See lcm-compile targets.")
@click.option("--lcm-lora", metavar="PATH[:W]", help="The LCM-LoRA; default: the family's own.")
@click.option("--no-lcm", is_flag=True, help="No LCM-LoRA: the base is an LCM already.")
@click.option("--lora", "loras", multiple=True, metavar="PATH[:W]", help="A style LoRA; may be repeated.")
@click.option("--height", type=int, help="Pixels; default: the checkpoint's size.")
@click.option("--width", type=int, help="Pixels; default: the checkpoint's size.")
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures in one call of the engines.")
@click.option("--precision", default="auto", show_default=True, help="auto, fp32, fp16 or bf16.")
@click.option("--backend", default="auto", show_default=True, help="auto, or one of lcm-compile doctor.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle; default: the store.")
@click.option("--force", is_flag=True, help="Build even if this very bundle exists.")
@click.option("--dry-run", is_flag=True, help="Print what would be done and why, and stop.")
@json_option
@quiet_option
def build(
    base: str,
    gpu: str,
    lcm_lora: str | None,
    no_lcm: bool,
    loras: tuple[str, ...],
    height: int | None,
    width: int | None,
    batch: int,
    precision: str,
    backend: str,
    out: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build a bundle of engines."""
    from lcm_compile.compile import build_planned
    from lcm_compile.console import Parts, note, print_json
    from lcm_compile.plan import make_plan
    from lcm_compile.reports import describe_bundle, print_plan, told_parity
    from lcm_compile.spec import BuildSpec, LoraSpec

    spec = BuildSpec(
        base=base,
        gpu=gpu,
        lcm_lora=LoraSpec.parse(lcm_lora) if lcm_lora is not None else None,
        no_lcm=no_lcm,
        loras=tuple(LoraSpec.parse(lora) for lora in loras),
        height=height,
        width=width,
        batch=batch,
        precision=precision,
        backend=backend,
    )
    plan = make_plan(spec, out, force)
    if dry_run:
        if as_json:
            print_json(plan.to_dict())
        else:
            print_plan(plan)
        return
    note(f"{'hit' if plan.hit else 'miss'}: {'; '.join(plan.reasons)}".replace(":;", ":"), quiet)
    with Parts(quiet) as parts:
        followed, bundle = build_planned(spec, out, force, parts)
    if followed.hit and not plan.hit:
        note(f"hit: another process built it; {'; '.join(followed.reasons)}", quiet)
    plan = followed
    if as_json:
        described = describe_bundle(bundle.folder, bundle.manifest, bundle.digest)
        print_json({**described, "hit": plan.hit, "reasons": list(plan.reasons)})
        return
    print(bundle.folder)
    if not plan.hit:
        note(f"built in {parts.seconds:.1f} s; {told_parity(bundle.manifest.parity)}", quiet)


@cli.command()
@click.argument("prompt", required=False)
@click.option("--engine", type=click.Path(path_type=Path), help="A bundle's folder.")
@click.option("--base", metavar="BASE", help="With --gpu: the bundle built for these.")
@click.option("--gpu", metavar="TARGET", help="With --base.")
@click.option("--negative-prompt", help="What the picture should not be; needs guidance above 1.")
@click.option("--steps", type=int, default=4, show_default=True)
@click.option("--guidance-scale", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, help="Default: drawn at random and printed.")
@click.option("--num-images", type=int, default=1, show_default=True)
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
    grid: str | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw a picture, or with --grid a labelled sheet of many.

    The axes of a grid are steps, seed, guidance and prompt=FILE (a prompt on each line): numbers as 1..8
    or 1,1.5. The first runs across the sheet.
    """
    from lcm_compile.console import Bar, note, print_json
    from lcm_compile.images import picture_paths, save_picture
    from lcm_compile.lookup import find_bundle
    from lcm_compile.pipeline import Request, draw_seed, load
    from lcm_compile.scheduler import lcm_timesteps

    bundle = find_bundle(engine, base, gpu)
    settings = bundle.manifest.pipeline
    prompt = settings.sample_prompt if prompt is None else prompt
    request = Request(
        prompt, draw_seed() if seed is None else seed, negative_prompt, steps, guidance_scale, num_images
    )
    if grid is not None:
        draw_sheet(bundle, request, grid, read_axes(context, grid), out, as_json, quiet)
        return
    lcm_timesteps(steps, settings.scheduler)
    paths = picture_paths(out, prompt, request.seed, num_images)
    hint_at(request, quiet)
    if seed is None:
        note(f"seed {request.seed}", quiet)
    with load(bundle) as pipeline, Bar("drawing", quiet) as bar:
        drawing = pipeline.draw(request, bar.update)
    warn_of_cut(bundle, drawing.cut)
    metadata = {**told(request), **made_by(bundle)}
    for i, (image, path) in enumerate(zip(drawing.images(), paths, strict=True)):
        save_picture(image, path, {**metadata, "index": str(i)})
    if as_json:
        print_json(
            {
                "images": [{"path": str(p), "seed": request.seed, "index": i} for i, p in enumerate(paths)],
                "steps": steps,
                "guidance_scale": guidance_scale,
                "engine": str(bundle.folder),
                "ms": drawing.ms,
            }
        )
        return
    for path in paths:
        print(path)
    ms = drawing.ms
    note(
        f"{ms['total']:.0f} ms (encode {ms['encode']:.0f}, {len(ms['step'])} steps {sum(ms['step']):.0f}, "
        f"decode {ms['decode']:.0f}) after {ms['load']:.0f} ms of loading",
        quiet,
    )


def read_axes(context: click.Context, grid: str) -> tuple[Axis, ...]:
    """The axes of --grid; UsageError for an option that sets what one of them sets too."""
    from lcm_compile.grid import FIELDS, parse_grid

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
    from lcm_compile.console import Bar, note, print_json
    from lcm_compile.grid import FIELDS, draw_grid, requests
    from lcm_compile.images import save_picture, sheet_path
    from lcm_compile.pipeline import load
    from lcm_compile.scheduler import lcm_timesteps

    asked = requests(axes, fixed)
    for request in asked:
        lcm_timesteps(request.steps, bundle.manifest.pipeline.scheduler)
    path = sheet_path(out, fixed.prompt)
    hint_at(max(asked, key=lambda request: request.guidance_scale), quiet)
    with load(bundle) as pipeline, Bar("drawing", quiet) as bar:
        sheet, drawings = draw_grid(pipeline, axes, fixed, bar.update)
    warn_of_cut(bundle, max((drawing.cut for drawing in drawings), key=len))
    varied = [FIELDS[axis.name] for axis in axes]
    shared = {name: value for name, value in told(fixed).items() if name not in varied}
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
    from lcm_compile.console import note

    scale = request.guidance_scale
    if scale > GUIDANCE_HINT:
        note(f"hint: LCM is at its best with guidance from 1 to 2; {scale:g} may look burnt", quiet)
    if request.negative_prompt and scale <= 1:
        note("hint: --negative-prompt does nothing at guidance 1; try --guidance-scale 1.5", quiet)


def warn_of_cut(bundle: EngineBundle, cut: str) -> None:
    """Tells the end of a prompt that did not fit; that is no hint, --quiet does not silence it."""
    from lcm_compile.console import note

    if cut:
        shown = cut if len(cut) <= CUT_SHOWN else f"{cut[:CUT_SHOWN]}…"
        longest = bundle.manifest.pipeline.tokenizers[0].max_length
        note(f"warning: the prompt is over {longest} tokens; cut: {shown!r}")


def told(request: Request) -> dict[str, str]:
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
    return {"bundle": bundle.digest, "software": f"lcm-compile {lcm_compile.__version__}"}


@cli.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@json_option
@quiet_option
def verify(bundle: Path | None, as_json: bool, quiet: bool) -> None:
    """Replay a bundle's proof on its engines here; exit 3 on a miss."""
    from lcm_compile.console import note, print_json
    from lcm_compile.lookup import find_bundle
    from lcm_compile.parity import require
    from lcm_compile.parity import verify as verify_bundle
    from lcm_compile.reports import print_parity

    found = find_bundle(bundle, None, None)
    note(f"verifying {found.folder}", quiet)
    figures = verify_bundle(found)
    if as_json:
        passed = all(figure.passed for figure in figures.values())
        stages = {name: {**figure.to_dict(), "passed": figure.passed} for name, figure in figures.items()}
        print_json({"bundle": str(found.folder), "passed": passed, "parity": stages})
    else:
        print_parity(figures)
    try:
        require(figures)
    except ParityError as error:
        error.hint = f"{found.manifest.spec.command()} --force"
        raise


@cli.command()
@click.argument("name")
@json_option
def inspect(name: str, as_json: bool) -> None:
    """Tell what a bundle holds, or where the demo model is."""
    from lcm_compile.console import print_json
    from lcm_compile.reports import describe_bundle, describe_demo, print_description

    if name == "demo":
        data = describe_demo()
    else:
        from lcm_compile.bundle import read_manifest

        manifest, digest = read_manifest(Path(name))
        data = describe_bundle(Path(name), manifest, digest)
    if as_json:
        print_json(data)
        return
    print_description(name, data)


@cli.command()
@json_option
def targets(as_json: bool) -> None:
    """List the GPUs that engines are built for."""
    from lcm_compile.console import print_json, print_table
    from lcm_compile.targets import GIB, TARGETS

    if as_json:
        print_json([target.to_dict() for target in TARGETS.values()])
        return
    print_table(
        ("target", "device", "capability", "memory", "computes in"),
        [
            (
                t.name,
                t.description,
                t.compute_capability or "",
                f"{t.memory_bytes // GIB} GiB" if t.memory_bytes else "",
                " ".join(t.precisions),
            )
            for t in TARGETS.values()
        ],
    )


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Find out which backends work here, by computing with each."""
    from lcm_compile.console import print_json, print_table
    from lcm_compile.doctor import examine

    found = examine()
    if as_json:
        print_json([diagnosis.to_dict() for diagnosis in found])
        return
    print_table(
        ("backend", "version", "runs here", "builds for", "why"),
        [
            (
                d.backend,
                (d.version or "").split(" ")[-1] or "missing",
                "yes" if d.runs else "no",
                f"{len(d.builds_for)} targets"
                if len(d.builds_for) > 1
                else "".join(d.builds_for) or "nothing",
                d.reason,
            )
            for d in found
        ],
    )


cli.add_command(distill)
cli.add_command(train_lora)
