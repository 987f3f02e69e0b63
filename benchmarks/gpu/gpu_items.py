"""The items of gpu_suite and gpu_smoke. Each of these functions is called in its own process.

Its arguments are `note`, which saves results at once, the name of the target, and a folder that all items
share. It raises Missing if this machine can't run it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lcm_compile.benchmarks.gpu.items import Found, Missing, Note, report_path
from lcm_compile.checkpoint.families import SAMPLE_PROMPT
from lcm_compile.engines import BACKENDS, find_backend, find_target_here
from lcm_compile.engines.gpu import gpu_here, why_no_gpu
from lcm_compile.precisions import Precision
from lcm_compile.spec import BuildSpec
from lcm_compile.system.processor import read_processor
from lcm_compile.system.stopwatch import Stopwatch
from lcm_compile.system.versions import RECORDED_PACKAGES, versions_of
from lcm_compile.targets import TARGETS

if TYPE_CHECKING:
    from lcm_compile.builder.plan import Plan
    from lcm_compile.bundles.bundle import EngineBundle
    from lcm_compile.bundles.export_manifest import Export

MODELS = {
    "sdxl": BuildSpec("sdxl", weights="random"),
    "sd15": BuildSpec("sd15", weights="random"),
    "demo": BuildSpec("demo"),
}
RUNS = 20  # pictures, or batches of them, that the engines and each rival draw
SECONDS = 20.0  # no more pictures are started after this time
# The PSNR between pictures of the same engines, in dB: kernels may only differ in the order of their sums.
SAME_DB = 50.0


def examine_machine(note: Note, target: str, work: Path) -> None:
    """Notes the hardware and the versions of this machine. Raises Missing if it has no GPU of a target."""
    note(
        python=platform.python_version(),
        processor=read_processor().name,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        versions=versions_of(RECORDED_PACKAGES),
    )
    if target == "cpu":
        note(target="cpu")
        return
    import torch

    note(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    if (here := gpu_here()) is None:
        raise Missing(why_no_gpu())
    name = find_target_here()
    note(
        gpu=here[0],
        compute_capability=here[1],
        gpu_memory_bytes=torch.cuda.get_device_properties(0).total_memory,
        driver=driver_version(),
        target=None if TARGETS[name].is_cpu else name,
    )
    note(headline=here[0])
    if TARGETS[name].is_cpu:
        raise Missing(f"no target has the compute capability {here[1]}: lcm-compile targets")


def driver_version() -> str:
    """Returns the driver's version from nvidia-smi, because sandboxes hide the driver's own file."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def examine_backends(note: Note, target: str, work: Path) -> None:
    """Checks each backend as `doctor` does. If one ends the process, the results say which."""
    from lcm_compile.builder.doctor import diagnose_backend

    found: Found = {}
    for name in BACKENDS:
        note(backends={**found, name: "began"})
        found[name] = diagnose_backend(name).to_dict()
    running = [name for name, one in found.items() if one["runs"]]
    note(backends=found, headline=f"run: {', '.join(running) or 'none'}")


def write_weights(note: Note, target: str, work: Path, model: str) -> None:
    """Writes a model with its LCM-LoRA fused, as the diffusers folder that engines and rivals read."""
    from lcm_compile.lora.fuse import fuse

    folder = weights_of(work, model)
    folder.parent.mkdir(exist_ok=True)
    fuse(MODELS[model], folder, "fp32" if TARGETS[target].is_cpu else "fp16", noting(note))
    # Engines decode in half precision. With the original config, diffusers would decode SDXL in fp32.
    config = folder / "vae" / "config.json"
    settings = {**json.loads(config.read_text()), "force_upcast": False}
    config.write_text(json.dumps(settings, indent=2))


def weights_of(work: Path, model: str) -> Path:
    """Returns the folder in which write_weights puts a model."""
    return work / "weights" / model


@dataclass(frozen=True)
class Engines:
    """The engines of one bundle. If `precision` is "", it is the target's default."""

    model: str
    backend: str
    batch: int = 1
    precision: str = ""

    @property
    def name(self) -> str:
        """The name of the bundle, and of the item that builds it."""
        parts = (self.model, self.backend, self.precision, f"by-{self.batch}" if self.batch > 1 else "")
        return "-".join(part for part in parts if part)

    def bundle(self, work: Path) -> Path:
        """Returns the folder of the bundle."""
        return work / "bundles" / self.name

    def spec(self, work: Path, target: str) -> BuildSpec:
        """Returns the spec that builds the bundle from the checkpoint of write_weights."""
        base = str(weights_of(work, self.model))
        # The VAE is named because the build could otherwise take another one from the hub's cache, while
        # diffusers takes this one.
        return BuildSpec(
            base,
            target,
            no_lcm=True,
            vae=base,
            backend=self.backend,
            batch=self.batch,
            precision=self.precision or "auto",
        )


