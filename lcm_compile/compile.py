"""The main path of a build: plan → fuse → stages → record → export → build → check → bundle."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import lcm_compile
from lcm_compile import parity
from lcm_compile.bundle import (
    MANIFEST,
    BundleManifest,
    EngineBundle,
    PipelineSettings,
    StageEngine,
    TokenizerSettings,
    full_disk_told,
    list_files,
    open_bundle,
    publishing,
)
from lcm_compile.checkpoints import load_modules, load_tokenizer
from lcm_compile.engines import find_backend, installed_version
from lcm_compile.engines.runner import Runner
from lcm_compile.errors import CheckpointError
from lcm_compile.export import EXPORTERS, export_stage
from lcm_compile.families import SAMPLE_PROMPT
from lcm_compile.lora import fuse_loras, read_lora
from lcm_compile.parity import Parity, Recording
from lcm_compile.pipeline import LcmPipeline, Request, load_tokenizers
from lcm_compile.plan import Plan, make_plan
from lcm_compile.schema import json_text
from lcm_compile.spec import BuildSpec, ExportedGraph, StageContract
from lcm_compile.store import remember
from lcm_compile.targets import TARGETS

if TYPE_CHECKING:
    from lcm_compile.stages import Stage

Report = Callable[[str], None]


class Stopwatch:
    """Reports each part of a build as it starts, and keeps its seconds."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._report(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def build(
    spec: BuildSpec,
    out: str | Path | None = None,
    *,
    force: bool = False,
    report: Report = lambda part: None,
) -> EngineBundle:
    """Builds a bundle, or returns the one that already holds this very build.

    `out` is the bundle's folder, by default one in the user's store; `report` is told each part's name as
    it starts. Raises UsageError, CheckpointError, LoraError, BackendError, and ParityError when the
    engines do not draw what torch draws; nothing is published then.
    """
    return build_planned(spec, None if out is None else Path(out), force, report)[1]


