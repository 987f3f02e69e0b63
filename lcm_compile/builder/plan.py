"""What a build would do and why: every input resolved, hashed and compared with the bundle that exists.

Needs neither torch nor diffusers, so that a hit answers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcm_compile.builder.fastest_backend import choose_on_cpu
from lcm_compile.builder.key import bundle_name, engine_key, explain, export_key, key_digest
from lcm_compile.bundles.bundle import check_destination
from lcm_compile.bundles.export_manifest import read_export
from lcm_compile.bundles.store import bundles_folder
from lcm_compile.checkpoint.families import CALIBRATION_PROMPTS, SAMPLE_PROMPT
from lcm_compile.checkpoint.find import Checkpoint, check_size
from lcm_compile.checkpoint.open import open_base, with_safe_vae
from lcm_compile.checkpoint.vae import overflows, with_fixed_vae
from lcm_compile.engines import Backend, choose_backend, find_backend
from lcm_compile.errors import BackendError, UsageError, unknown_name
from lcm_compile.export import EXPORTERS
from lcm_compile.graphs import STAGES
from lcm_compile.lora.find import PlannedLora, find_loras
from lcm_compile.pipeline.request import Request
from lcm_compile.precisions import EIGHT_BITS, Precision
from lcm_compile.spec import BuildSpec, Shape
from lcm_compile.system.cache import Digests
from lcm_compile.system.stopwatch import Report, silent
from lcm_compile.targets import TARGETS, GpuTarget, find_target

LARGE_BYTES = 1 << 30
TWIN_LATENT = 32  # a side
ENGINE = "engine"
GRAPH = "graph, on ONNX Runtime's CPU provider"
MODULE = "torch module that was exported"


@dataclass(frozen=True)
class ExportPlan:
    """Graphs to be made, with everything settled. `checked` is what will be compared with torch."""

    spec: BuildSpec
    checkpoint: Checkpoint
    loras: tuple[PlannedLora, ...]
    shape: Shape
    precisions: Mapping[str, Precision]
    graph_format: str
    checked: str
    key: Mapping[str, str]
    small_proof: bool = False

    @property
    def is_large(self) -> bool:
        """Whether each stage is made in a process of its own, so that one model at a time is in memory."""
        return self.checkpoint.random_seed is not None or self.checkpoint.weight_bytes >= LARGE_BYTES

    @property
    def lossy(self) -> dict[str, str]:
        """The stages that draw with loss by the user's choice, each with why."""
        product = self.precisions["step"].product
        eight_bits = {"step": f"it multiplies in 8 bits, {product}"} if product in EIGHT_BITS else {}
        return {**self.checkpoint.lossy, **eight_bits}

    @property
    def calibration(self) -> tuple[Request, ...]:
        """The pictures whose activations scale an 8-bit step; the proof's is none of them."""
        if not self.precisions["step"].is_quantized:
            return ()
        family = self.checkpoint.family
        prompts = family.calibration_prompts if family else CALIBRATION_PROMPTS
        if self.checkpoint.random_seed is not None:
            prompts = (SAMPLE_PROMPT,)
        return tuple(Request(prompt, seed) for seed, prompt in enumerate(prompts, 1))

    @property
    def proof_shape(self) -> Shape:
        """The pictures that parity is measured on: the bundle's own, or smaller ones.

        A large model that runs on another machine has a twin: the same weights as a graph for small
        pictures, which a CPU computes in seconds. So has one that asks for a `small_proof`.
        """
        side = TWIN_LATENT * self.checkpoint.vae_factor
        small = self.shape.height * self.shape.width <= side * side
        runs_here = self.checked == ENGINE and not self.small_proof
        if runs_here or not self.is_large or small:
            return self.shape
        return Shape(1, side, side)


