"""Exports a checkpoint: prepares and checks each stage, and writes the graphs that engines are built from."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcm_compile.builder.estimate import CHECKING, LIBRARIES, estimate, memory_by_model
from lcm_compile.builder.plan import ENGINE, GRAPH, ExportPlan, Plan, plan_graphs
from lcm_compile.builder.prepared import LoraFiles, Prepared, beside
from lcm_compile.builder.schedule import Schedule, scheduling
from lcm_compile.bundles.bundle import (
    check_destination,
    list_files,
    publishing,
    reporting_full_disk,
)
from lcm_compile.bundles.export_manifest import EXPORT, Export, ExportManifest
from lcm_compile.bundles.manifest import (
    FewStepWeights,
    LoraSlots,
    Parity,
    PipelineSettings,
    StageFile,
    TokenizerSettings,
)
from lcm_compile.checkpoint.embeddings import read_embeddings
from lcm_compile.checkpoint.families import SAMPLE_PROMPT
from lcm_compile.checkpoint.load import load_tokenizer
from lcm_compile.engines.runner import Runner
from lcm_compile.export import EXPORTERS
from lcm_compile.graphs import ExportedGraph, StageContract, is_lora_input
from lcm_compile.lora.few_step import defaults_of
from lcm_compile.proof import parity
from lcm_compile.proof.recording import Call, Recordings, Rehearsal, picture_of, write_proof
from lcm_compile.spec import BuildSpec, LoraProvenance, LoraSpec
from lcm_compile.stages.contracts import CONTEXT_STEPS, graph_contracts, make_contracts, models_of
from lcm_compile.system.files import check_space
from lcm_compile.system.stopwatch import Report, Stopwatch, silent
from lcm_compile.system.versions import versions_of
from lcm_compile.version import __version__

WAITING = "wait for another build of this bundle"
# Called with a graph that has been written.
Written = Callable[[ExportedGraph], None]
# What the processes of a large model's stages import.
HEAVY = (
    "lcm_compile.builder.prepare",
    "lcm_compile.export.onnx_graph",
    "torch.onnx._internal.exporter._core",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
)


def export(
    spec: BuildSpec, out: Path, graph_format: str = "onnx", *, report: Report = silent
) -> ExportManifest:
    """Writes a spec's graphs, tokenizers and proof to the folder `out`, and returns the export's manifest.

    The folder appears complete or not at all. The spec's target and backend have no effect. Raises
    UsageError, CheckpointError or LoraError if the export can't be made, and ParityError if the graphs do not
    compute what torch computes.
    """
    plan = plan_graphs(spec, graph_format)
    check_destination(out, EXPORT)
    check_space(out.absolute(), estimate(plan).bundle_bytes)
    watch = Stopwatch(report)
    with (
        publishing(out, lambda: watch.task(WAITING), EXPORT) as folder,
        scheduling(plan.is_large, estimate(plan).memory_bytes, HEAVY) as schedule,
    ):
        manifest = export_into(folder, plan, schedule, report)
        manifest = replace(manifest, files=list_files(folder, but=EXPORT))
        manifest.write(folder)
    return manifest


@contextmanager
def exported(
    plan: Plan, folder: Path, schedule: Schedule, report: Report, written: Written = lambda graph: None
) -> Iterator[Export]:
    """Yields the export that a bundle is built from. An export made for this build is removed afterwards.

    `folder` is the bundle's folder while it is built. `written` is called for each graph as soon as it is
    there. Raises what `export_into` raises.
    """
    if isinstance(plan.source, Export):
        for stage in plan.source.manifest.stages:
            written(plan.source.graph(stage))
        yield plan.source
        return
    # Inside the bundle's folder: if the build is killed, removing that folder removes the graphs too.
    # After an error engines may still be built from it, until the schedule ends.
    with tempfile.TemporaryDirectory("", "graphs-", folder, ignore_cleanup_errors=True) as scratch:
        with reporting_full_disk(folder.parent):
            manifest = export_into(Path(scratch), plan.source, schedule, report, written)
        yield Export(Path(scratch), manifest)


def export_into(
    folder: Path,
    plan: ExportPlan,
    schedule: Schedule,
    report: Report,
    written: Written = lambda graph: None,
) -> ExportManifest:
    """Fills an empty folder with graphs, tokenizers and proof, and returns the manifest without writing it.

    `written` is called for each graph as soon as it is there. Raises CheckpointError or LoraError if the
    model can't be loaded or a LoRA does not fit, and ParityError if the graphs do not compute what torch
    computes.
    """
    watch = Stopwatch(report)
    loras = LoraFiles(plan)
    provenance: list[LoraProvenance] = []
    if plan.adds_to_base:
        task = watch.task("check that what is added fits")
        provenance = schedule.call(int(LIBRARIES), task, check_fit, plan, loras)
    task = watch.task("read the settings")
    settings, contracts, embeddings = schedule.call(int(LIBRARIES), task, read_settings, folder, plan)
    rehearsal = rehearsal_of(plan, contracts, replace(settings, shape=plan.proof_shape), folder)
    recordings = Recordings.empty(len(plan.calibration))
    stages, figures, peaks = [], {}, {}
    checks: dict[str, Future[float]] = {}
    memory = memory_by_model(plan)

    def check(prepared: Prepared, others: Mapping[str, Prepared], known: Recordings) -> float:
        name = prepared.graph.contract.name
        args = plan, prepared, rehearsal, replace(known, cast=recordings.cast), others
        task = watch.task(f"check {name}")
        db, recordings.cast[name] = schedule.call_beside(int(CHECKING), task, check_stage, *args)
        return db

    (folder / "graphs").mkdir()
    for model in models_of(plan.spec, plan.checkpoint):
        args = plan, model, loras, rehearsal, recordings.copy()
        made = schedule.call(memory[model], watch.task(f"export {model}"), prepare_model, *args)
        for prepared in made:
            name = prepared.graph.contract.name
            recordings.reference[name], peaks[name] = prepared.reference, prepared.peaks
            for trace, calls in zip(recordings.calibration, prepared.calibration, strict=False):
                trace[name] = calls
            stages.append(stage := stage_file(prepared, folder))
            written(prepared.graph)
            if plan.checked == ENGINE:
                continue
            floor = parity.stage_floor(stage)
            how = checked_text(plan, prepared.twin != prepared.graph)
            figures[name] = Parity(math.nan, floor, how)
            if plan.checked == GRAPH:
                others = beside(name, {p.graph.contract.name: p for p in made})
                checks[name] = schedule.beside("checks", check, prepared, others, recordings.copy())
                continue
            # The module was checked already; preparing the next model reads its calls.
            assert prepared.cast is not None and prepared.cast_db is not None
            figures[name] = replace(figures[name], db=prepared.cast_db)
            recordings.cast[name] = prepared.cast
    for name, checked_db in checks.items():
        figures[name] = replace(figures[name], db=checked_db.result())
    if recordings.cast:
        db = parity.psnr_db(picture_of(recordings.reference), picture_of(recordings.cast))
        checked = checked_text(plan, plan.proof_shape != plan.shape)
        figures["picture"] = Parity(db, parity.picture_floor(plan.precisions.values()), checked)
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
        embeddings=tuple(
            {"source": planned.spec.source, "word": word, "vectors": count}
            for planned, (word, count) in zip(plan.checkpoint.embeddings, embeddings, strict=True)
        ),
        parity=figures,
        proof=write_proof(recordings.reference, peaks, rehearsal.settings, folder),
        toolchain={"lcm-compile": __version__, **versions_of(EXPORTERS[plan.graph_format])},
        costs=watch.costs,
        lossy=plan.lossy,
    )


def stage_file(prepared: Prepared, folder: Path) -> StageFile:
    """Returns a stage's entry in the manifest; the path of its graph is relative to `folder`."""
    graph = prepared.graph
    return StageFile(
        graph.contract,
        graph.path.relative_to(folder).as_posix(),
        graph.precision,
        prepared.fp32_layers,
        max((max(pair) for pair in prepared.peaks.values()), default=None),
        prepared.quantized_layers,
        prepared.torch_db,
    )


