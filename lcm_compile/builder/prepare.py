"""One model on its way to engines, all that needs torch: load, fuse, shape, draw with, cast, export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lcm_compile.builder.plan import GRAPH, MODULE, ExportPlan
from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.load import load_component
from lcm_compile.export import export_stage, export_twin
from lcm_compile.graphs import DRAW, ExportedGraph, StageContract
from lcm_compile.lora.merge import check_loras, merge_loras
from lcm_compile.lora.read import read_lora
from lcm_compile.proof import parity, recording
from lcm_compile.proof.recording import Call, Trace
from lcm_compile.spec import LoraProvenance
from lcm_compile.stages.contracts import MODEL_STAGES, make_contracts
from lcm_compile.stages.half_precision import layers_over, record_peaks, to_precision
from lcm_compile.stages.quantize import choose_scales, install_layers, quantize_layers
from lcm_compile.stages.stage import Stage, join_stages, make_stage, make_stages, rewrite_modules

# The stages that the step depends on.
CONDITIONS = ("encode", "context")


@dataclass(frozen=True)
class Cast:
    """A stage in the precision of the engines, and what was seen of it in fp32.

    `stage` is of the proof's shape, `modules` are those of its model, as rewrite_modules leaves them.
    """

    stage: Stage
    modules: Mapping[str, nn.Module]
    peaks: dict[str, tuple[float, float]]
    fp32_layers: tuple[str, ...]
    quantized_layers: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """What is left of a stage once its weights are out of memory.

    `reference` are its calls in fp32; `twin` the graph for the proof's pictures, `graph` itself where they
    are the bundle's own. `cast` are the calls of the module as it was exported, where nothing else can be
    checked, and `cast_db` their signal-to-noise. `calibration` are the text encoder's in fp32, one list for
    each picture that an 8-bit step is scaled to.
    """

    graph: ExportedGraph
    twin: ExportedGraph
    reference: list[Call]
    peaks: dict[str, tuple[float, float]]
    fp32_layers: tuple[str, ...]
    cast_db: float | None = None
    cast: list[Call] | None = None
    quantized_layers: tuple[str, ...] = ()
    calibration: Sequence[list[Call]] = ()


def check_fit(plan: ExportPlan) -> list[LoraProvenance]:
    """How each LoRA goes into the base, by shapes alone, before weights are read. LoraError if it can't."""
    modules = {name: empty_module(component) for name, component in plan.checkpoint.components.items()}
    return check_loras(modules, [(read_lora(p.path), p.spec) for p in plan.loras])


def prepare_model(
    plan: ExportPlan,
    part: str,
    settings: PipelineSettings,
    folder: Path,
    trace: Trace,
    cast: Trace,
    calibration: Sequence[Trace] = (),
) -> list[Prepared]:
    """Makes the graphs of one model's stages in `folder/graphs`; of the part DRAW, the one of all models.

    `folder` holds the tokenizers, `settings` are for the proof's shape; `trace` and `cast` are the earlier
    stages' calls in fp32, and in the precision of the engines, `calibration` those in fp32 in the pictures
    that an 8-bit step is scaled to. CheckpointError, LoraError, ParityError.
    """
    if part == DRAW:
        return [prepare_whole_loop(plan, settings, folder)]
    checkpoint, rewrites = plan.checkpoint, plan.spec.rewrites
    contracts = make_contracts(checkpoint, plan.proof_shape, rewrites)
    whole = make_contracts(checkpoint, plan.shape, rewrites)
    trace, cast, prepared = dict(trace), dict(cast), []
    calibration = [dict(seen) for seen in calibration]
    for made in cast_stages(plan, part, settings, folder, trace, calibration):
        name = made.stage.name
        full = make_stage(checkpoint, whole[name], made.modules, plan.shape)
        graph = twin = export_stage(full, plan.graph_format, plan.precisions[name], folder / "graphs")
        # The encoders know nothing of a picture's size; the context's contract does not tell SDXL's size ids.
        if name != "encode" and has_twin(plan):
            twin = export_twin(made.stage, graph)
        done = Prepared(
            graph,
            twin,
            trace[name],
            made.peaks,
            made.fp32_layers,
            quantized_layers=made.quantized_layers,
            calibration=[seen[name] for seen in calibration] if name == "encode" else (),
        )
        if plan.checked == MODULE:
            runner = recording.TorchRunner(made.stage)
            cast[name] = recording.record_calls(runner, contracts, settings, folder, cast)
            done = replace(done, cast_db=parity.compare_calls(runner, trace[name]), cast=cast[name])
        prepared.append(done)
    return prepared