@dataclass(frozen=True)
class Plan:
    """A build with everything settled. `reasons` tell why it is a hit, or what differs.

    `export` says how its graphs are made; None where they are made already. `passed_over` tells why no
    backend was taken that `auto` prefers to `backend_name`.
    """

    spec: BuildSpec
    export: ExportPlan | None
    target: GpuTarget
    backend_name: str
    passed_over: tuple[str, ...]
    key: Mapping[str, str]
    folder: Path
    hit: bool
    reasons: tuple[str, ...]

    @property
    def backend(self) -> Backend:
        return find_backend(self.backend_name)

    @property
    def loras(self) -> tuple[PlannedLora, ...]:
        return () if self.export is None else self.export.loras

    def to_dict(self) -> dict[str, Any]:
        export = self.export
        made = (
            {}
            if export is None
            else {
                "base": str(export.checkpoint.location),
                "vae": export.checkpoint.components["vae"].location,
                "lossy": export.lossy,
                "architecture": export.checkpoint.architecture,
                "loras": [
                    {
                        "role": p.role,
                        "path": str(p.path),
                        "weight": p.spec.weight,
                        "strengths": p.spec.strengths,
                    }
                    for p in export.loras
                ],
                "shape": vars(export.shape),
                "whole_loop": export.spec.whole_loop,
                "precisions": dict(export.precisions),
            }
        )
        return {
            **made,
            "target": self.target.to_dict(),
            "backend": self.backend_name,
            "passed_over": list(self.passed_over),
            "key": key_digest(self.key),
            "bundle": str(self.folder),
            "hit": self.hit,
            "reasons": list(self.reasons),
        }


def make_plan(spec: BuildSpec, out: Path | None = None, force: bool = False, report: Report = silent) -> Plan:
    """Settles a spec; `report` is told of backends being timed.

    UsageError, CheckpointError, LoraError or BackendError where that can't be.
    """
    target = find_target(spec.gpu)
    if spec.backend != "auto":
        find_backend(spec.backend)
    if out is not None:
        check_destination(out)
    precision, chosen = settle_precision(spec, target, report)
    backend = find_backend(chosen[0])

    def settle(checkpoint: Checkpoint) -> Plan:
        engine_runs = backend.cannot_run(target) is None
        export = plan_export(spec, checkpoint, precision, backend.GRAPH_FORMAT, engine_runs)
        return finish_plan(spec, export, export.key, checkpoint.name, target, chosen, out, force)

    half = precision.floats == "fp16"
    checkpoint = open_base(spec, half)
    if spec.vae or not half or not overflows(checkpoint):
        return settle(checkpoint)
    # The hub is asked for the fixed VAE when there is something to build, and not for a hit.
    if with_fixed_vae(checkpoint) is None and (plan := settle(checkpoint)).hit:
        return plan
    return settle(with_safe_vae(checkpoint))


def plan_graphs(spec: BuildSpec, graph_format: str) -> ExportPlan:
    """Settles an export, whatever target its graphs are for; errors as make_plan's."""
    if graph_format not in EXPORTERS:
        raise unknown_name("graph format", graph_format, EXPORTERS)
    precision = Precision.of(spec.precision if spec.precision != "auto" else "fp16", "fp16")
    if precision.is_quantized and graph_format != "onnx":
        raise UsageError(f"there are no 8-bit graphs in the {graph_format} format", "--format onnx")
    half = precision.floats == "fp16"
    checkpoint = open_base(spec, half)
    if half and not spec.vae and overflows(checkpoint):
        checkpoint = with_safe_vae(checkpoint)
    return plan_export(spec, checkpoint, precision, graph_format, engine_runs=False)


def plan_export(
    spec: BuildSpec, checkpoint: Checkpoint, precision: Precision, graph_format: str, engine_runs: bool
) -> ExportPlan:
    """How the graphs of a spec are made; UsageError, CheckpointError, LoraError."""
    height, width = checkpoint.default_size
    shape = Shape(spec.batch, spec.height or height, spec.width or width)
    check_size(checkpoint, shape.height, shape.width)
    stages = [name for name in STAGES if name != "context" or name in spec.rewrites]
    precisions = {name: precision if name == "step" else precision.without_eight_bits for name in stages}
    digests = Digests()
    loras = find_loras(spec, checkpoint, digests)
    key = export_key(checkpoint, loras, shape, spec.rewrites, precisions, graph_format, digests)
    if spec.whole_loop:
        key["whole loop"] = "one graph"
    digests.save()
    checked = ENGINE if engine_runs else checked_graph(graph_format, precision)
    return ExportPlan(spec, checkpoint, loras, shape, precisions, graph_format, checked, key)


