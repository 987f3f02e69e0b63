"""The main path of a build: plan → for each stage (prepare → build → check) → bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lcm_compile
from lcm_compile import parity
from lcm_compile.apart import call_apart
from lcm_compile.bundle import (
    MANIFEST,
    BundleManifest,
    EngineBundle,
    Parity,
    PipelineSettings,
    StageEngine,
    TokenizerSettings,
    full_disk_told,
    list_files,
    open_bundle,
    publishing,
)
from lcm_compile.contracts import make_contracts
from lcm_compile.cost import Report, Stopwatch
from lcm_compile.engines import find_backend, installed_version
from lcm_compile.errors import CheckpointError
from lcm_compile.export import EXPORTERS
from lcm_compile.families import SAMPLE_PROMPT
from lcm_compile.loading import load_tokenizer
from lcm_compile.lora import LoraProvenance
from lcm_compile.parity import Call, Trace
from lcm_compile.plan import ENGINE, Plan, make_plan
from lcm_compile.prepare import Prepared, check_fit, prepare_stage
from lcm_compile.schema import json_text
from lcm_compile.spec import BuildSpec, StageContract
from lcm_compile.store import remember


def build(
    spec: BuildSpec,
    out: str | Path | None = None,
    *,
    force: bool = False,
    report: Report = lambda part, cost: None,
) -> EngineBundle:
    """Builds a bundle, or returns the one that already holds this very build.

    `out` is the bundle's folder, by default one in the user's store; `report` is told each part's name as
    it starts, and its cost as it ends. Raises UsageError, CheckpointError, LoraError, BackendError, and
    ParityError when the engines do not draw what torch draws; nothing is published then.
    """
    return build_planned(spec, None if out is None else Path(out), force, report)[1]


def build_planned(
    spec: BuildSpec, out: Path | None, force: bool, report: Report
) -> tuple[Plan, EngineBundle]:
    """`build`, with the plan that was followed: a hit too where another process built it meanwhile."""
    plan = make_plan(spec, out, force)
    if not plan.hit:
        with publishing(plan.folder, lambda: report("wait for another build of this bundle", None)) as folder:
            plan = make_plan(spec, out, force)
            if not plan.hit:
                build_into(folder, plan, report)
                if make_plan(spec, out, force).key != plan.key:
                    raise CheckpointError(
                        "the base or a LoRA changed while it was being built", "build again"
                    )
    remember(plan.folder)
    return plan, open_bundle(plan.folder)


def build_into(folder: Path, plan: Plan, report: Report) -> None:
    """Fills an empty folder with engines, tokenizers, proof and, last, the manifest."""
    watch = Stopwatch(report)
    call = call_apart if plan.is_large else call_here
    provenance: list[LoraProvenance] = []
    if plan.loras:
        with watch.part("check that the LoRAs fit"):
            provenance = call(check_fit, plan)
    contracts = make_contracts(plan.checkpoint, plan.shape)
    settings = write_tokenizers(folder, plan, contracts["encode"])
    proving = replace(settings, shape=plan.proof_shape)
    trace: Trace = {}  # torch's own calls
    drawn: Trace = {}  # those of what was built
    built, figures, peaks = [], {}, {}
    # Inside the folder being built: whoever clears that up after a kill clears the graphs up too.
    graphs_folder = tempfile.TemporaryDirectory(prefix="graphs-", dir=folder)
    engines = folder / "engines"
    engines.mkdir()
    with graphs_folder as graphs, full_disk_told(folder.parent):
        for name, contract in contracts.items():
            scratch = Path(graphs) / name
            scratch.mkdir()
            with watch.part(f"export {name}"):
                prepared = call(prepare_stage, plan, name, proving, folder, scratch, trace, drawn)
            with watch.part(f"build {name}"):
                path = call(plan.backend.build, prepared.graph, plan.target, engines)
            trace[name], peaks[name] = prepared.reference, prepared.peaks
            with watch.part(f"check {name}"):
                db, drawn[name] = call(check_stage, plan, prepared, path, proving, folder, trace, drawn)
            figures[name] = Parity(db, parity.STAGE_FLOORS[plan.precisions[name]], told_check(plan))
            built.append(
                StageEngine(
                    contract,
                    path.relative_to(folder).as_posix(),
                    plan.precisions[name],
                    prepared.fp32_layers,
                    max((max(pair) for pair in prepared.peaks.values()), default=None),
                )
            )
            shutil.rmtree(scratch)
    db = parity.psnr_db(parity.picture_of(trace), parity.picture_of(drawn))
    figures["picture"] = Parity(db, parity.picture_floor(plan.precisions.values()), told_check(plan))
    parity.require(figures)
    manifest = BundleManifest(
        spec=plan.spec,
        target=plan.target,
        backend=plan.backend_name,
        key=plan.key,
        architecture=plan.checkpoint.architecture,
        pipeline=settings,
        stages=tuple(built),
        loras=tuple(
            {"role": planned.role, "sha256": planned.sha256, **lora.to_dict()}
            for planned, lora in zip(plan.loras, provenance, strict=True)
        ),
        parity=figures,
        proof=parity.write_proof(trace, peaks, proving, folder),
        toolchain=toolchain(plan),
        costs=watch.costs,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    manifest = replace(manifest, files=list_files(folder))
    (folder / MANIFEST).write_text(json_text(manifest.to_dict(), indent=1), encoding="utf-8")


def call_here(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def write_tokenizers(folder: Path, plan: Plan, encode: StageContract) -> PipelineSettings:
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
    plan: Plan,
    prepared: Prepared,
    path: Path,
    settings: PipelineSettings,
    folder: Path,
    trace: Trace,
    drawn: Trace,
) -> tuple[float, list[Call]]:
    """What was built: its signal-to-noise over torch's own calls, and its calls in its own picture."""
    if prepared.cast is not None:
        assert prepared.cast_db is not None
        return prepared.cast_db, prepared.cast
    contracts = make_contracts(plan.checkpoint, plan.proof_shape)
    name = prepared.twin.contract.name
    if plan.checked == ENGINE:
        runner = plan.backend.load(path, contracts[name])
    else:
        runner = find_backend("onnxruntime").load(prepared.twin.path, contracts[name])
    with runner:
        db = parity.compare_calls(runner, trace[name])
        return db, parity.relay(runner, contracts, settings, folder, drawn)


def told_check(plan: Plan) -> str:
    shape = plan.proof_shape
    return (
        plan.checked if shape == plan.shape else f"{plan.checked}, of a twin of {shape.height}×{shape.width}"
    )


def toolchain(plan: Plan) -> Mapping[str, str]:
    packages = {*EXPORTERS[plan.backend.GRAPH_FORMAT], "numpy", "tokenizers"}
    versions = {name: str(installed_version((name,))).split(" ")[-1] for name in sorted(packages)}
    return {
        "lcm-compile": lcm_compile.__version__,
        **versions,
        plan.backend_name: str(installed_version(plan.backend.PACKAGES)).split(" ")[-1],
    }
