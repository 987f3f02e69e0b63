"""Plans builds: finds and hashes every input, and compares them with the bundle that exists.

This needs neither torch nor diffusers, so that a hit is reported at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcm_compile.builder.fastest_backend import choose_on_cpu
from lcm_compile.builder.key import bundle_key, bundle_name, explain, export_key, key_digest
from lcm_compile.bundles.bundle import check_destination
from lcm_compile.bundles.export_manifest import Export
from lcm_compile.bundles.store import bundles_folder
from lcm_compile.checkpoint.controlnet import controls_of
from lcm_compile.checkpoint.families import CALIBRATION_PROMPTS, SAMPLE_PROMPT
from lcm_compile.checkpoint.find import Checkpoint, check_size
from lcm_compile.checkpoint.ip_adapter import has_ip_adapter
from lcm_compile.checkpoint.open import open_base, with_safe_vae
from lcm_compile.checkpoint.t2i_adapter import adapters_of, check_adapter_sizes
from lcm_compile.checkpoint.vae import overflows, with_fp16_vae
from lcm_compile.engines import Backend, cannot_build_from, choose_backend, find_backend, shared_target
from lcm_compile.errors import BackendError, UsageError, unknown_name
from lcm_compile.export import EIGHT_BIT_PRODUCTS, EXPORTERS
from lcm_compile.graphs import ENCODE_IMAGE, IP_IMAGE, STAGES, LoraInputs
from lcm_compile.lora.bundled_words import with_bundled_words
from lcm_compile.lora.few_step import FewStep, licence_of
from lcm_compile.lora.find import PlannedLora, find_loras, plan_few_step
from lcm_compile.pipeline.request import Request
from lcm_compile.precisions import EIGHT_BITS, Precision
from lcm_compile.spec import BuildSpec, Shape
from lcm_compile.stages.contracts import CONTEXT_STEPS
from lcm_compile.system.cache import Digests
from lcm_compile.system.stopwatch import Report, silent
from lcm_compile.targets import TARGETS, GpuTarget, find_target

LARGE_BYTES = 1 << 30  # a checkpoint with this many bytes of weights, or more, is large
TWIN_LATENT = 32  # the side of the twin's latents: see ExportPlan
# What `checked` can be.
ENGINE = "engine"
GRAPH = "graph, on ONNX Runtime's CPU provider"
MODULE = "torch module that was exported"


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is decided before graphs are made.

    `checked` says what will be compared with torch: the engine, the graph, or the module that was exported.
    They are compared on pictures of `proof_shape`, which is the bundle's own shape or a smaller one. A large
    model whose engines run on another machine gets a twin: a second graph with the same weights for small
    pictures, which a CPU computes in seconds.
    """

    spec: BuildSpec
    checkpoint: Checkpoint
    loras: tuple[PlannedLora, ...]
    few_step: FewStep | None
    shape: Shape
    proof_shape: Shape
    precisions: Mapping[str, Precision]
    graph_format: str
    checked: str
    key: Mapping[str, str]

    @property
    def adds_to_base(self) -> bool:
        """Whether LoRAs, textual inversions or an IP-Adapter are added to the base, which must fit it."""
        added = self.loras or self.checkpoint.embeddings or has_ip_adapter(self.checkpoint)
        return bool(added or self.spec.lora_skip)

    @property
    def is_large(self) -> bool:
        """Whether each model is prepared in a process of its own: see `is_large` of this module."""
        return is_large(self.checkpoint)

    @property
    def draws_on_gpu(self) -> bool:
        """Whether the proof is drawn by torch on the GPU: the one that the engines are for is here."""
        return self.checked == ENGINE and not find_target(self.spec.gpu).is_cpu

    @property
    def lossy(self) -> dict[str, str]:
        """The stages that lose quality by the user's choice, each with the reason."""
        product = self.precisions["step"].product
        eight_bits = {"step": f"it multiplies in 8 bits, {product}"} if product in EIGHT_BITS else {}
        return {**self.checkpoint.lossy, **eight_bits}

    @property
    def few_step_licence(self) -> str | None:
        """The licence of the few-step weights, or of a base that is such a model itself, if it is known."""
        fused = [lora.spec.source for lora in self.loras if lora.role == "few-step"]
        return next(filter(None, map(licence_of, (*fused, self.spec.base))), None)

    @property
    def calibration(self) -> tuple[Request, ...]:
        """The pictures whose activations scale an 8-bit step. The proof's picture is not among them."""
        if not self.precisions["step"].is_quantized:
            return ()
        family = self.checkpoint.family
        prompts = family.calibration_prompts if family else CALIBRATION_PROMPTS
        if self.checkpoint.random_seed is not None:
            prompts = (SAMPLE_PROMPT,)
        return tuple(Request(prompt, seed) for seed, prompt in enumerate(prompts, 1))


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a build.

    `source` says how the graphs are made, or is the export that already holds them. `out` is the folder that
    the user asked for, or None, and `folder` is where the bundle goes. `hit` says whether it is there
    already. `reasons` say why the plan is a hit, or which inputs differ. `passed_over` says why
    `--backend auto` did not choose the backends that it tries before `backend_name`. `options` are the
    backend's for this build.
    """

    spec: BuildSpec
    source: ExportPlan | Export
    target: GpuTarget
    backend_name: str
    passed_over: tuple[str, ...]
    options: Mapping[str, Any]
    key: Mapping[str, str]
    out: Path | None
    folder: Path
    hit: bool
    reasons: tuple[str, ...]

    @property
    def backend(self) -> Backend:
        """The module of the backend."""
        return find_backend(self.backend_name)

    @property
    def export(self) -> ExportPlan | None:
        """How the graphs are made, or None if they exist already."""
        return self.source if isinstance(self.source, ExportPlan) else None

    @property
    def loras(self) -> tuple[PlannedLora, ...]:
        """The LoRAs that will be fused. Empty for a build from an export, where they are fused already."""
        return () if self.export is None else self.export.loras

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan for JSON. A build from an export has no fields that describe the base."""
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
                "embeddings": [str(p.spec) for p in export.checkpoint.embeddings],
                "controlnets": [str(controlnet) for controlnet in export.spec.controlnets],
                "t2i_adapters": [str(adapter) for adapter in export.spec.t2i_adapters],
                "ip_adapter": export.spec.ip_adapter and str(export.spec.ip_adapter),
                "few_step": export.few_step and export.few_step.name,
                "shape": vars(export.shape),
                "prompt_tokens": export.spec.prompt_tokens,
                "clip_skip": export.spec.clip_skip or 0,
                "whole_loop": export.spec.whole_loop,
                **({"image": True} if export.spec.image else {}),
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
    """Returns the plan of a build. `report` is called when backends are timed.

    Raises UsageError, CheckpointError, LoraError or BackendError if the build can't be done.
    """
    target = find_target(spec.gpu)
    if spec.backend != "auto":
        find_backend(spec.backend)
    if out is not None:
        check_destination(out)
    precision, chosen = settle_precision(spec, target, report)
    backend = find_backend(chosen[0])
    spec, target, options = settle_target(spec, target, chosen[0], precision, report)

    def settle(checkpoint: Checkpoint) -> Plan:
        engine_runs = backend.cannot_run(target) is None
        export = plan_export(spec, checkpoint, precision, backend.GRAPH_FORMAT, engine_runs)
        return finish_plan(spec, export, target, chosen, options, out, force)

    half = precision.floats == "fp16"
    checkpoint = open_base(spec, half)
    if spec.vae or not half or not overflows(checkpoint):
        return settle(checkpoint)
    # The fp16 VAE is downloaded only if there is something to build, not for a hit.
    if with_fp16_vae(checkpoint) is None and (plan := settle(checkpoint)).hit:
        return plan
    return settle(with_safe_vae(checkpoint))


