"""Measures the speed of this machine's GPU, and checks which backends run on it, in under 9 minutes.

`python -m lcm_compile.benchmarks.gpu.suite --work DIR`

It first measures full-size models with random weights, and then runs the demo model on every backend. `items`
describes how each item is isolated. The results are written to `benchmarks/results/gpu_suite-<gpu>.json`,
and the raw samples of each benchmark to files next to it. The same command with the same `--work` continues
where the last run stopped: items that succeeded are not run again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import click

from lcm_compile.benchmarks.gpu import gpu_items
from lcm_compile.benchmarks.gpu.gpu_items import Engines
from lcm_compile.benchmarks.gpu.items import Found, Item, run_items, summary_line, with_needs
from lcm_compile.engines import BACKENDS
from lcm_compile.output.console import print_table

# Where the reports are kept in a clone.
RESULTS = Path(__file__).parents[1] / "results"
MACHINE = Item("machine", gpu_items.examine_machine, least=0, most=60)
GPU_BACKENDS = [name for name in BACKENDS if name != "torchscript"]
FIRST = "aotinductor"  # needs only torch to run; to build, also CUDA's headers and a C++ compiler
TENSORRT = ("tensorrt", "tensorrt-rtx")
DOCTOR = Item("doctor", gpu_items.examine_backends, most=150, without_target=True)
# The least seconds in which the engine of a large model's stage is begun, and the most that it may take.
STAGE_LIMITS = {"encode": (10, 90), "context": (5, 60), "step": (60, 270), "decode": (30, 150)}


def weights(model: str, most: float) -> Item:
    """Returns an item that writes the weights of a model, in at most `most` seconds."""
    return Item(f"{model}-weights", gpu_items.write_weights, (model,), most / 4, most, on_gpu=model != "demo")


def built(engines: Engines) -> tuple[Item, ...]:
    """Returns the items that build engines; the last one has their name.

    A large model is exported by one item, and each stage is built by one: what takes too long costs no other.
    """
    name = engines.name
    needs: tuple[str, ...] = (f"{engines.model}-weights",)
    if engines.model == "demo":
        return (Item(name, gpu_items.build_model, (engines,), 20, 200, needs=needs),)
    parts = [Item(f"{name}-export", gpu_items.export_model, (engines,), 60, 240, on_gpu=True, needs=needs)]
    needs = (parts[0].name,)
    for stage, limits in STAGE_LIMITS.items():
        item = f"{name}-{stage}"
        parts.append(Item(item, gpu_items.build_one, (engines, stage), *limits, on_gpu=True, needs=needs))
    needs = tuple(part.name for part in parts)
    return (*parts, Item(name, gpu_items.assemble_model, (engines,), 15, 120, on_gpu=True, needs=needs))


def measured(engines: Engines, *rivals: str) -> Item:
    """Returns an item that measures engines in turn with rivals."""
    name = f"{engines.name}-{rivals[-1]}"
    # torch.compile takes minutes to compile a UNet.
    limits = (120, 360) if any("compile" in rival for rival in rivals) else (30, 150)
    large = engines.model != "demo"
    return Item(
        name, gpu_items.measure, (name, engines, *rivals), *limits, on_gpu=large, needs=(engines.name,)
    )


def graphs(engines: Engines) -> Item:
    """Returns an item that compares engines with and without CUDA graphs."""
    name, large = f"{engines.name}-graph", engines.model != "demo"
    return Item(name, gpu_items.compare_graphs, (engines,), 20, 90, on_gpu=large, needs=(engines.name,))


def both(engines: Engines) -> tuple[Item, ...]:
    """Returns the items that build engines, and measure them in turn with diffusers."""
    return (*built(engines), measured(engines, "eager"))


def each(engines: Engines) -> tuple[Item, ...]:
    """Returns the items of `both`, and the comparison with and without CUDA graphs."""
    return (*both(engines), graphs(engines))


# The most important items come first, because the time may run out. Of the 8-bit types fp8 comes first: on
# one GPU that has both, int8 was slower than fp16. On a GPU without fp8 its items end at once.
SDXL, SD15 = Engines("sdxl", FIRST), Engines("sd15", FIRST)
SPEED = (
    weights("sdxl", 240),
    *each(SDXL),
    measured(SDXL, "eager", "compile"),
    *both(Engines("sdxl", FIRST, precision="fp8")),
    *each(Engines("sdxl", "tensorrt")),
    *both(Engines("sdxl", "tensorrt", precision="fp8")),
    *each(Engines("sdxl", "onnxruntime")),
    *each(Engines("sdxl", "tensorrt-rtx")),
    *both(Engines("sdxl", "tensorrt-rtx", precision="fp8")),
    *both(Engines("sdxl", FIRST, 4)),
    *both(Engines("sdxl", FIRST, 8)),
    *(item for name in TENSORRT for item in both(Engines("sdxl", name, precision="int8"))),
    measured(SDXL, "compile-max"),
    weights("sd15", 120),
    *built(SD15),
    measured(SD15, "eager", "compile"),
    graphs(SD15),
)
WHICH_RUN = (
    DOCTOR,
    weights("demo", 60),
    *(item for name in GPU_BACKENDS for item in each(Engines("demo", name))),
    Item("demo-tensorrt-rtx-portable", gpu_items.draw_portable, on_gpu=True),
)
GROUPS = {"speed": SPEED, "backends": WHICH_RUN}
ITEMS = (*SPEED, *WHICH_RUN)


def print_measured(found: dict[str, Found]) -> None:
    """Prints a table of the measured pictures and one of their stages, of at most 80 columns."""
    measured = {name: results for name, results in found.items() if "summary" in results}
    if not measured:
        return
    print()
    header = ("a picture, or batch", "ms", "limit", "per s", "eager", "compile", "dB")
    print_table(header, [picture_row(name, results) for name, results in measured.items()])
    print()
    stages = ("ms (share of the limit)", "encode", "context", "step × 4", "decode")
    print_table(stages, [stage_row(name, results) for name, results in measured.items()])


def picture_row(name: str, results: Found) -> tuple[str, ...]:
    """Returns the row of an item in the table of pictures."""
    summary, db = results["summary"], results.get("psnr_db")
    picture = summary["cases"]["picture"]
    rivals = (picture["rivals"].get(rival) for rival in ("eager", "compile"))
    return (
        name,
        f"{picture['median']:.1f}",
        "" if results["limit_ms"] is None else f"{results['limit_ms']:.1f}",
        f"{summary['pictures_a_second']:.2f}",
        *("" if rival is None else f"{rival['ratio']:.2f}×" for rival in rivals),
        "" if db is None else f"{db:.0f}",
    )


def stage_row(name: str, results: Found) -> tuple[str, ...]:
    """Returns the row of an item in the table of stages."""
    row = [name]
    for stage in ("encode", "context", "step", "decode"):
        case = results["summary"]["cases"].get(stage)
        share = "" if case is None or case["share"] is None else f" ({case['share']:.0%})"
        row.append("" if case is None else f"{case['median']:.1f}{share}")
    return tuple(row)


def run_in(
    work: Path | None,
    items: Sequence[Item],
    device: str,
    budget: float,
    again: Collection[str],
    name: str,
    results: Path,
) -> tuple[Path, dict[str, Found]]:
    """Runs items in `work`, or in a temporary folder, and prints a line for each. Reports go to `results`.

    Returns the path of the report, and the results of each item. See run_items.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-suite-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) if work is None else work.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        results.mkdir(parents=True, exist_ok=True)
        path, found = run_items(MACHINE, items, device, budget, results, folder, again, name)
    print("\n".join(summary_line(name, one) for name, one in found.items()))
    return path, found


