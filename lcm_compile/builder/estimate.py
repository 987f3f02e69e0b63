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
from lcm_compile.graphs import DRAW, ExportedGraph
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
# Bytes: the largest activations of a picture of 256×256, and the weights that ONNX Runtime converts to fp32
# at a time to compute an fp16 graph.
CHECKING = 2.4e9
# Seconds on 2 cores, measured on the same models.
START = 3  # to start what makes one model's stages, if the model is large
PER_MILLION = 0.04  # to load, fuse and export a million weights
DRAWING = 0.008  # to compute with a million weights of the UNet for a picture of 256×256
ENGINE = 0.033  # to build and check a million weights for a GPU that is not in this machine
DECODING = 9  # to decode a picture of 256×256 with the VAE
SMALL = 14  # the complete build of a model that is made in one process
COMPILING = 40  # to compile one stage with aotinductor
# The same for a GPU that is not in this machine: for each stage, and for a million of its weights. The last
# are the bytes of memory of g++, Triton and torch's libraries for GPUs.
COMPILING_WITHOUT_GPU, COMPILING_MILLION, COMPILERS = 50, 0.1, 1e9
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
    weights = weights_by_model(export)
    stored = {model: STORED_BYTES[export.precisions[main_stage(model)].product] for model in weights}
    engines = sum(stored[model] * count for model, count in weights.items())
    # Both are counted as the UNet's, and may not be in 8 bits.
    for name in (*controls_of(export.checkpoint), *adapters_of(export.checkpoint)):
        wider = STORED_BYTES[export.precisions[name].product] - stored["unet"]
        engines += wider * parameters(components[name])
    engines = int(engines)
    # A large model's stages are in memory one at a time, a small model's all at once.
    memory = memory_by_model(export).values()
    most = max(memory) if export.is_large else LIBRARIES + PER_WEIGHT * sum(weights.values())
    return Estimate(2 * engines, engines, int(most), seconds(export, weights))


def memory_by_model(export: ExportPlan) -> dict[str, int]:
    """Returns the bytes of memory that preparing each model takes; DRAW stands for all of them in one graph.

    Raises CheckpointError if a weight file is damaged.
    """
    weights = weights_by_model(export)
    if export.spec.whole_loop:
        weights = {DRAW: sum(weights.values())}
    return {model: max(memory_of(count), int(CHECKING)) for model, count in weights.items()}


def memory_of(weights: float) -> int:
    """Returns the bytes that a process takes to compute with so many weights in fp32, or to compile them."""
    return int(LIBRARIES + PER_WEIGHT * weights)


def weights_by_model(export: ExportPlan) -> dict[str, int]:
    """Returns how many weights each model of a checkpoint has in its stages.

    Raises CheckpointError if a weight file is damaged.
    """
    components = export.checkpoint.components
    weights = {
        model: sum(parameters(components[name]) for name in MODEL_STAGES[model][1] if name in components)
        for model in models_in(export.checkpoint)
    }
    weights["vae"] = int(weights["vae"] * (1 if export.spec.image else DECODER))
    return weights


def memory_for_engine(graph: ExportedGraph) -> int:
    """Returns the bytes of memory that building a graph's engine takes."""
    return memory_of(weights_in(graph))


def weights_in(graph: ExportedGraph) -> float:
    """Returns about how many weights a graph has, from the size of its files."""
    return size_of(graph) / STORED_BYTES[graph.precision.product]


def size_of(graph: ExportedGraph) -> int:
    """Returns the bytes of a graph's files."""
    return sum(path.stat().st_size for path in (graph.path, graph.weights) if path.is_file())


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
    if plan.options.get("without_gpu"):
        cost = compiled_without_gpu(plan, cost)
    if set(plan.options.get("winograd", {}).values()) <= {"direct"}:
        return cost
    source = plan.source
    step = source.precisions["step"] if isinstance(source, ExportPlan) else source.manifest.precision
    more = int(cost.bundle_bytes * TRANSFORMED[step.floats])
    return replace(cost, disk_bytes=cost.disk_bytes + more, bundle_bytes=cost.bundle_bytes + more)


def compiled_without_gpu(plan: Plan, cost: Estimate) -> Estimate:
    """Returns the estimate of a build that compiles with torch for a GPU which is not in this machine."""
    source = plan.source
    stages = len(source.precisions if isinstance(source, ExportPlan) else source.manifest.stages)
    step = source.precisions["step"] if isinstance(source, ExportPlan) else source.manifest.precision
    millions = cost.bundle_bytes / STORED_BYTES[step.product] / 1e6
    more = (COMPILING_WITHOUT_GPU - COMPILING) * stages + COMPILING_MILLION * millions
    return replace(cost, seconds=cost.seconds + more, memory_bytes=int(cost.memory_bytes + COMPILERS))


def estimate_from(export: Export, plan: Plan) -> Estimate:
    """Estimates a build from an existing export, by the sizes of its graphs."""
    manifest = export.manifest
    sizes, weights = [], {}
    for stage in manifest.stages:
        graph = export.graph(stage)
        sizes.append(size_of(graph))
        weights[stage.contract.name] = weights_in(graph)
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
