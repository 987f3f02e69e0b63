"""Checks in under 8 minutes which features of this package work on this machine's GPU.

`python -m lcm_compile.benchmarks.gpu.smoke --work DIR`

It checks which backends run. It builds and verifies the demo model and full-size SDXL with random weights on
`aotinductor`, and on ONNX Runtime's CUDA provider and TensorRT if their packages are installed. The engine
of every stage is compared with what torch computes in fp32; torch computes SDXL on this GPU, at the size of
the engines. It also checks whether this GPU runs an engine of TensorRT for RTX that names no compute
capability. Speed is measured by gpu_suite; items, folders and reports are the same as there. The results are
written to `benchmarks/results/gpu_smoke-<gpu>.json`.
"""

from __future__ import annotations

from pathlib import Path

import click

from lcm_compile.benchmarks.gpu import gpu_items, suite
from lcm_compile.benchmarks.gpu.gpu_items import Engines
from lcm_compile.benchmarks.gpu.items import Item, with_needs
from lcm_compile.engines import BACKENDS

BUDGET = 470.0  # seconds for all items
ON_GPU = (suite.FIRST, "onnxruntime", "tensorrt")


def checked(model: str, backend: str) -> tuple[Item, ...]:
    """Returns the items that build engines, and one that verifies all of them."""
    engines = Engines(model, backend)
    large = model != "demo"
    needs = (engines.name, f"{model}-proof") if large else (engines.name,)
    verify = Item(
        f"{engines.name}-verify", gpu_items.verify_model, (engines,), 15, 90, on_gpu=large, needs=needs
    )
    return (*suite.built(engines), verify)


# The most important items come first, because the time may run out. Backends for processors come last.
ITEMS = (
    suite.DOCTOR,
    suite.weights("demo", 60),
    *checked("demo", suite.FIRST),
    suite.weights("sdxl", 240),
    Item("sdxl-proof", gpu_items.record_proof, ("sdxl",), 40, 150, on_gpu=True, needs=("sdxl-weights",)),
    *checked("sdxl", suite.FIRST),
    Item("demo-tensorrt-rtx-portable", gpu_items.draw_portable, on_gpu=True),
    *(item for name in ON_GPU[1:] for item in checked("demo", name)),
    *(item for name in ON_GPU[1:] for item in checked("sdxl", name)),
    *(item for name in BACKENDS if name not in ON_GPU for item in checked("demo", name)),
)


@click.command()
@suite.run_options(ITEMS, BUDGET)
def main(only: tuple[str, ...], work: Path | None, results: Path, budget: float, device: str) -> None:
    """Check which features work on this machine; failures are in the report, and no error."""
    wanted = with_needs(only, ITEMS) if only else {item.name for item in ITEMS}
    items = [item for item in ITEMS if item.name in wanted]
    path, _ = suite.run_in(work, items, device, budget, only, "gpu_smoke", results)
    print(path)


if __name__ == "__main__":
    # Items are pickled with the name of their module, which must not be __main__ in the child processes.
    from lcm_compile.benchmarks.gpu.smoke import main as run

    run()
