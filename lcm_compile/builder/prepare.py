"""Prepares one model with torch, up to its graphs: load, fuse LoRAs, rewrite, record calls, cast, export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from lcm_compile.builder.plan import GRAPH, MODULE, ExportPlan
from lcm_compile.builder.prepared import LoraFiles, Prepared, beside
from lcm_compile.checkpoint.checkpoint import MODELS
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.ip_adapter import IP_LAYERS, has_ip_adapter
from lcm_compile.checkpoint.load import load_component, load_tokenizer
from lcm_compile.export import export_stage, export_twin
from lcm_compile.graphs import DRAW, GUIDES, IP_IMAGE
from lcm_compile.lora.factors import check_at_run_time, factors_of
from lcm_compile.lora.merge import check_loras, merge_loras
from lcm_compile.precisions import Precision
from lcm_compile.proof import parity
from lcm_compile.proof.recording import Call, Recordings, Rehearsal, TorchRunner, Trace, joined_call
from lcm_compile.spec import LoraProvenance
from lcm_compile.stages.contracts import MODEL_STAGES, main_stage, make_contracts, models_in
from lcm_compile.stages.half_precision import layers_over, record_peaks, to_precision
from lcm_compile.stages.ip_layers import add_ip_layers, check_ip_layers
from lcm_compile.stages.lora_branches import Branch, FixedLora, add_branch, slot_layers
from lcm_compile.stages.quantize import Scales, choose_scales, install_layers, quantize_layers
from lcm_compile.stages.stage import Stage, join_stages, make_stage, make_stages, rewrite_modules

# The stages whose outputs the step reads. Their calls are recorded for the calibration of an 8-bit step.
CONDITIONS = ("encode", IP_IMAGE, "context", *GUIDES)


@dataclass(frozen=True)
class Cast:
    """A stage in the precision of the engines, and what was recorded of it in fp32.

    `stage` is for pictures of the proof's shape. `modules` are those of its model, as `rewrite_modules`
    returns them. `peaks` are the largest absolute input and output of each layer. `fp32_layers` stay in fp32
    because they would overflow fp16, and `quantized_layers` multiply in 8 bits.
    """

    stage: Stage
    modules: Mapping[str, nn.Module]
    peaks: dict[str, tuple[float, float]]
    fp32_layers: tuple[str, ...]
    quantized_layers: tuple[str, ...]


def check_fit(plan: ExportPlan, loras: LoraFiles) -> list[LoraProvenance]:
    """Checks that what is added to the base fits it, before any weights of the base are read.

    Returns for each LoRA what the bundle records about it. Raises LoraError if one does not fit, and
    CheckpointError if a textual inversion or the IP-Adapter does not.
    """
    if plan.checkpoint.embeddings:
        for name in plan.checkpoint.tokenizers:
            load_tokenizer(plan.checkpoint, name)
    components = plan.checkpoint.components
    modules = {name: empty_module(components[name]) for name in components if name in MODELS}
    if has_ip_adapter(plan.checkpoint):
        check_ip_layers(modules["unet"], empty_module(components[IP_LAYERS]))
    provenance = check_loras(modules, loras.read())
    for lora, spec in loras.read():
        if spec.name is not None:
            check_at_run_time(lora, modules)
    return provenance


def prepare_model(
    plan: ExportPlan, model: str, loras: LoraFiles, rehearsal: Rehearsal, recordings: Recordings
) -> list[Prepared]:
    """Exports the stages of one model to `graphs` in the rehearsal's folder, and returns them.

    If `model` is DRAW, all models are exported as one stage. `rehearsal` draws the proof's pictures.
    `recordings` hold the calls of the models before this one, and are not changed. Raises CheckpointError or
    LoraError if the weights can't be loaded or fused, and ParityError if a rewritten stage differs from the
    model.
    """
    if model == DRAW:
        return [prepare_whole_loop(plan, loras, rehearsal)]
    contracts = make_contracts(plan.checkpoint, plan.shape, plan.spec.rewrites, plan.spec.image)
    recordings, prepared = recordings.copy(), []
    # All are cast before the first is checked: a ControlNet is checked in a picture that the step draws.
    casts = list(cast_stages(plan, model, loras, rehearsal, recordings))
    runners = {made.stage.name: TorchRunner(made.stage) for made in casts}
    for made in casts:
        name = made.stage.name
        full = make_stage(plan.checkpoint, contracts[name], made.modules)
        graph = twin = export_stage(full, plan.graph_format, plan.precisions[name], graphs_in(rehearsal))
        # The graphs of the text and image encoders do not depend on the picture's size.
        if name not in ("encode", IP_IMAGE) and has_twin(plan):
            twin = export_twin(made.stage, graph)
        done = Prepared(
            graph,
            twin,
            recordings.reference[name],
            made.peaks,
            made.fp32_layers,
            quantized_layers=made.quantized_layers,
            calibration=[t[name] for t in recordings.calibration] if name in ("encode", IP_IMAGE) else (),
        )
        is_half = plan.precisions[name].product in parity.LOWEST_FLOORS
        if plan.checked == MODULE:
            runner = runners[name]
            recordings.cast[name] = rehearsal.record(runner, recordings.cast, beside=beside(name, runners))
            db = parity.compare_calls(runner, recordings.reference[name])
            done = replace(done, cast_db=db, cast=recordings.cast[name], torch_db=db if is_half else None)
        elif is_half:
            db = torch_db(made.stage, plan.precisions[name], rehearsal, recordings.reference[name])
            done = replace(done, torch_db=db)
        prepared.append(done)
    return prepared


def torch_db(stage: Stage, precision: Precision, rehearsal: Rehearsal, reference: Sequence[Call]) -> float:
    """Returns the signal-to-noise ratio in dB that torch itself reaches in half precision.

    `stage` has been cast to that precision. The first call has the most noise, and usually the lowest ratio:
    if it is well above the floor, the others are not computed.
    """
    runner = rehearsal.runner_of(stage)
    try:
        first = parity.compare_calls(runner, reference[:1])
        near = first < parity.STAGE_FLOORS[precision.product] + 2 * parity.TORCH_MARGIN
        return min(first, parity.compare_calls(runner, reference[1:])) if near else first
    finally:
        runner.close()


def graphs_in(rehearsal: Rehearsal) -> Path:
    """Returns the folder of the graphs, which is next to the tokenizers that a rehearsal draws with."""
    return rehearsal.folder / "graphs"


def prepare_whole_loop(plan: ExportPlan, loras: LoraFiles, rehearsal: Rehearsal) -> Prepared:
    """Exports the complete loop, from token ids to pictures, as one graph.

    Each model is cast before the next one is loaded. At the end all of them are in memory. Raises what
    `prepare_model` raises.
    """
    recordings = Recordings.empty(len(plan.calibration))
    modules: dict[str, nn.Module] = {}
    made: list[Cast] = []
    for model in models_in(plan.checkpoint):
        for cast in cast_stages(plan, model, loras, rehearsal, recordings):
            made.append(cast)
            modules.update(cast.modules)
    full = join_stages(make_stages(plan.checkpoint, modules, plan.shape, plan.spec.rewrites))
    graph = twin = export_stage(full, plan.graph_format, plan.precisions["step"], graphs_in(rehearsal))
    proving = join_stages([cast.stage for cast in made])
    if has_twin(plan):
        twin = export_twin(proving, graph)
    reference = [joined_call(proving.contract, recordings.reference)]

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
    runner = TorchRunner(proving)
    drawn = replace(rehearsal, contracts={DRAW: proving.contract}).record(runner, {})
    return replace(done, cast_db=parity.compare_calls(runner, reference), cast=drawn)


def has_twin(plan: ExportPlan) -> bool:
    """Returns whether a second graph with the same weights is exported for pictures of the proof's shape."""
    return plan.proof_shape != plan.shape and plan.checked == GRAPH


