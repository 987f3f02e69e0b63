"""Finds out in a few minutes how fast this machine's GPU is at what engines for it do.

`python -m lcm_compile.benchmarks.gpu.probe --results DIR --bundle BUNDLE`

It imports only torch, diffusers and this package. The parts come in the order of their worth, each a process
with its own limit, and the report in DIR is written after each of them: what the machine has for compiling,
copies and products, forms of attention, of upsampling and of group normalization, the engines of each
bundle, their time and how close they are to torch, whole pictures with CUDA graphs and without, in turn with
diffusers and with torch.compile, and what follows a product. Bundles may come without their weights, as
`make gpu-kit` packs them.
"""

from __future__ import annotations

from pathlib import Path

import click

from lcm_compile.benchmarks.gpu import probe_items, suite
from lcm_compile.benchmarks.gpu.items import Item

BUDGET = 420.0  # seconds for all parts
PARTS = (
    Item("facts", probe_items.facts, least=0, most=60, without_target=True),
    Item("ceilings", probe_items.ceilings, least=5, most=60),
    Item("attention", probe_items.attention, least=5, most=60),
    Item("forms", probe_items.forms, least=5, most=90),
)
# It decides whether engines that have what follows a product within Triton's are worth their compilation.
EPILOGUES = Item("epilogues", probe_items.epilogues, least=5, most=120)


def parts_of(bundles: tuple[Path, ...]) -> list[Item]:
    """Returns all parts: those of the machine, the engines and the pictures of each bundle, and the last."""
    found = [*PARTS]
    names = [folder.resolve().name for folder in bundles]
    for name, folder in zip(names, bundles, strict=True):
        found.append(Item(f"stages-{name}", probe_items.stages, (folder.resolve(),), 10, 120))
        found.append(Item(f"parity-{name}", probe_items.parity, (folder.resolve(),), 10, 120))
    for part, measure in (("pictures", probe_items.pictures), ("compiled", probe_items.against_compiled)):
        for name, folder in zip(names, bundles, strict=True):
            item = f"{part}-{name}"
            found.append(Item(item, measure, (item, folder.resolve()), 10, 240))
    return [*found, EPILOGUES]


@click.command()
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A bundle whose engines and pictures are measured; repeatable.",
)
@suite.run_options((), BUDGET)
def main(
    bundles: tuple[Path, ...],
    work: Path | None,
    results: Path,
    budget: float,
    device: str,
) -> None:
    """Measure this machine; failures are in the report, and no error."""
    path, _ = suite.run_in(work, parts_of(bundles), device, budget, (), "gpu_probe", results)
    print(path)


if __name__ == "__main__":
    # Parts are pickled with the name of their module, which must not be __main__ in the child processes.
    from lcm_compile.benchmarks.gpu.probe import main as run

    run()