def checked_graph(graph_format: str, precision: Precision) -> str:
    """What stands for an engine that does not run here: its graph, on ONNX Runtime's CPU provider.

    That provider has no bf16: there the torch module that was exported stands for it. It rounds to fp8, which
    no CPU multiplies in.
    """
    able = find_backend("onnxruntime").cannot_build(TARGETS["cpu"], precision.without_eight_bits) is None
    return GRAPH if able and graph_format == "onnx" else MODULE


def finish_plan(
    spec: BuildSpec,
    export: ExportPlan | None,
    key: Mapping[str, str],
    name: str,
    target: GpuTarget,
    chosen: tuple[str, tuple[str, ...]],
    out: Path | None,
    force: bool,
) -> Plan:
    """The plan of engines for graphs of the key `key`, by the backend that settle_backend chose."""
    backend_name, passed_over = chosen
    key = {**key, **engine_key(backend_name, find_backend(backend_name), target)}
    folder = out if out is not None else bundles_folder() / bundle_name(name, target, key)
    hit, reasons = explain(key, folder, force)
    return Plan(spec, export, target, backend_name, passed_over, key, folder, hit, tuple(reasons))


def default_precision(target: GpuTarget) -> str:
    return "fp32" if target.is_cpu else "fp16"


def settle_precision(
    spec: BuildSpec, target: GpuTarget, report: Report
) -> tuple[Precision, tuple[str, tuple[str, ...]]]:
    """The step's precision, and the backend for it.

    What of an 8-bit step is not in 8 bits is fp16 on a GPU; on a CPU bf16 if that can be built, else fp32.
    """
    asked = spec.precision if spec.precision != "auto" else default_precision(target)
    if asked == "int8" and target.is_cpu:
        with contextlib.suppress(BackendError):
            return Precision.INT8_BF16, settle_backend(spec, target, Precision.INT8_BF16, report)
    precision = Precision.of(asked, "fp32" if target.is_cpu else "fp16")
    return precision, settle_backend(spec, target, precision, report)


def settle_backend(
    spec: BuildSpec, target: GpuTarget, precision: Precision, report: Report, graph_format: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """The backend asked for, or the first that can build (on a CPU the fastest), from such graphs if their
    format is given.
    """
    if lacking := target.lacks(precision):
        raise BackendError(
            f"{target.description} does not compute in {' and '.join(lacking)}; "
            f"it computes in {', '.join(target.precisions)}",
            "--precision with one of these, or another GPU: lcm-compile targets",
        )
    if spec.backend == "auto":
        if target.is_cpu:
            return choose_on_cpu(precision, report, graph_format)
        return choose_backend(target, precision, graph_format)
    backend = find_backend(spec.backend)
    reason = backend.cannot_build(target, precision)
    if reason is None and graph_format not in (None, backend.GRAPH_FORMAT):
        reason = f"it builds from {backend.GRAPH_FORMAT} graphs; these are {graph_format}"
    if reason:
        raise BackendError(
            f"{spec.backend} can't build {precision} engines for {target.name} here: {reason}",
            "lcm-compile doctor shows what works here; --backend auto chooses",
        )
    return spec.backend, ()


def make_plan_from(
    graphs: Path,
    gpu: str,
    backend: str = "auto",
    out: Path | None = None,
    force: bool = False,
    report: Report = silent,
) -> Plan:
    """As make_plan, from an export. UsageError, BundleError, BackendError where that can't be."""
    target = find_target(gpu)
    if out is not None:
        check_destination(out)
    export = read_export(graphs)
    spec = replace(export.spec, gpu=gpu, backend=backend)
    chosen = settle_backend(spec, target, export.precision, report, export.graph_format)
    return finish_plan(spec, None, export.key, export.name, target, chosen, out, force)
