"""Measures this machine's GPU, and finds out which backends run on it, in under 9 minutes.

`python -m lcm_compile.benchmarks.gpu.suite --work DIR`

First the speed of full-size models with random weights, then the demo model on every backend: see `items`
for how they are kept apart. What is measured goes to `benchmarks/results/gpu_suite-<gpu>.json`, and each
benchmark's raw samples beside it. The same command again goes on where the last one had to end: with the same
`--work`, what ended well is not done again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import click

from lcm_compile.benchmarks.gpu import gpu_items as does
from lcm_compile.benchmarks.gpu.gpu_items import Engines
from lcm_compile.benchmarks.gpu.items import Found, Item, run_items, summary_line, with_needs
from lcm_compile.engines import BACKENDS
from lcm_compile.output.console import print_table

RESULTS = Path(__file__).parents[1] / "results"
MACHINE = Item("machine", does.examine_machine, least=0, most=60)
GPU_BACKENDS = [name for name in BACKENDS if name != "torchscript"]
FIRST = "aotinductor"  # needs no package but torch; CUDA's toolkit and a C++ compiler to build
TENSORRT = ("tensorrt", "tensorrt-rtx")
DOCTOR = Item("doctor", does.examine_backends, most=150, without_target=True)


def weights(model: str, most: float) -> Item:
    return Item(f"{model}-weights", does.write_weights, (model,), most / 4, most, on_gpu=model != "demo")


def built(engines: Engines) -> Item:
    large = engines.model != "demo"
    limits = (100, 420) if large else (20, 200)
    needs = (f"{engines.model}-weights",)
    return Item(engines.name, does.build_model, (engines,), *limits, on_gpu=large, needs=needs)


def measured(engines: Engines, *rivals: str) -> Item:
    name = f"{engines.name}-{rivals[-1]}"
    # torch.compile compiles a UNet for minutes.
    limits = (120, 360) if "compile" in rivals else (30, 150)
    large = engines.model != "demo"
    return Item(name, does.measure, (name, engines, *rivals), *limits, on_gpu=large, needs=(engines.name,))


def graphs(engines: Engines) -> Item:
    """With CUDA graphs and without."""
    name, large = f"{engines.name}-graph", engines.model != "demo"
    return Item(name, does.compare_graphs, (engines,), 20, 90, on_gpu=large, needs=(engines.name,))


def both(engines: Engines) -> tuple[Item, Item]:
    return built(engines), measured(engines, "eager")


def each(engines: Engines) -> tuple[Item, ...]:
    return (*both(engines), graphs(engines))


# In the order of their worth: a budget may end before they do. Of 8 bits fp8 comes first: on one GPU that has
# both, int8 was slower than fp16. Where a GPU has no fp8 those items end at once.
SDXL, SD15 = Engines("sdxl", FIRST), Engines("sd15", FIRST)
SPEED = (
    weights("sdxl", 240),
    *each(SDXL),
    measured(SDXL, "eager", "compile"),
    *each(Engines("sdxl", "tensorrt")),
    *both(Engines("sdxl", "tensorrt", precision="fp8")),
    *each(Engines("sdxl", "onnxruntime")),
    *each(Engines("sdxl", "tensorrt-rtx")),
    *both(Engines("sdxl", "tensorrt-rtx", precision="fp8")),
    *both(Engines("sdxl", FIRST, 4)),
    *both(Engines("sdxl", FIRST, 8)),
    *(item for name in TENSORRT for item in both(Engines("sdxl", name, precision="int8"))),
    weights("sd15", 120),
    built(SD15),
    measured(SD15, "eager", "compile"),
    graphs(SD15),
)
WHICH_RUN = (
    DOCTOR,
    weights("demo", 60),
    *(item for name in GPU_BACKENDS for item in each(Engines("demo", name))),
    Item("demo-tensorrt-rtx-portable", does.draw_portable, on_gpu=True),
)
PARTS = {"speed": SPEED, "backends": WHICH_RUN}
ITEMS = (*SPEED, *WHICH_RUN)


def print_measured(found: dict[str, Found]) -> None:
    """Tables of at most 80 columns: pictures, and the stages that they consist of."""
    measured = {name: told for name, told in found.items() if "summary" in told}
    if not measured:
        return
    print()
    header = ("a picture, or batch", "ms", "limit", "per s", "eager", "compile", "dB")
    print_table(header, [picture_row(name, told) for name, told in measured.items()])
    print()
    stages = ("ms (share of the limit)", "encode", "context", "step × 4", "decode")
    print_table(stages, [stage_row(name, told) for name, told in measured.items()])


def picture_row(name: str, told: Found) -> tuple[str, ...]:
    summary, db = told["summary"], told.get("psnr_db")
    picture = summary["cases"]["picture"]
    rivals = (picture["rivals"].get(rival) for rival in ("eager", "compile"))
    return (
        name,
        f"{picture['median']:.1f}",
        "" if told["limit_ms"] is None else f"{told['limit_ms']:.1f}",
        f"{summary['pictures_a_second']:.2f}",
        *("" if rival is None else f"{rival['ratio']:.2f}×" for rival in rivals),
        "" if db is None else f"{db:.0f}",
    )


def stage_row(name: str, told: Found) -> tuple[str, ...]:
    row = [name]
    for stage in ("encode", "context", "step", "decode"):
        case = told["summary"]["cases"].get(stage)
        share = "" if case is None or case["share"] is None else f" ({case['share']:.0%})"
        row.append("" if case is None else f"{case['median']:.1f}{share}")
    return tuple(row)


def run_in(
    work: Path | None, items: Sequence[Item], device: str, budget: float, again: Collection[str], name: str
) -> tuple[Path, dict[str, Found]]:
    """Runs items in a folder, or one that goes afterwards, and prints a line for each."""
    with tempfile.TemporaryDirectory(prefix="gpu-suite-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) if work is None else work.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        path, found = run_items(MACHINE, items, device, budget, RESULTS, folder, again, name)
    print("\n".join(summary_line(name, told) for name, told in found.items()))
    return path, found


@click.command()
@click.option("--part", type=click.Choice(list(PARTS)), help="One of the two; both, unless it is given.")
@click.option("--only", multiple=True, type=click.Choice([item.name for item in ITEMS]), help="Repeatable.")
@click.option("--work", type=click.Path(path_type=Path), help="Where weights and bundles are, and stay.")
@click.option("--budget", type=float, default=510, show_default=True, help="Seconds for all.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(part: str | None, only: tuple[str, ...], work: Path | None, budget: float, device: str) -> None:
    """Measures this machine; what does not work is in the report, and no error."""
    asked = PARTS[part] if part else ITEMS
    wanted = with_needs(only, ITEMS) if only else {item.name for item in asked}
    items = [item for item in ITEMS if item.name in wanted]
    path, found = run_in(work, items, device, budget, only, "gpu_suite")
    print_measured(found)
    print(path)


if __name__ == "__main__":
    # Items are pickled by their module's name, which is not __main__ in the processes that run them.
    from lcm_compile.benchmarks.gpu.suite import main as run

    run()