def prepare_whole_loop(plan: ExportPlan, settings: PipelineSettings, folder: Path) -> Prepared:
    """Makes one graph of the whole picture; arguments and errors as prepare_model's.

    Each model is cast before the next is loaded; in the end all of them are in memory.
    """
    checkpoint, rewrites = plan.checkpoint, plan.spec.rewrites
    trace: Trace = {}
    calibration: list[Trace] = [{} for _ in plan.calibration]
    modules: dict[str, nn.Module] = {}
    made: list[Cast] = []
    for part in MODEL_STAGES:
        for cast in cast_stages(plan, part, settings, folder, trace, calibration):
            made.append(cast)
            modules.update(cast.modules)
    full = join_stages(make_stages(checkpoint, modules, plan.shape, rewrites))
    graph = twin = export_stage(full, plan.graph_format, plan.precisions["step"], folder / "graphs")
    proving = join_stages([cast.stage for cast in made])
    if has_twin(plan):
        twin = export_twin(proving, graph)
    reference = [recording.joined_call(proving.contract, trace)]

    def layers(field: str) -> tuple[str, ...]:
        return tuple(f"{cast.stage.name}.{layer}" for cast in made for layer in getattr(cast, field))

    done = Prepared(
        graph,
        twin,
        reference,
        {f"{cast.stage.name}.{layer}": peak for cast in made for layer, peak in cast.peaks.items()},
        layers("fp32_layers"),
        quantized_layers=layers("quantized_layers"),
    )
    if plan.checked != MODULE:
        return done
    runner = recording.TorchRunner(proving)
    drawn = recording.record_calls(runner, {proving.name: proving.contract}, settings, folder, {})
    return replace(done, cast_db=parity.compare_calls(runner, reference), cast=drawn)


def has_twin(plan: ExportPlan) -> bool:
    return plan.proof_shape != plan.shape and plan.checked == GRAPH


def cast_stages(
    plan: ExportPlan,
    part: str,
    settings: PipelineSettings,
    folder: Path,
    trace: Trace,
    calibration: Sequence[Trace],
    device: str = "cpu",
) -> Iterator[Cast]:
    """A model's stages, one after another: drawn with in fp32 on `device`, held to the plain model, and cast.

    The rest is as of prepare_model; each stage's calls are added to `trace`, and to `calibration`.
    """
    names, components = MODEL_STAGES[part]
    checkpoint = plan.checkpoint
    modules = {c: load_component(checkpoint, c) for c in components if c in checkpoint.components}
    merge_loras(modules, [(read_lora(p.path), p.spec) for p in plan.loras])
    unshaped = first_call(plan, names[-1], modules, settings, folder, trace, device)
    shapes = (plan.shape, plan.proof_shape)
    modules = rewrite_modules(modules, plan.spec.rewrites, shapes, checkpoint.vae_factor)
    contracts = make_contracts(checkpoint, plan.proof_shape, plan.spec.rewrites)
    for name in names:
        if name not in contracts:
            continue
        stage = make_stage(checkpoint, contracts[name], modules, plan.proof_shape)
        runner = recording.TorchRunner(stage, device)
        with record_peaks(stage.module) as peaks:
            trace[name] = recording.record_calls(runner, contracts, settings, folder, trace)
        if name == names[-1]:
            parity.require_same(unshaped, trace[name][0])
        if name == "decode":
            parity.require_picture(trace)

        precision = plan.precisions[name]
        floats = precision.floats
        kept = layers_over(stage.module, peaks) if floats == "fp16" else set()
        quantized = {}
        if name in CONDITIONS:
            for request, seen in zip(plan.calibration, calibration, strict=True):
                seen[name] = recording.record_calls(
                    runner, contracts, settings, folder, seen, request=request
                )
        if precision.is_quantized:
            scales = calibrate(plan, runner, contracts, settings, folder, calibration)
        runner.close()
        if precision.is_quantized:
            quantized = quantize_layers(
                stage.module, {n: s for n, s in scales.items() if n not in kept}, precision
            )
        to_precision(stage.module, floats, kept)
        install_layers(stage.module, quantized)
        yield Cast(stage, modules, dict(peaks), tuple(sorted(kept)), tuple(quantized))


def calibrate(
    plan: ExportPlan,
    runner: recording.TorchRunner,
    contracts: Mapping[str, StageContract],
    settings: PipelineSettings,
    folder: Path,
    calibration: Sequence[Trace],
) -> dict[str, float]:
    """The scales of the step's layers that bear 8 bits, from pictures drawn in fp32."""
    recorded: list[Call] = []

    def draw() -> None:
        for request, trace in zip(plan.calibration, calibration, strict=True):
            calls = recording.record_calls(runner, contracts, settings, folder, trace, request=request)
            recorded.extend(() if recorded else calls)  # one picture's are enough to compare layers on

    def replay() -> None:
        for inputs, _ in recorded:
            runner(inputs)

    return choose_scales(runner.module, plan.precisions["step"], draw, replay)


def first_call(
    plan: ExportPlan,
    name: str,
    modules: Mapping[str, nn.Module],
    settings: PipelineSettings,
    folder: Path,
    trace: Trace,
    device: str,
) -> Call:
    """A stage's first call in the proof's picture as the model was before it was rewritten."""
    contracts = make_contracts(plan.checkpoint, plan.proof_shape)
    stage = make_stage(plan.checkpoint, contracts[name], modules, plan.proof_shape)
    with recording.TorchRunner(stage, device) as runner:
        return recording.record_calls(runner, contracts, settings, folder, trace, calls=1)[0]