def build_model(note: Note, target: str, work: Path, engines: Engines) -> None:
    """Builds the bundle of some engines. Raises Missing if the target or the backend can't do that."""
    check_can_build(target, engines)
    tell_of(build_quickly(engines.spec(work, target), engines.bundle(work), note), note)


def check_can_build(target: str, engines: Engines) -> None:
    """Raises Missing if the target or the backend can't do what engines are asked to do."""
    from lcm_compile.builder.plan import default_precision

    precision = Precision.of(engines.precision or default_precision(TARGETS[target]), "fp16")
    if lacking := TARGETS[target].lacks(precision):
        raise Missing(f"{TARGETS[target].description} does not compute in {' and '.join(lacking)}")
    if reason := find_backend(engines.backend).cannot_build(TARGETS[target], precision):
        raise Missing(reason)


def tell_of(bundle: EngineBundle, note: Note) -> None:
    """Notes how the stages of a bundle compute, and how close they are to torch."""
    manifest = bundle.manifest
    parity = {name: round(figure.db, 2) for name, figure in manifest.parity.items()}
    note(
        precisions={stage.contract.name: stage.precision for stage in manifest.stages},
        fp32_layers={stage.contract.name: len(stage.fp32_layers) for stage in manifest.stages},
        parity=parity,
        headline=", ".join(f"{name} {db:.0f} dB" for name, db in parity.items()),
    )


def export_model(note: Note, target: str, work: Path, engines: Engines) -> None:
    """Exports the graphs of some engines, whose stages are then built one by one. Raises as build_model."""
    from lcm_compile.builder.build import scheduling_of
    from lcm_compile.builder.export import export_into
    from lcm_compile.bundles.bundle import list_files, publishing
    from lcm_compile.bundles.export_manifest import EXPORT

    check_can_build(target, engines)
    plan = quick_plan(engines.spec(work, target), engines.bundle(work))
    assert plan.export is not None
    with (
        publishing(parts_of(work, engines) / "graphs", manifest=EXPORT) as folder,
        scheduling_of(plan) as schedule,
    ):
        manifest = export_into(folder, plan.export, schedule, noting(note))
        replace(manifest, files=list_files(folder, but=EXPORT)).write(folder)
    note(stages=[stage.contract.name for stage in manifest.stages])


def parts_of(work: Path, engines: Engines) -> Path:
    """Returns the folder of the graphs of a large model, and of its engines until all are there."""
    return work / "parts" / engines.name


def read_export(work: Path, engines: Engines) -> Export:
    """Returns what export_model wrote. Its gigabytes are not read to check them."""
    from lcm_compile.bundles.export_manifest import Export, ExportManifest

    folder = parts_of(work, engines) / "graphs"
    return Export(folder, ExportManifest.read(folder)[0])


def build_one(note: Note, target: str, work: Path, engines: Engines, name: str) -> None:
    """Builds the engine of one stage of a model that export_model has exported."""
    export, folder = read_export(work, engines), parts_of(work, engines)
    stage = next(stage for stage in export.manifest.stages if stage.contract.name == name)
    (folder / "engines").mkdir(exist_ok=True)
    plan = quick_plan(engines.spec(work, target), engines.bundle(work))
    path = plan.backend.build(export.graph(stage), plan.target, folder / "engines", plan.options)
    file = path.relative_to(folder).as_posix()
    note(file=file, megabytes=round(path.stat().st_size / 1e6, 1))


def assemble_model(note: Note, target: str, work: Path, engines: Engines) -> None:
    """Makes a bundle of the engines that build_one has built, and checks them."""
    from lcm_compile.builder.build import copy_engines, finish_bundle, scheduling_of
    from lcm_compile.bundles.bundle import open_bundle, publishing

    export, folder, out = read_export(work, engines), parts_of(work, engines), engines.bundle(work)
    stages = []
    for stage in export.manifest.stages:
        told = json.loads((work / f"{engines.name}-{stage.contract.name}.json").read_text())
        stages.append(replace(stage, file=told["file"]))
    plan = quick_plan(engines.spec(work, target), out)
    out.parent.mkdir(exist_ok=True)
    with publishing(out) as new, scheduling_of(plan) as schedule:
        copy_engines(folder, new)
        finish_bundle(new, export, plan, stages, schedule, Stopwatch(noting(note)))
    shutil.rmtree(folder)
    tell_of(open_bundle(out), note)


def quick_plan(spec: BuildSpec, out: Path) -> Plan:
    """Returns the plan of a build for whose proof torch draws a small picture, if the model is large.

    A full-size picture of SDXL takes minutes on a processor. `measure` compares full-size pictures with those
    of diffusers.
    """
    from lcm_compile.builder.plan import GRAPH, make_plan, proof_shape

    plan = make_plan(spec, out)
    graphs = plan.export
    assert graphs is not None
    small = proof_shape(graphs.checkpoint, graphs.shape, GRAPH)
    return replace(plan, source=replace(graphs, proof_shape=small))


