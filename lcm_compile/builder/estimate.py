"""Estimates how much disk, memory and time a build will take, before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lcm_compile.builder.plan import GRAPH, ExportPlan, Plan
from lcm_compile.bundles.export_manifest import Export
from lcm_compile.checkpoint.checkpoint import Component
from lcm_compile.checkpoint.controlnet import controls_of
from lcm_compile.checkpoint.t2i_adapter import adapters_of
from lcm_compile.checkpoint.weight_files import read_header
from lcm_compile.spec import Shape
from lcm_compile.stages.contracts import MODEL_STAGES, main_stage, models_in

# Bytes per weight on the disk, by the precision of the products. With fp8 only the weights of Linear layers
# take 1 byte: they are 0.87 of SDXL's UNet and 0.31 of SD1.5's.
STORED_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1.5}
# The share by which transformed weights of convolutions (see engines/winograd) make a bundle larger, measured
# on SD1.5 in bf16 and fp32.
TRANSFORMED = {"fp32": 0.5, "bf16": 0.24}
# The decoder's share of a VAE's weights: 49.5 of the 83.7 M weights of Stable Diffusion's.
DECODER = 0.6
# Memory, measured on SD1.5 and SDXL at full size (benchmarks/results/full-size.md).
LIBRARIES = 0.5e9  # bytes: the libraries and the memory that they keep for themselves
PER_WEIGHT = 4.4  # bytes for each weight, while torch computes with it in fp32 or it is compiled
# Bytes: ONNX Runtime computes the fp16 twin (a second graph for small pictures) in fp32, and keeps the fp32
# copies of the weights.
CHECKING = 2.8e9
# Seconds on 2 cores, measured on the same models.
START = 15  # to start the processes that make one model's stages, if the model is large
PER_MILLION = 0.05  # to load, fuse and export a million weights
DRAWING = 0.008  # to compute with a million weights of the UNet for a picture of 256×256
ENGINE = 0.07  # to build and check a million weights for a GPU that is not in this machine
DECODING = 9  # to decode a picture of 256×256 with the VAE
SMALL = 14  # the complete build of a model that is made in one process
COMPILING = 40  # to compile one stage with aotinductor
DRAWN = 256 * 256  # pixels of the picture that DRAWING and DECODING are for
# Seconds to build from an export.
FINISHING = 3  # whatever the model
BUILDING = 0.025  # to build the engines of a million weights


@dataclass(frozen=True)
class Estimate:
    """What one build takes.

    `disk_bytes` is the most that lies on the disk during the build, `bundle_bytes` the size of the finished
    bundle, `memory_bytes` the peak of anonymous memory, and `seconds` the time on 2 cores.
    """

    disk_bytes: int
    bundle_bytes: int
    memory_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, for JSON."""
        return vars(self)


def estimate(export: ExportPlan) -> Estimate:
    """Estimates a build of one bundle whose graphs are made from a checkpoint.

    Raises CheckpointError if a weight file is damaged.
    """
    components = export.checkpoint.components
    weights = {
        model: sum(parameters(components[name]) for name in MODEL_STAGES[model][1] if name in components)
        for model in models_in(export.checkpoint)
    }
    weights["vae"] = int(weights["vae"] * (1 if export.spec.image else DECODER))
    stored = {model: STORED_BYTES[export.precisions[main_stage(model)].product] for model in weights}
    engines = sum(stored[model] * count for model, count in weights.items())
    # Both are counted as the UNet's, and may not be in 8 bits.
    for name in (*controls_of(export.checkpoint), *adapters_of(export.checkpoint)):
        wider = STORED_BYTES[export.precisions[name].product] - stored["unet"]
        engines += wider * parameters(components[name])
    engines = int(engines)
    # A large model's stages are in memory one at a time, a small model's all at once.
    one_at_a_time = export.is_large and not export.spec.whole_loop
    largest = max(weights.values()) if one_at_a_time else sum(weights.values())
    checking = CHECKING if export.is_large and export.checked == GRAPH else 0
    memory = LIBRARIES * (not checking) + checking + PER_WEIGHT * largest
    return Estimate(2 * engines, engines, int(memory), seconds(export, weights))


def seconds(export: ExportPlan, weights: Mapping[str, int]) -> float:
    """Returns the seconds that the build takes, given the number of weights of each model.

    The figures are a fit to few models on one machine: a faster machine needs less.
    """
    compiling = COMPILING * len(export.precisions) if export.graph_format == "torch_export" else 0
    if not export.is_large:
        return float(SMALL + compiling)
    engine = ENGINE if export.checked == GRAPH else 0
    making = sum(START + (PER_MILLION + engine) * count / 1e6 for count in weights.values())
    return compiling + making + drawing(export.proof_shape, weights["unet"])


def drawing(shape: Shape, unet: float) -> float:
    """Returns the seconds that a large model takes for pictures of a shape; `unet` is its UNet's weights."""
    return shape.height * shape.width * shape.batch / DRAWN * (DRAWING * unet / 1e6 + DECODING)


def estimate_plan(plan: Plan) -> Estimate:
    """Estimates a plan's build. Raises CheckpointError if a weight file is damaged."""
    cost = estimate(plan.source) if isinstance(plan.source, ExportPlan) else estimate_from(plan.source, plan)
    if set(plan.options.get("winograd", {}).values()) <= {"direct"}:
        return cost
    source = plan.source
    step = source.precisions["step"] if isinstance(source, ExportPlan) else source.manifest.precision
    more = int(cost.bundle_bytes * TRANSFORMED[step.floats])
    return replace(cost, disk_bytes=cost.disk_bytes + more, bundle_bytes=cost.bundle_bytes + more)


def estimate_from(export: Export, plan: Plan) -> Estimate:
    """Estimates a build from an existing export, by the sizes of its graphs."""
    manifest = export.manifest
    sizes, weights = [], {}
    for stage in manifest.stages:
        graph = export.graph(stage)
        sizes.append(sum(path.stat().st_size for path in (graph.path, graph.weights) if path.is_file()))
        weights[stage.contract.name] = sizes[-1] / STORED_BYTES[stage.precision.product]
    largest = max(weights.values()) if manifest.is_large else sum(weights.values())
    compiling = COMPILING * len(weights) if manifest.graph_format == "torch_export" else 0
    taken = FINISHING + compiling + BUILDING * sum(weights.values()) / 1e6
    if manifest.is_large and plan.backend.cannot_run(plan.target) is None:
        taken += drawing(manifest.pipeline.shape, largest)  # the engines are checked on the proof's picture
    return Estimate(sum(sizes), sum(sizes), int(LIBRARIES + PER_WEIGHT * largest), taken)


def disk_for(costs: Sequence[Estimate]) -> int:
    """Returns the most bytes that several builds take on the disk: all bundles, and one export at a time."""
    return sum(c.bundle_bytes for c in costs) + max(c.disk_bytes - c.bundle_bytes for c in costs)


def parameters(component: Component) -> int:
    """Returns the number of a model's weights, from its files' headers.

    It is its config's if it has no files, or if they are a control-LoRA's, which hold no complete weights.

    Raises CheckpointError if a file or the config can't be read.
    """
    if not component.files or component.changes_unet:
        from lcm_compile.checkpoint.empty_modules import empty_module

        return sum(weight.numel() for weight in empty_module(component).parameters())
    shapes = [
        shape
        for path in component.weight_files
        for key, shape in read_header(path)[0].items()
        if key.startswith(component.prefix)
    ]
    return sum(math.prod(shape) for shape in shapes)