def run_options(items: Sequence[Item], budget: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds --work, --results, --budget and --device to a command, and --only.

    `budget` is the default of --budget, in seconds. Without items there is no --only.
    """
    only = click.option(
        "--only",
        multiple=True,
        type=click.Choice([item.name for item in items]),
        help="Run only this item and those that it needs; repeatable.",
    )
    options = (
        *([only] if items else []),
        click.option(
            "--results",
            type=click.Path(path_type=Path),
            default=RESULTS,
            help="Folder of the reports; by default benchmarks/results.",
        ),
        click.option(
            "--work",
            type=click.Path(path_type=Path),
            help="Folder in which weights and bundles stay; by default a temporary one.",
        ),
        click.option(
            "--budget", type=float, default=budget, show_default=True, help="Seconds for all items together."
        ),
        click.option(
            "--device",
            type=click.Choice(["cuda", "cpu"]),
            default="cuda",
            show_default=True,
            help="Device to use.",
        ),
    )

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@click.option("--part", type=click.Choice(list(GROUPS)), help="Run only these items; by default all.")
@run_options(ITEMS, 510)
def main(
    part: str | None, only: tuple[str, ...], work: Path | None, results: Path, budget: float, device: str
) -> None:
    """Measure this machine; failures are in the report, and no error."""
    chosen = GROUPS[part] if part else ITEMS
    wanted = with_needs(only, ITEMS) if only else {item.name for item in chosen}
    items = [item for item in ITEMS if item.name in wanted]
    path, found = run_in(work, items, device, budget, only, "gpu_suite", results)
    print_measured(found)
    print(path)


if __name__ == "__main__":
    # Items are pickled with the name of their module, which must not be __main__ in the child processes.
    from lcm_compile.benchmarks.gpu.suite import main as run

    run()