def build_quickly(spec: BuildSpec, out: Path, note: Note) -> EngineBundle:
    """Builds a bundle by the plan of quick_plan."""
    from lcm_compile.builder.build import build_missing
    from lcm_compile.bundles.bundle import open_bundle, publishing

    plan = quick_plan(spec, out)
    out.parent.mkdir(exist_ok=True)
    with publishing(out) as folder:
        build_missing({out: plan}, {out: folder}, False, noting(note))
    return open_bundle(out)


def record_proof(note: Note, target: str, work: Path, model: str) -> None:
    """Records what torch computes in fp32 on this device for each stage, at the size of the engines.

    The build of a large model records a smaller picture, which a processor draws in seconds.
    """
    from lcm_compile.builder.export import write_tokenizers
    from lcm_compile.builder.plan import default_precision, plan_graphs
    from lcm_compile.builder.prepare import cast_stages
    from lcm_compile.builder.prepared import LoraFiles
    from lcm_compile.proof.cuda_rehearsal import CudaRehearsal
    from lcm_compile.proof.recording import Recordings, Rehearsal, write_proof
    from lcm_compile.stages.contracts import make_contracts, models_in

    spec = replace(Engines(model, "auto").spec(work, target), precision=default_precision(TARGETS[target]))
    plan = plan_graphs(spec, "onnx")
    plan = replace(plan, proof_shape=plan.shape)  # the engines' own size
    folder = proof_of(work, model)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = write_tokenizers(folder, plan)
    contracts = make_contracts(plan.checkpoint, plan.shape, plan.spec.rewrites)
    device = "cpu" if TARGETS[target].is_cpu else "cuda"
    kind = Rehearsal if device == "cpu" else CudaRehearsal
    rehearsal, recordings = kind(contracts, settings, folder), Recordings.empty()
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    for model_name in models_in(plan.checkpoint):
        for cast in cast_stages(plan, model_name, LoraFiles(plan), rehearsal, recordings):
            seconds[cast.stage.name] = round(time.perf_counter() - start, 1)
            note(seconds_to=seconds)
    write_proof(recordings.reference, {}, settings, folder)
    note(headline=f"of {plan.shape}, on {device}")


def proof_of(work: Path, model: str) -> Path:
    """Returns the folder in which record_proof puts its recordings of a model."""
    return work / "proofs" / model


def verify_model(note: Note, target: str, work: Path, engines: Engines) -> None:
    """Verifies every engine of a bundle and its picture, with the proof of record_proof if there is one.

    Raises ParityError if one of them misses its floor, and Missing if there is no proof of the bundle's size.
    """
    from lcm_compile.bundles.bundle import open_bundle
    from lcm_compile.proof.parity import require
    from lcm_compile.proof.verify import verify

    folder = engines.bundle(work)
    if (recorded := proof_of(work, engines.model) / "proof").is_dir():
        take_proof(folder, recorded)
    bundle = open_bundle(folder)
    if bundle.manifest.proof.shape != bundle.manifest.pipeline.shape:
        raise Missing("its proof is of a smaller picture")
    figures = verify(bundle)
    verified = {name: {"db": round(figure.db, 2), "floor": figure.floor} for name, figure in figures.items()}
    headline = ", ".join(f"{name} {figure.db:.0f} dB" for name, figure in figures.items())
    note(verified=verified, headline=headline)
    require(figures)


def take_proof(folder: Path, recorded: Path) -> None:
    """Replaces the proof of a bundle by one of the bundle's own size, with the same prompt and seed."""
    from lcm_compile.bundles.bundle import list_files
    from lcm_compile.bundles.manifest import read_manifest

    manifest, _ = read_manifest(folder)
    shutil.copytree(recorded, folder / "proof", dirs_exist_ok=True)
    digests = {f"proof/{name}": digest for name, digest in list_files(folder / "proof").items()}
    proof = replace(manifest.proof, shape=manifest.pipeline.shape)
    replace(manifest, proof=proof, files={**manifest.files, **digests}).write(folder)


