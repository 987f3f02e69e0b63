"""What a build will take of disk, memory and time, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_compile.builder.plan import GRAPH, ExportPlan, Plan
from lcm_compile.bundles.export_manifest import read_export
from lcm_compile.checkpoint.checkpoint import Component
from lcm_compile.checkpoint.single_file import read_header
from lcm_compile.spec import Shape
from lcm_compile.stages.contracts import MODEL_STAGES

# Of fp8 Linear layers alone are: 0.87 of SDXL's UNet, 0.31 of SD1.5's.
STORED_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1.5}
# The half of a VAE that draws: 49.5 of the 83.7 M weights of Stable Diffusion's.
DECODER = 0.6
# Measured on SD1.5 and SDXL at full size (benchmarks/results/full-size.md): libraries and what
# they keep for themselves, and bytes for each weight while it is drawn with in fp32 or compiled.
LIBRARIES, PER_WEIGHT = 0.5e9, 4.4
# ONNX Runtime computes an fp16 twin in fp32, and keeps what it unpacks.
CHECKING = 2.8e9
# Seconds on 2 cores, measured likewise: for the processes that make the stages of a large model's part; for
# loading, fusing and exporting a million weights; for computing with as many for a picture of 256×256; for
# building and checking them for a GPU that is not here; for drawing such a picture with the VAE.
START, PER_MILLION, DRAWING, ENGINE, DECODING = 15, 0.05, 0.008, 0.07, 9
SMALL = 14  # all of it, for a model that is made in one process
DRAWN = 256 * 256
# aotinductor compiles each stage for so long.
COMPILING = 40
# From an export: for whatever the model, and for building the engines of a million weights.
FINISHING, BUILDING = 3, 0.025


@dataclass(frozen=True)
class Estimate:
    """Bytes: on disk while a bundle is built, of the bundle, and of anonymous memory at the most."""

    disk_bytes: int
    bundle_bytes: int
    memory_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def estimate(export: ExportPlan) -> Estimate:
    """For one bundle. CheckpointError for a weight file that is damaged."""
    components = export.checkpoint.components
    weights = {
        part: sum(parameters(components[name]) for name in names if name in components)
        for part, (_, names) in MODEL_STAGES.items()
    }
    weights["vae"] = int(weights["vae"] * DECODER)
    engines = int(
        sum(
            STORED_BYTES[export.precisions[MODEL_STAGES[part][0][-1]].product] * count
            for part, count in weights.items()
        )
    )
    # One stage at a time is in memory where the model is large, else all of them.
    apart = export.is_large and not export.spec.whole_loop
    largest = max(weights.values()) if apart else sum(weights.values())
    checking = CHECKING if export.is_large and export.checked == GRAPH else 0
    memory = LIBRARIES * (not checking) + checking + PER_WEIGHT * largest
    return Estimate(2 * engines, engines, int(memory), seconds(export, weights))


def seconds(export: ExportPlan, weights: Mapping[str, int]) -> float:
    """How long all parts take together. A fit to few models on one machine: a faster one needs less."""
    compiling = COMPILING * len(export.precisions) if export.graph_format == "torch_export" else 0
    if not export.is_large:
        return float(SMALL + compiling)
    engine = ENGINE if export.checked == GRAPH else 0
    taken = {part: START + (PER_MILLION + engine) * count / 1e6 for part, count in weights.items()}
    return compiling + sum(taken.values()) + drawing(export.proof_shape, weights["unet"])


def drawing(shape: Shape, unet: float) -> float:
    """Seconds for a picture of a large model whose UNet has so many weights."""
    return shape.height * shape.width * shape.batch / DRAWN * (DRAWING * unet / 1e6 + DECODING)


def estimate_plan(plan: Plan, graphs: Path | None = None) -> Estimate:
    """For one bundle, from the base or from the export `graphs`; errors as estimate's and estimate_from's."""
    if graphs is not None:
        return estimate_from(graphs, plan)
    assert plan.export is not None
    return estimate(plan.export)


def estimate_from(graphs: Path, plan: Plan) -> Estimate:
    """For one bundle from an export, told by the sizes of its graphs. BundleError where that is broken."""
    export = read_export(graphs)
    sizes, weights = [], {}
    for stage in export.stages:
        graph = export.graph(graphs, stage)
        sizes.append(sum(path.stat().st_size for path in (graph.path, graph.weights) if path.is_file()))
        weights[stage.contract.name] = sizes[-1] / STORED_BYTES[stage.precision.product]
    largest = max(weights.values()) if export.is_large else sum(weights.values())
    compiling = COMPILING * len(weights) if export.graph_format == "torch_export" else 0
    taken = FINISHING + compiling + BUILDING * sum(weights.values()) / 1e6
    if export.is_large and plan.backend.cannot_run(plan.target) is None:
        taken += drawing(export.pipeline.shape, largest)  # the proof
    return Estimate(sum(sizes), sum(sizes), int(LIBRARIES + PER_WEIGHT * largest), taken)


def disk_for(costs: Sequence[Estimate]) -> int:
    """Bytes that several builds of one command take at the most: all bundles, and one export at a time."""
    return sum(c.bundle_bytes for c in costs) + max(c.disk_bytes - c.bundle_bytes for c in costs)


def parameters(component: Component) -> int:
    """How many weights a model has: by its files' headers, or by its architecture where there are none."""
    if not component.files:
        from lcm_compile.checkpoint.empty_modules import empty_module

        return sum(weight.numel() for weight in empty_module(component).parameters())
    shapes = [
        shape
        for path in component.files
        if path.suffix == ".safetensors"
        for key, shape in read_header(path)[0].items()
        if key.startswith(component.prefix)
    ]
    return sum(math.prod(shape) for shape in shapes)