def cast_stages(
    plan: ExportPlan, model: str, loras: LoraFiles, rehearsal: Rehearsal, recordings: Recordings
) -> Iterator[Cast]:
    """Yields a model's stages one after another, each recorded in fp32 and then cast.

    The first call of the model's main stage is compared with the model before the rewrites. Each stage's
    calls are added to the reference and to the calibration of `recordings`. Raises CheckpointError or
    LoraError if the weights can't be loaded or fused, and ParityError if a rewritten stage differs from the
    model.
    """
    names, components = MODEL_STAGES[model]
    checkpoint = plan.checkpoint
    modules = {
        name: load_component(checkpoint, name, partial(merge_into, name, plan, loras))
        for name in components
        if name in checkpoint.components
    }
    if layers := modules.pop(IP_LAYERS, None):
        add_ip_layers(modules["unet"], layers)
    main = main_stage(model)
    before_rewrites = first_call(plan, main, modules, rehearsal, recordings.reference)
    shapes = (plan.shape, plan.proof_shape)
    modules = rewrite_modules(modules, plan.spec.rewrites, shapes, checkpoint.vae_factor)
    own = [name for name in names if name in rehearsal.contracts]
    stages = {name: make_stage(checkpoint, rehearsal.contracts[name], modules) for name in own}
    for name, stage in stages.items():
        runner = rehearsal.runner_of(stage)
        others = {n: rehearsal.runner_of(other) for n, other in beside(name, stages).items()}
        with record_peaks(stage.module) as peaks:
            recordings.reference[name] = rehearsal.record(runner, recordings.reference, beside=others)
        if name == main:
            parity.require_same(before_rewrites, recordings.reference[name][0])
        if name == "decode":
            parity.require_picture(recordings.reference)
        precision = plan.precisions[name]
        kept = layers_over(stage.module, peaks) if precision.floats == "fp16" else set()
        if name in CONDITIONS:
            for request, trace in zip(plan.calibration, recordings.calibration, strict=True):
                trace[name] = rehearsal.record(runner, trace, request, beside=others)
        scales = calibrate(plan, runner, rehearsal, recordings) if precision.is_quantized else {}
        for each in (runner, *others.values()):
            each.close()
        wanted = {layer: scale for layer, scale in scales.items() if layer not in kept}
        quantized = (
            quantize_layers(stage.module, wanted, precision, scaled_mm=plan.graph_format == "torch_export")
            if precision.is_quantized
            else {}
        )
        to_precision(stage.module, precision.floats, kept)
        install_layers(stage.module, quantized)
        yield Cast(stage, modules, dict(peaks), tuple(sorted(kept)), tuple(quantized))