def measure(note: Note, target: str, work: Path, name: str, engines: Engines, *rivals: str) -> None:
    """Measures engines alone, and then in turn with rivals, so that a rival that hangs loses no results."""
    from lcm_compile.benchmarks.measure.bench import bench
    from lcm_compile.benchmarks.measure.summary import summarise
    from lcm_compile.bundles.bundle import open_bundle

    bundle = open_bundle(engines.bundle(work))
    for against in ((), rivals):
        report = bench(bundle, against, RUNS, SECONDS, cold_starts=0)
        report.save(report_path(work, name))
        picture = report.cases[0]
        note(
            summary=summarise(report),
            limit_ms=picture.limit_ms,
            gpu_memory_bytes=picture.gpu_memory_bytes,
            notes=report.notes,
            headline=f"{median(picture.samples_ms):.1f} ms",
        )
    rival_summaries = summarise(report)["cases"]["picture"]["rivals"]
    ratios = [f"{name} takes {rival['ratio']:.2f}×" for name, rival in rival_summaries.items()]
    note(
        psnr_db=picture.parity_db,
        rivals_db={name: rival.parity_db for name, rival in picture.rivals.items()},
        headline=", ".join([f"{median(picture.samples_ms):.1f} ms", *ratios]),
    )


def compare_graphs(note: Note, target: str, work: Path, engines: Engines) -> None:
    """Draws the same pictures with and without CUDA graphs, in turn. Raises ParityError if they differ."""
    from lcm_compile.benchmarks.measure.timing import LEAST_ROUNDS, WARM_UP, WARM_UP_SEED, in_turn, requests
    from lcm_compile.errors import ParityError
    from lcm_compile.pipeline.load import load
    from lcm_compile.pipeline.request import Request
    from lcm_compile.proof.parity import psnr_db

    batch = engines.batch
    ms: dict[str, list[float]] = {"with": [], "without": []}
    worst, start = 200.0, time.perf_counter()
    with load(engines.bundle(work), prompt_cache=0) as pipeline:
        for i in range(WARM_UP):
            pipeline.draw(Request(SAMPLE_PROMPT, WARM_UP_SEED + i, num_images=batch))
        for i, (prompt, seed) in zip(range(RUNS), requests(SAMPLE_PROMPT), strict=False):
            if i >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
                break
            drawn = {}
            for way in in_turn(list(ms), i):
                pipeline.cuda_graph = way == "with"
                drawn[way] = pipeline.draw(Request(prompt, seed, num_images=batch))
                ms[way].append(drawn[way].ms["total"])
            worst = min(worst, psnr_db(drawn["without"].pictures, drawn["with"].pictures))
    status = drawn["with"].cuda_graph
    medians = ", ".join(f"{way} {median(values):.1f} ms" for way, values in ms.items())
    note(cuda_graph=status, ms=ms, psnr_db=round(worst, 2), headline=f"{medians}, {worst:.0f} dB; {status}")
    if worst < SAME_DB:
        raise ParityError(f"with CUDA graphs another picture is drawn: {worst:.1f} dB, needs {SAME_DB:g}")


def draw_portable(note: Note, target: str, work: Path) -> None:
    """Draws the demo with portable engines of TensorRT for RTX, which name no compute capability."""
    from lcm_compile.builder.export import export
    from lcm_compile.bundles.export_manifest import Export
    from lcm_compile.engines import tensorrt, tensorrt_rtx
    from lcm_compile.pipeline.load import load_tokenizers
    from lcm_compile.pipeline.pipeline import LcmPipeline
    from lcm_compile.pipeline.request import Request
    from lcm_compile.proof.parity import compare_calls
    from lcm_compile.proof.recording import read_calls

    if reason := tensorrt_rtx.cannot_run(TARGETS[target]):
        raise Missing(reason)
    import tensorrt_rtx as trt

    def allocate_before_running(config: Any) -> None:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    with tempfile.TemporaryDirectory(dir=work) as folder:
        graphs = Path(folder) / "graphs"
        parity, runners = {}, {}
        exported = Export(graphs, export(BuildSpec("demo", precision="fp16"), graphs, report=noting(note)))
        for stage in exported.manifest.stages:
            name = stage.contract.name
            note(building=name)
            path = tensorrt.build_with(trt, exported.graph(stage), Path(folder), allocate_before_running)
            note(loading=name)
            runners[name] = tensorrt_rtx.load(path, stage.contract, TARGETS[target], stage.precision)
            calls = read_calls(graphs / "proof" / f"{name}.npz", stage.contract)
            parity[name] = round(compare_calls(runners[name], calls), 2)
            note(parity=parity, headline=", ".join(f"{name} {db:.0f} dB" for name, db in parity.items()))
        tokenizers = load_tokenizers(graphs, exported.manifest.pipeline)
        with LcmPipeline(exported.manifest.pipeline, runners, tokenizers) as pipeline:
            for _ in range(3):
                note(ms=pipeline.draw(Request(SAMPLE_PROMPT, 0)).ms)


def noting(note: Note) -> Callable[[str, Any], None]:
    """Returns a build's report that notes the cost of each task, as `parts`; None while it runs."""
    costs: Found = {}

    def report(task: str, cost: Any) -> None:
        costs[task] = None if cost is None else asdict(cost)
        note(parts=costs)

    return report