def build_planned(
    spec: BuildSpec, out: Path | None, force: bool, report: Report
) -> tuple[Plan, EngineBundle]:
    """`build`, with the plan that was followed: a hit too where another process built it meanwhile."""
    plan = make_plan(spec, out, force)
    if not plan.hit:
        with publishing(plan.folder, lambda: report("wait for another build of this bundle")) as folder:
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
    from lcm_compile.stages import make_stages

    watch = Stopwatch(report)
    with watch.part("load the checkpoint"):
        loras = [(read_lora(planned.path), planned.spec) for planned in plan.loras]
        modules = load_modules(plan.checkpoint)
    with watch.part("fuse the LoRAs"):
        provenance = fuse_loras(modules.named(), loras)
        del loras
    stages = make_stages(plan.checkpoint, modules, plan.shape)
    settings = write_tokenizers(folder, plan, stages[0].contract)
    with watch.part("draw the reference in torch"):
        recording = parity.record(stages, settings, folder)
    built, figures = [], {}
    # Inside the folder being built: whoever clears that up after a kill clears the graphs up too.
    graphs_folder = tempfile.TemporaryDirectory(prefix="graphs-", dir=folder)
    with graphs_folder as scratch, full_disk_told(folder.parent):
        for stage in stages:
            built.append(build_stage(stage, plan, recording, folder, Path(scratch), watch))
            with watch.part(f"check {stage.name}"):
                figures[stage.name] = check_stage(built[-1], plan, recording)
        with watch.part("check the picture"):
            figures["picture"] = check_picture(built, plan, recording, settings, folder)
    parity.require(figures)
    manifest = BundleManifest(
        spec=plan.spec,
        target=plan.target,
        backend=plan.backend_name,
        key=plan.key,
        architecture=plan.checkpoint.architecture,
        pipeline=settings,
        stages=tuple(b.engine for b in built),
        loras=tuple(
            {"role": planned.role, "sha256": planned.sha256, **lora.to_dict()}
            for planned, lora in zip(plan.loras, provenance, strict=True)
        ),
        parity=figures,
        proof=parity.write_proof(recording, folder),
        toolchain=toolchain(plan),
        seconds=watch.seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    manifest = replace(manifest, files=list_files(folder))
    (folder / MANIFEST).write_text(json_text(manifest.to_dict(), indent=1), encoding="utf-8")


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


@dataclass(frozen=True)
class BuiltStage:
    """A stage in its precision, the graph it became, and the engine built from that."""

    cast: Stage
    graph: ExportedGraph
    engine: StageEngine
    path: Path


def build_stage(
    stage: Stage, plan: Plan, recording: Recording, folder: Path, scratch: Path, watch: Stopwatch
) -> BuiltStage:
    """One stage: cast, exported, built."""
    from lcm_compile.precision import layers_over, to_precision

    precision = plan.precisions[stage.name]
    peaks = recording.peaks[stage.name]
    kept = layers_over(stage.module, peaks) if precision == "fp16" else set()
    cast = replace(stage, module=to_precision(stage.module, precision, kept))
    with watch.part(f"export {stage.name}"):
        graph = export_stage(cast, plan.backend.GRAPH_FORMAT, precision, scratch)
    engines = folder / "engines"
    engines.mkdir(exist_ok=True)
    with watch.part(f"build {stage.name}"):
        path = plan.backend.build(graph, plan.target, engines)
    engine = StageEngine(
        stage.contract,
        path.relative_to(folder).as_posix(),
        precision,
        tuple(sorted(kept)),
        max((max(pair) for pair in peaks.values()), default=None),
    )
    return BuiltStage(cast, graph, engine, path)


def check_stage(built: BuiltStage, plan: Plan, recording: Recording) -> Parity:
    runner, checked = runner_here(built, plan)
    with runner:
        db = parity.compare_calls(runner, recording.calls[built.cast.name])
    return Parity(db, parity.STAGE_FLOORS[built.engine.precision], checked)


def runner_here(built: BuiltStage, plan: Plan) -> tuple[Runner, str]:
    """The engine where it runs here; else the very graph it was built from, on ONNX Runtime's CPU provider.

    That provider has no bf16: there the torch module that was exported stands for it. Also says which.
    """
    contract = built.engine.contract
    if plan.backend.cannot_run(plan.target) is None:
        return plan.backend.load(built.path, contract, plan.target), "engine"
    onnxruntime = find_backend("onnxruntime")
    cpu = TARGETS["cpu"]
    if onnxruntime.cannot_build(cpu, built.graph.precision) is None:
        return onnxruntime.load(built.graph.path, contract, cpu), "graph, on ONNX Runtime's CPU provider"
    return parity.TorchRunner(built.cast), "torch module that was exported"


def check_picture(
    built: list[BuiltStage], plan: Plan, recording: Recording, settings: PipelineSettings, folder: Path
) -> Parity:
    """The sample prompt's whole picture, against torch's."""
    runners, checked = {}, "engine"
    for stage in built:
        runners[stage.cast.name], checked = runner_here(stage, plan)
    with LcmPipeline(settings, runners, load_tokenizers(folder, settings)) as pipeline:
        request = Request(recording.prompt, parity.PROOF_SEED, steps=parity.PROOF_STEPS)
        picture = parity.draw_for_proof(pipeline, request)
    db = parity.psnr_db(recording.picture, picture)
    return Parity(db, parity.picture_floor(plan.precisions.values()), checked)


def toolchain(plan: Plan) -> Mapping[str, str]:
    packages = {*EXPORTERS[plan.backend.GRAPH_FORMAT], "numpy", "tokenizers"}
    versions = {name: str(installed_version((name,))).split(" ")[-1] for name in sorted(packages)}
    return {
        "lcm-compile": lcm_compile.__version__,
        **versions,
        plan.backend_name: str(installed_version(plan.backend.PACKAGES)).split(" ")[-1],
    }