def plan_graphs(spec: BuildSpec, graph_format: str) -> ExportPlan:
    """Returns the plan of an export, which does not depend on a target.

    Raises UsageError, CheckpointError or LoraError if the export can't be done.
    """
    if graph_format not in EXPORTERS:
        raise unknown_name("graph format", graph_format, EXPORTERS)
    precision = Precision.of(spec.precision if spec.precision != "auto" else "fp16", "fp16")
    if precision.is_quantized and precision.product not in EIGHT_BIT_PRODUCTS[graph_format]:
        raise UsageError(
            f"graphs in the {graph_format} format have no 8-bit products in {precision.product}",
            "--format onnx",
        )
    half = precision.floats == "fp16"
    checkpoint = open_base(spec, half)
    if half and not spec.vae and overflows(checkpoint):
        checkpoint = with_safe_vae(checkpoint)
    return plan_export(spec, checkpoint, precision, graph_format, engine_runs=False)


def plan_export(
    spec: BuildSpec, checkpoint: Checkpoint, precision: Precision, graph_format: str, engine_runs: bool
) -> ExportPlan:
    """Returns how the graphs of a spec are made. `engine_runs` says whether its engines run on this machine.

    Raises UsageError, CheckpointError or LoraError if they can't be made.
    """
    height, width = checkpoint.default_size
    shape = Shape(spec.batch, spec.height or height, spec.width or width)
    check_size(checkpoint, shape.height, shape.width)
    check_adapter_sizes(checkpoint, shape.height, shape.width)
    stages = [name for name in STAGES if name != "context" or name in spec.rewrites]
    stages += [*controls_of(checkpoint), *adapters_of(checkpoint)]
    stages += [ENCODE_IMAGE] if spec.image else []
    stages += [IP_IMAGE] if has_ip_adapter(checkpoint) else []
    precisions = {name: precision if name == "step" else precision.without_eight_bits for name in stages}
    if checkpoint.is_inpainting and (spec.whole_loop or not spec.image):
        raise UsageError(
            f"{checkpoint.base} is an inpainting model, which draws from a picture and a mask",
            "add --image" + (", and drop --whole-loop" if spec.whole_loop else ""),
        )
    digests = Digests()
    few_step = plan_few_step(spec, checkpoint)
    if spec.whole_loop and few_step.row and CONTEXT_STEPS not in few_step.row.made_for:
        raise UsageError(
            f"--whole-loop draws in {CONTEXT_STEPS} steps, and {few_step.row.name} is not made for so many",
            "drop --whole-loop",
        )
    loras = find_loras(spec, few_step, digests)
    checkpoint = with_bundled_words(few_step.checkpoint, loras, spec.lora_skip)
    checkpoint = with_lora_inputs(checkpoint, spec, loras, precisions["step"])
    key = export_key(spec, checkpoint, loras, shape, precisions, graph_format, digests)
    key["few-step method"] = few_step.row.name if few_step.row else "none"
    digests.save()
    checked = ENGINE if engine_runs else checked_graph(graph_format, precision)
    proof = proof_shape(checkpoint, shape, checked)
    return ExportPlan(
        spec, checkpoint, loras, few_step.row, shape, proof, precisions, graph_format, checked, key
    )


