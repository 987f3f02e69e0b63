"""A model as graphs on disk, each stage prepared and checked: what engines are built from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.builder.estimate import estimate
from lcm_compile.builder.plan import ENGINE, ExportPlan, Plan, plan_graphs
from lcm_compile.bundles.bundle import (
    check_destination,
    list_files,
    publishing,
    reporting_full_disk,
)
from lcm_compile.bundles.export_manifest import EXPORT, ExportManifest
from lcm_compile.bundles.manifest import (
    Parity,
    PipelineSettings,
    StageFile,
    TokenizerSettings,
)
from lcm_compile.checkpoint.families import SAMPLE_PROMPT
from lcm_compile.checkpoint.load import load_tokenizer
from lcm_compile.engines import find_backend
from lcm_compile.export import EXPORTERS
from lcm_compile.graphs import StageContract
from lcm_compile.proof import parity, recording
from lcm_compile.proof.recording import Call, Trace
from lcm_compile.spec import BuildSpec, LoraProvenance
from lcm_compile.stages.contracts import graph_contracts, make_contracts, models_of
from lcm_compile.system.child_process import call_in_child
from lcm_compile.system.files import check_space
from lcm_compile.system.stopwatch import Report, Stopwatch, silent
from lcm_compile.system.versions import versions_of
from lcm_compile.targets import TARGETS
from lcm_compile.version import __version__

if TYPE_CHECKING:
    from lcm_compile.builder.prepare import Prepared


WAITING = "wait for another build of this bundle"


def export(
    spec: BuildSpec, out: Path, graph_format: str = "onnx", *, report: Report = silent
) -> ExportManifest:
    """Writes a spec's graphs, tokenizers and proof to `out`, whole or not at all: what `build_from` takes.

    The spec's target and backend do not matter. UsageError, CheckpointError, LoraError, ParityError.
    """
    plan = plan_graphs(spec, graph_format)
    check_destination(out, EXPORT)
    check_space(out.absolute(), estimate(plan).bundle_bytes)
    with publishing(out, lambda: report(WAITING, None), EXPORT) as folder:
        manifest = export_into(folder, plan, report)
        manifest = replace(manifest, files=list_files(folder, but=EXPORT))
        manifest.write(folder)
    return manifest


@contextmanager
def exported(plan: Plan, folder: Path, report: Report) -> Iterator[tuple[Path, ExportManifest]]:
    """The export that a bundle is built from, until that is done."""
    assert plan.export is not None
    # Inside the folder being built: whoever clears that up after a kill clears the graphs up too.
    with tempfile.TemporaryDirectory(prefix="graphs-", dir=folder) as scratch:
        with reporting_full_disk(folder.parent):
            export = export_into(Path(scratch), plan.export, report)
        yield Path(scratch), export


def export_into(folder: Path, plan: ExportPlan, report: Report) -> ExportManifest:
    """Fills an empty folder with graphs, tokenizers and proof. ParityError where the graphs miss it."""
    from lcm_compile.builder.prepare import check_fit, prepare_model

    watch = Stopwatch(report)
    call = caller(plan.is_large)
    provenance: list[LoraProvenance] = []
    if plan.loras:
        with watch.part("check that the LoRAs fit"):
            provenance = call(check_fit, plan)
    encode = make_contracts(plan.checkpoint, plan.shape)["encode"]
    settings = write_tokenizers(folder, plan, encode)
    proving = replace(settings, shape=plan.proof_shape)
    trace: Trace = {}  # torch's own calls
    drawn: Trace = {}  # those of the graphs
    calibration: list[Trace] = [{} for _ in plan.calibration]
    stages, figures, peaks = [], {}, {}
    (folder / "graphs").mkdir()
    for part in models_of(plan.spec):
        with watch.part(f"export {part}"):
            made = call(prepare_model, plan, part, proving, folder, trace, drawn, calibration)
        for prepared in made:
            contract = prepared.graph.contract
            name, precision = contract.name, prepared.graph.precision
            trace[name], peaks[name] = prepared.reference, prepared.peaks
            for seen, calls in zip(calibration, prepared.calibration, strict=False):
                seen[name] = calls
            if plan.checked != ENGINE:
                with watch.part(f"check {name}"):
                    db, drawn[name] = call(check_stage, plan, prepared, proving, folder, trace, drawn)
                twin = prepared.twin != prepared.graph
                floor = parity.stage_floor(contract, precision)
                figures[name] = Parity(db, floor, checked_text(plan, twin))
            graph = prepared.graph.path.relative_to(folder).as_posix()
            largest = max((max(pair) for pair in prepared.peaks.values()), default=None)
            stages.append(
                StageFile(
                    contract, graph, precision, prepared.fp32_layers, largest, prepared.quantized_layers
                )
            )
    if drawn:
        db = parity.psnr_db(recording.picture_of(trace), recording.picture_of(drawn))
        twin = plan.proof_shape != plan.shape
        figures["picture"] = Parity(
            db, parity.picture_floor(plan.precisions.values()), checked_text(plan, twin)
        )
    parity.require(figures)
    return ExportManifest(
        name=plan.checkpoint.name,
        spec=plan.spec,
        key=plan.key,
        architecture=plan.checkpoint.architecture,
        graph_format=plan.graph_format,
        is_large=plan.is_large,
        pipeline=settings,
        stages=tuple(stages),
        loras=tuple(
            {"role": planned.role, "sha256": planned.sha256, **lora.to_dict()}
            for planned, lora in zip(plan.loras, provenance, strict=True)
        ),
        parity=figures,
        proof=recording.write_proof(trace, peaks, proving, folder),
        toolchain={"lcm-compile": __version__, **versions_of(EXPORTERS[plan.graph_format])},
        costs=watch.costs,
        lossy=plan.lossy,
    )


def caller(is_large: bool) -> Callable[..., Any]:
    """What calls a function: for a large model a new process, whose memory is given back when it ends."""
    return call_in_child if is_large else call_directly


def call_directly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def write_tokenizers(folder: Path, plan: ExportPlan, encode: StageContract) -> PipelineSettings:
    """Writes each tokenizer as one JSON, and says all that the LCM loop must know."""
    checkpoint = plan.checkpoint
    tokenizers = []
    (folder / "tokenizers").mkdir()
    for name, tokens in zip(checkpoint.tokenizers, encode.inputs, strict=True):
        tokenizer = load_tokenizer(checkpoint, name)
        file = f"tokenizers/{name}.json"
        (folder / file).write_text(tokenizer.json, encoding="utf-8")
        tokenizers.append(TokenizerSettings(tokens.name, file, tokenizer.max_length, tokenizer.pad_token_id))
    sample = checkpoint.family.sample_prompt if checkpoint.family else SAMPLE_PROMPT
    return PipelineSettings(
        plan.shape, checkpoint.scheduler, tuple(tokenizers), checkpoint.zero_negative_prompt, sample
    )


def check_stage(
    plan: ExportPlan, prepared: Prepared, settings: PipelineSettings, folder: Path, trace: Trace, drawn: Trace
) -> tuple[float, list[Call]]:
    """A graph's signal-to-noise over torch's own calls, and its calls in its own picture."""
    if prepared.cast is not None:
        assert prepared.cast_db is not None
        return prepared.cast_db, prepared.cast
    contracts = graph_contracts(plan.checkpoint, plan.proof_shape, plan.spec)
    name = prepared.twin.contract.name
    with find_backend("onnxruntime").load(prepared.twin.path, contracts[name], TARGETS["cpu"]) as runner:
        db = parity.compare_calls(runner, trace[name])
        return db, recording.record_calls(runner, contracts, settings, folder, drawn)


def checked_text(plan: ExportPlan, twin: bool) -> str:
    return f"{plan.checked}, of a twin of {plan.proof_shape}" if twin else plan.checked