def check_fit(plan: ExportPlan, loras: LoraFiles) -> list[LoraProvenance]:
    """Calls `prepare.check_fit`, which needs torch, where this is called."""
    from lcm_compile.builder import prepare

    return prepare.check_fit(plan, loras)


def prepare_model(
    plan: ExportPlan, model: str, loras: LoraFiles, rehearsal: Rehearsal, recordings: Recordings
) -> list[Prepared]:
    """Calls `prepare.prepare_model`, which needs torch, where this is called."""
    from lcm_compile.builder import prepare

    return prepare.prepare_model(plan, model, loras, rehearsal, recordings)


def rehearsal_of(
    plan: ExportPlan, contracts: Mapping[str, StageContract], settings: PipelineSettings, folder: Path
) -> Rehearsal:
    """Returns what draws the proof: this machine's GPU if the engines run there, or else a processor."""
    if not plan.draws_on_gpu:
        return Rehearsal(contracts, settings, folder)
    from lcm_compile.proof.cuda_rehearsal import CudaRehearsal

    return CudaRehearsal(contracts, settings, folder)


def read_settings(
    folder: Path, plan: ExportPlan
) -> tuple[PipelineSettings, dict[str, StageContract], list[tuple[str, int]]]:
    """Writes the tokenizers, and returns the pipeline's settings and the contracts for the proof's pictures.

    The third is each textual inversion's word and number of vectors. Raises CheckpointError if a tokenizer or
    an inversion can't be read.
    """
    contracts = make_contracts(plan.checkpoint, plan.proof_shape, plan.spec.rewrites, plan.spec.image)
    embeddings = [(embedding.word, embedding.count) for embedding in read_embeddings(plan.checkpoint)]
    return write_tokenizers(folder, plan), contracts, embeddings