def merge_into(name: str, plan: ExportPlan, loras: LoraFiles, module: nn.Module) -> None:
    """Merges LoRAs into the component `name`, and adds branches for those that are not fused.

    Raises LoraError if one does not fit.
    """
    read, inputs = loras.read(), plan.checkpoint.loras
    fused = [(lora, spec) for lora, spec in read if spec.name is None]
    merge_loras({name: module}, fused)
    if not inputs or name == "vae" or name not in MODELS:
        return
    fixed: dict[nn.Module, list[FixedLora]] = {}
    at_run_time = [lora for lora, spec in read if spec.name is not None]
    for row, lora in enumerate(at_run_time):
        own = replace(lora, layers=[layer for layer in lora.layers if layer.component == name])
        for one in factors_of(own, {name: module}):
            place = row * len(inputs.parts) + inputs.parts.index(one.place.part)
            fixed.setdefault(one.place.module, []).append(FixedLora(one.down, one.up, one.bias, place))
    slots = slot_layers(plan.checkpoint, name) if inputs.slots else {}
    for path, layer in module.named_modules():
        slot = f"{name}.{path}" if path in slots else None
        if layer in fixed or slot:
            add_branch(layer, Branch(layer, fixed.get(layer, ()), slot))


def calibrate(
    plan: ExportPlan, runner: TorchRunner, rehearsal: Rehearsal, recordings: Recordings
) -> dict[str, Scales]:
    """Returns the scales of each layer of the step that tolerates 8 bits.

    The scales come from the activations of the plan's calibration pictures, drawn in fp32.
    """
    recorded: list[Call] = []

    def draw() -> None:
        for request, trace in zip(plan.calibration, recordings.calibration, strict=True):
            calls = rehearsal.record(runner, trace, request)
            recorded.extend(() if recorded else calls)  # one picture's calls are enough to compare layers

    def replay() -> None:
        for inputs, _ in recorded:
            runner(inputs)

    return choose_scales(runner.module, plan.precisions["step"], draw, replay)


def first_call(
    plan: ExportPlan, name: str, modules: Mapping[str, nn.Module], rehearsal: Rehearsal, trace: Trace
) -> Call:
    """Returns a stage's first call in the proof's picture, computed by the model before it is rewritten."""
    plain = replace(rehearsal, contracts=make_contracts(plan.checkpoint, plan.proof_shape))
    names = [n for n in (name, *(GUIDES if name == "step" else ())) if n in plain.contracts]
    stages = {n: make_stage(plan.checkpoint, plain.contracts[n], modules) for n in names}
    with ExitStack() as stack:
        runners = {n: stack.enter_context(rehearsal.runner_of(stage)) for n, stage in stages.items()}
        runner = runners.pop(name)
        return plain.record(runner, trace, most=1, beside=runners)[0]