def with_lora_inputs(
    checkpoint: Checkpoint, spec: BuildSpec, loras: tuple[PlannedLora, ...], precision: Precision
) -> Checkpoint:
    """Returns the checkpoint with what of LoRAs is an input of its stages.

    Raises UsageError if the step multiplies in 8 bits, or if a LoRA at run time is a complete UNet.
    """
    names = tuple(lora.spec.name for lora in loras if lora.spec.name is not None)
    if len(names) < len(spec.runtime_loras):
        raise UsageError(
            f"{spec.runtime_loras[0].source} is a complete UNet, whose weight can't be an input",
            "drop its :runtime",
        )
    if not names and not spec.lora_slots:
        return checkpoint
    if precision.is_quantized:
        raise UsageError(
            f"LoRAs at run time can't be exact beside weights in 8 bits, {precision.product}",
            "another --precision; or fuse them: drop :runtime and --lora-slots",
        )
    parts, rank = (checkpoint.parts if names else ()), (spec.lora_rank if spec.lora_slots else 0)
    return replace(checkpoint, loras=LoraInputs(names, parts, spec.lora_slots, rank))


def is_large(checkpoint: Checkpoint) -> bool:
    """Returns whether each model is prepared in a process of its own, so that one at a time is in memory."""
    return checkpoint.random_seed is not None or checkpoint.weight_bytes >= LARGE_BYTES


def proof_shape(checkpoint: Checkpoint, shape: Shape, checked: str) -> Shape:
    """Returns the shape of the pictures that parity is measured on."""
    side = TWIN_LATENT * checkpoint.vae_factor
    small = shape.height * shape.width <= side * side
    return shape if checked == ENGINE or not is_large(checkpoint) or small else Shape(1, side, side)


