"""Finds out in under 8 minutes what of this package works on this machine's GPU.

`python -m lcm_compile.benchmarks.gpu.smoke --work DIR`

Which backends run; the demo model and full-size random SDXL through `aotinductor`, and where their packages
are installed ONNX Runtime's CUDA provider and TensorRT, each with a whole `verify`: every stage's own engine
is compared with what torch computes in fp32, SDXL's on this GPU and at the size that is built. And whether
this GPU runs an engine of TensorRT for RTX that names no compute capability. Speed is gpu_suite's concern;
items, folders and reports are as there. What is found goes to `benchmarks/results/gpu_smoke-<gpu>.json`.
"""

from __future__ import annotations

from pathlib import Path

import click

from lcm_compile.benchmarks.gpu import gpu_items as does
from lcm_compile.benchmarks.gpu import suite as suite
from lcm_compile.benchmarks.gpu.gpu_items import Engines
from lcm_compile.benchmarks.gpu.items import Item, with_needs
from lcm_compile.engines import BACKENDS

BUDGET = 470.0  # seconds
ON_GPU = (suite.FIRST, "onnxruntime", "tensorrt")


def checked(model: str, backend: str) -> tuple[Item, Item]:
    """An item that builds engines, and one that verifies all of them."""
    engines = Engines(model, backend)
    large = model != "demo"
    needs = (engines.name, f"{model}-proof") if large else (engines.name,)
    verify = Item(f"{engines.name}-verify", does.verify_model, (engines,), 15, 90, on_gpu=large, needs=needs)
    return suite.built(engines), verify


# In the order of their worth: a budget may end before they do. Last what runs on processors alone.
ITEMS = (
    suite.DOCTOR,
    suite.weights("demo", 60),
    *checked("demo", suite.FIRST),
    suite.weights("sdxl", 240),
    Item("sdxl-proof", does.record_proof, ("sdxl",), 40, 150, on_gpu=True, needs=("sdxl-weights",)),
    *checked("sdxl", suite.FIRST),
    Item("demo-tensorrt-rtx-portable", does.draw_portable, on_gpu=True),
    *(item for name in ON_GPU[1:] for item in checked("demo", name)),
    *(item for name in ON_GPU[1:] for item in checked("sdxl", name)),
    *(item for name in BACKENDS if name not in ON_GPU for item in checked("demo", name)),
)


@click.command()
@click.option("--only", multiple=True, type=click.Choice([item.name for item in ITEMS]), help="Repeatable.")
@click.option("--work", type=click.Path(path_type=Path), help="Where weights and bundles are, and stay.")
@click.option("--budget", type=float, default=BUDGET, show_default=True, help="Seconds for all.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def main(only: tuple[str, ...], work: Path | None, budget: float, device: str) -> None:
    """Tries this machine; what does not work is in the report, and no error."""
    wanted = with_needs(only, ITEMS) if only else {item.name for item in ITEMS}
    items = [item for item in ITEMS if item.name in wanted]
    path, _ = suite.run_in(work, items, device, budget, only, "gpu_smoke")
    print(path)


if __name__ == "__main__":
    # Items are pickled by their module's name, which is not __main__ in the processes that run them.
    from lcm_compile.benchmarks.gpu.smoke import main as run

    run()
