"""One stage on its way to an engine, all that needs torch: loaded, fused, drawn with, cast, exported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lcm_compile import parity
from lcm_compile.architectures import empty_module
from lcm_compile.bundle import PipelineSettings
from lcm_compile.contracts import COMPONENTS, make_contracts
from lcm_compile.export import export_stage, export_twin
from lcm_compile.loading import load_component
from lcm_compile.lora import LoraProvenance, check_loras, merge_loras, read_lora
from lcm_compile.parity import Call, Trace
from lcm_compile.plan import GRAPH, MODULE, ExportPlan
from lcm_compile.precision import layers_over, record_peaks, to_precision
from lcm_compile.spec import ExportedGraph
from lcm_compile.stages import make_stage


@dataclass(frozen=True)
class Prepared:
    """What is left of a stage once its weights are out of memory.

    `reference` are its calls in fp32; `twin` the graph for the proof's pictures, `graph` itself where they
    are the bundle's own. `cast` are the calls of the module as it was exported, where nothing else can be
    checked, and `cast_db` their signal-to-noise.
    """

    graph: ExportedGraph
    twin: ExportedGraph
    reference: list[Call]
    peaks: dict[str, tuple[float, float]]
    fp32_layers: tuple[str, ...]
    cast_db: float | None = None
    cast: list[Call] | None = None


def check_fit(plan: ExportPlan) -> list[LoraProvenance]:
    """How each LoRA goes into the base, by shapes alone, before weights are read. LoraError if it can't."""
    modules = {name: empty_module(component) for name, component in plan.checkpoint.components.items()}
    return check_loras(modules, [(read_lora(p.path), p.spec) for p in plan.loras])


def prepare_stage(
    plan: ExportPlan, name: str, settings: PipelineSettings, folder: Path, trace: Trace, cast: Trace
) -> Prepared:
    """Makes one stage's graph in `folder/graphs`.

    `folder` holds the tokenizers, `settings` are for the proof's shape; `trace` and `cast` are the earlier
    stages' calls in fp32, and in the precision of the engines. CheckpointError, LoraError, ParityError.
    """
    components = [c for c in COMPONENTS[name] if c in plan.checkpoint.components]
    modules = {c: load_component(plan.checkpoint, c) for c in components}
    merge_loras(modules, [(read_lora(p.path), p.spec) for p in plan.loras])
    contracts = make_contracts(plan.checkpoint, plan.proof_shape)
    stage = make_stage(plan.checkpoint, name, modules, plan.proof_shape)
    runner = parity.TorchRunner(stage)
    with record_peaks(stage.module) as peaks:
        reference = parity.relay(runner, contracts, settings, folder, trace)
    if name == "decode":
        parity.require_picture({**trace, name: reference})

    precision = plan.precisions[name]
    kept = layers_over(stage.module, peaks) if precision == "fp16" else set()
    to_precision(stage.module, precision, kept)
    full = make_stage(plan.checkpoint, name, modules, plan.shape)
    graph = twin = export_stage(full, plan.graph_format, precision, folder / "graphs")
    if stage.contract != full.contract and plan.checked == GRAPH:
        twin = export_twin(stage, graph)
    prepared = Prepared(graph, twin, reference, dict(peaks), tuple(sorted(kept)))
    if plan.checked != MODULE:
        return prepared
    calls = parity.relay(runner, contracts, settings, folder, cast)
    return replace(prepared, cast_db=parity.compare_calls(runner, reference), cast=calls)