def checked_graph(graph_format: str, precision: Precision) -> str:
    """Returns what is checked in place of an engine that can't run on this machine: GRAPH or MODULE.

    An ONNX graph is checked on ONNX Runtime's CPU provider. That provider has no bf16, so a bf16 graph and
    the other formats are checked by the torch module that was exported. An fp8 graph can be checked on the
    CPU: values are rounded to fp8 there, and multiplied in a wider type, because no CPU multiplies in fp8.
    """
    able = find_backend("onnxruntime").cannot_build(TARGETS["cpu"], precision.without_eight_bits) is None
    return GRAPH if able and graph_format == "onnx" else MODULE


def finish_plan(
    spec: BuildSpec,
    source: ExportPlan | Export,
    target: GpuTarget,
    chosen: tuple[str, tuple[str, ...]],
    options: Mapping[str, Any],
    out: Path | None,
    force: bool,
) -> Plan:
    """Returns the plan of engines from the graphs of `source`.

    `chosen` is what `settle_backend` returned, and `options` are the backend's.
    """
    backend_name, passed_over = chosen
    if isinstance(source, Export):
        name, graphs = source.manifest.name, source.manifest.key
    else:
        name, graphs = source.checkpoint.name, source.key
    key = bundle_key(graphs, backend_name, find_backend(backend_name), options, target)
    folder = out if out is not None else bundles_folder() / bundle_name(name, target, key)
    hit, reasons = explain(spec, key, folder, force)
    return Plan(
        spec, source, target, backend_name, passed_over, options, key, out, folder, hit, tuple(reasons)
    )


def plan_again(plan: Plan, force: bool) -> Plan:
    """Returns the plan made again, because input files or other processes may have changed since.

    Raises what `make_plan` raises.
    """
    if isinstance(plan.source, Export):
        chosen = plan.backend_name, plan.passed_over
        return finish_plan(plan.spec, plan.source, plan.target, chosen, plan.options, plan.out, force)
    return make_plan(plan.spec, plan.out, force)


def default_precision(target: GpuTarget) -> str:
    """Returns the precision that `--precision auto` means for a target."""
    return "fp32" if target.is_cpu else "fp16"


def settle_precision(
    spec: BuildSpec, target: GpuTarget, report: Report
) -> tuple[Precision, tuple[str, tuple[str, ...]]]:
    """Returns the step's precision, and the backend for it as `settle_backend` returns it.

    In an 8-bit step, whatever is not in 8 bits is in fp16 on a GPU. On a CPU it is in bf16 if that can be
    built, and otherwise in fp32. Raises UsageError or BackendError if no backend can build it.
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
    """Returns the name of the backend to build with, and why `auto` passed over others.

    For `auto` this is the first backend that can build, or on a CPU the fastest. With a `graph_format`, only
    backends that build from this format count. Raises UsageError for an unknown backend, and BackendError if
    the target does not compute in the precision or the backend can't build for it here.
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
    if reason := cannot_build_from(spec.backend, target, precision, graph_format):
        raise BackendError(
            f"{spec.backend} can't build {precision} engines for {target.name} here: {reason}",
            "lcm-compile doctor shows what works here; --backend auto chooses",
        )
    return spec.backend, ()


def settle_target(
    spec: BuildSpec, target: GpuTarget, backend_name: str, precision: Precision, report: Report
) -> tuple[BuildSpec, GpuTarget, Mapping[str, Any]]:
    """Returns the spec, the target and the backend's options of a build.

    The target keeps the compute capabilities for which engines are built, and the spec those of the targets
    beside it whose engines are the same.
    """
    others = [find_target(name) for name in spec.beside]
    target, engines_for, joined = shared_target(backend_name, target, others, precision)
    options = find_backend(backend_name).options(engines_for, precision, spec.rewrites, report)
    return replace(spec, beside=joined), target, options


def make_plan_from(
    export: Export,
    gpu: str,
    backend: str = "auto",
    out: Path | None = None,
    force: bool = False,
    report: Report = silent,
    beside: tuple[str, ...] = (),
) -> Plan:
    """Returns the plan of a build from an export. Raises UsageError or BackendError if it can't be done."""
    target = find_target(gpu)
    if out is not None:
        check_destination(out)
    manifest = export.manifest
    spec = replace(manifest.spec, gpu=gpu, beside=beside, backend=backend)
    chosen = settle_backend(spec, target, manifest.precision, report, manifest.graph_format)
    spec, target, options = settle_target(spec, target, chosen[0], manifest.precision, report)
    return finish_plan(spec, export, target, chosen, options, out, force)
