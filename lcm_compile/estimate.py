"""What a build will take of disk, memory and time, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcm_compile.components import Component
from lcm_compile.contracts import PARTS
from lcm_compile.plan import GRAPH, ExportPlan
from lcm_compile.single_file import read_header
from lcm_compile.spec import product_type

# Of fp8 Linear layers alone are: 0.87 of SDXL's UNet, 0.31 of SD1.5's.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1.5}
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
START, PER_MILLION, DRAWING, ENGINE, DECODING = 15, 0.06, 0.008, 0.08, 9
SMALL = 14  # all of it, for a model that is made in one process
DRAWN = 256 * 256
# aotinductor compiles each stage for so long.
COMPILING = 40


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
        for part, (_, names) in PARTS.items()
    }
    weights["vae"] = int(weights["vae"] * DECODER)
    engines = int(
        sum(
            BYTES[product_type(export.precisions[PARTS[part][0][-1]])] * count
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
    drawn = export.proof_shape.height * export.proof_shape.width * export.proof_shape.batch / DRAWN
    engine = ENGINE if export.checked == GRAPH else 0
    taken = {part: START + (PER_MILLION + engine) * count / 1e6 for part, count in weights.items()}
    return compiling + sum(taken.values()) + drawn * (DRAWING * weights["unet"] / 1e6 + DECODING)


def parameters(component: Component) -> int:
    """How many weights a model has: by its files' headers, or by its architecture where there are none."""
    if not component.files:
        from lcm_compile.architectures import empty_module

        return sum(weight.numel() for weight in empty_module(component).parameters())
    shapes = [
        shape
        for path in component.files
        if path.suffix == ".safetensors"
        for key, shape in read_header(path)[0].items()
        if key.startswith(component.prefix)
    ]
    return sum(math.prod(shape) for shape in shapes)