def write_tokenizers(folder: Path, plan: ExportPlan) -> PipelineSettings:
    """Writes each tokenizer as one JSON file, and returns the settings that the LCM loop needs.

    Raises CheckpointError if a tokenizer can't be read.
    """
    checkpoint = plan.checkpoint
    encode = make_contracts(checkpoint, plan.shape)["encode"]
    inputs = [tokens for tokens in encode.inputs if not is_lora_input(tokens.name)]
    tokenizers = []
    (folder / "tokenizers").mkdir()
    for name, encoder, tokens in zip(checkpoint.tokenizers, checkpoint.text_encoders, inputs, strict=True):
        tokenizer = load_tokenizer(checkpoint, name)
        file = f"tokenizers/{name}.json"
        (folder / file).write_text(tokenizer.json, encoding="utf-8")
        tokenizers.append(
            TokenizerSettings(
                input=tokens.name,
                file=file,
                max_length=tokenizer.max_length,
                pad_token_id=tokenizer.pad_token_id,
                chunks=checkpoint.prompt_chunks,
                width=checkpoint.components[encoder].config["hidden_size"],
            )
        )
    row, defaults = plan.few_step, defaults_of(plan.few_step, checkpoint)
    if plan.spec.whole_loop:
        guided = checkpoint.has_guidance_embedding
        scale = defaults.guidance_scale if guided else 1.0
        defaults = replace(defaults, steps=CONTEXT_STEPS, guidance_scale=scale)
    return PipelineSettings(
        plan.shape,
        checkpoint.scheduler,
        tuple(tokenizers),
        checkpoint.zero_negative_prompt,
        checkpoint.family.sample_prompt if checkpoint.family else SAMPLE_PROMPT,
        **vars(defaults),
        few_step=FewStepWeights(row.name, row.made_for, plan.few_step_licence) if row else None,
        **lora_settings(plan),
        control_weights=tuple(float(guide.weight) for guide in plan.spec.guides),
        ip_weight=float(plan.spec.ip_adapter.weight) if plan.spec.ip_adapter else None,
    )


def lora_settings(plan: ExportPlan) -> dict[str, Any]:
    """Returns the settings of the LoRAs that are not fused."""
    inputs = plan.checkpoint.loras
    specs = [lora.spec for lora in plan.loras if lora.spec.name is not None]
    return {
        "loras": tuple(LoraSpec(str(spec.name), spec.weight, spec.strengths) for spec in specs),
        "lora_parts": inputs.parts,
        "lora_slots": LoraSlots(inputs.slots, inputs.rank) if inputs.slots else None,
    }


def check_stage(
    plan: ExportPlan,
    prepared: Prepared,
    rehearsal: Rehearsal,
    recordings: Recordings,
    others: Mapping[str, Prepared],
) -> tuple[float, list[Call]]:
    """Returns a graph's signal-to-noise ratio in dB against torch's calls, and the graph's own calls.

    Its own calls are those of a picture that is drawn with the graphs; each graph then reads what the graphs
    before it gave. The graphs of `others` are run beside it.
    """
    from lcm_compile.engines.onnxruntime import load_as_written

    contracts = graph_contracts(plan.checkpoint, plan.proof_shape, plan.spec)
    name = prepared.twin.contract.name
    with ExitStack() as stack:

        def load(one: Prepared) -> Runner:
            contract = contracts[one.twin.contract.name]
            return stack.enter_context(load_as_written(one.twin.path, contract))

        runner, run = load(prepared), {other: load(one) for other, one in others.items()}
        db = parity.compare_calls(runner, recordings.reference[name])
        drawing = replace(rehearsal, contracts=contracts)
        return db, drawing.record(runner, recordings.cast, beside=run)


def checked_text(plan: ExportPlan, twin: bool) -> str:
    """Returns what was compared with torch, in the manifest's words. `twin` says whether it was the twin."""
    return f"{plan.checked}, of a twin of {plan.proof_shape}" if twin else plan.checked
