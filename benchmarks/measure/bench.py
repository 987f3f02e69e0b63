"""`lcm-compile bench`: a bundle and its rivals measured in turn.

Main path: what is counted (work, peaks) → rivals fused → workers take turns → cold starts → BenchmarkReport.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from lcm_compile.benchmarks.measure import timing
from lcm_compile.benchmarks.measure.environment import PeakGpuMemory, environment_of
from lcm_compile.benchmarks.measure.peaks import PRODUCT_BYTES, Peak, higher, peaks_of, unpublished
from lcm_compile.benchmarks.measure.pictures import REFERENCE, other_batches, parities, recorded_parities
from lcm_compile.benchmarks.measure.report import Benchmark, BenchmarkReport, Case, RivalSamples
from lcm_compile.benchmarks.measure.rivals import (
    RIVALS,
    SELF,
    STEPS,
    Setup,
    check_rivals,
    draw_with_bundle,
    makers,
)
from lcm_compile.benchmarks.measure.work import Work, count_work
from lcm_compile.benchmarks.measure.worker import ColdStart, Maker, Sample, Worker, cold_run, cold_start
from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.bundles.manifest import StageFile
from lcm_compile.checkpoint.open import open_base
from lcm_compile.errors import LcmCompileError
from lcm_compile.graphs import DRAW
from lcm_compile.output.reports import loss_lines
from lcm_compile.pipeline.cuda_graphs import USED
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import picture_floor
from lcm_compile.system.processor import physical_cores

PICTURE = "picture"
COLD = ("cold start", "load", "first picture")  # of new processes; every other case is a stage
COLD_STARTS = 3
PASSES = {"step": STEPS}  # of a stage for one picture, where it is not one

# Told what is being done, and how much of it is done.
Report = Callable[[str, int, int], None]


@dataclass
class Measured:
    """What the workers gave, by who drew: us, or a rival's name."""

    samples: dict[str, list[Sample]]
    memory: dict[str, int | None]
    gpu_memory: dict[str, int | None]
    colds: dict[str, list[ColdStart]] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """A bundle and its rivals, ready to be loaded; `work` of one pass by stage, where it could be counted.

    `others` are those rivals that are bundles.
    """

    bundle: EngineBundle
    others: Mapping[str, EngineBundle]
    drawers: Mapping[str, Maker]
    threads: int
    work: Mapping[str, Work]
    notes: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.bundle.manifest.pipeline.sample_prompt

    @property
    def precisions(self) -> dict[str, Precision]:
        return {stage.contract.name: stage.precision for stage in self.bundle.manifest.stages}


def bench(
    bundle: EngineBundle,
    against: Sequence[str] = (),
    runs: int = 20,
    seconds: float = 120.0,
    report: Report = lambda doing, done, total: None,
    cold_starts: int = COLD_STARTS,
) -> BenchmarkReport:
    """Measures every stage of a bundle, the whole picture and cold starts, with rivals taking turns.

    UsageError for a rival that can't be had; else what opening the base or loading the bundle raises.
    """
    manifest, cores = bundle.manifest, physical_cores()
    with contest(bundle, against, report) as rivals:
        report("measure the device's peak", 0, 1)
        peaks = peaks_of(manifest.target, rivals.precisions.values(), cores)
        measured = measure(rivals, runs, seconds, min(cold_starts, runs), report)
    # Once more: what another program took from the first time is not the device's.
    peaks = higher(peaks, peaks_of(manifest.target, rivals.precisions.values(), cores))
    cases = cases_of(rivals, measured, peaks)
    asked = Benchmark(
        spec=manifest.spec,
        against=tuple(name for name in rivals.drawers if name != SELF),
        runs=runs,
        seconds=seconds,
        backend=manifest.backend,
        precisions=rivals.precisions,
        shape=manifest.pipeline.shape,
        bundle=bundle.digest,
    )
    told = warnings(cases, rivals.precisions, manifest.lossy)
    told += unpublished(manifest.target, rivals.precisions.values(), peaks)
    if not manifest.target.is_cpu and (graphs := measured.samples[SELF][-1].drawn.cuda_graph) != USED:
        told.append(f"CUDA graphs were {graphs}")
    notes = (*rivals.notes, *told)
    return BenchmarkReport(environment_of(manifest.target, cores, peaks), asked, cases, notes)


@contextmanager
def contest(
    bundle: EngineBundle, against: Sequence[str], report: Report = lambda doing, done, total: None
) -> Iterator[Contest]:
    """Fuses what the rivals need, which is gone afterwards. UsageError for one that can't be had."""
    manifest = bundle.manifest
    rivals = check_rivals(tuple(against), bundle)
    others = {name: other for name, other in rivals.items() if other is not None}
    work, notes = counted(bundle)
    precision = manifest.stages[0].precision.floats  # in all stages the same
    setup = Setup(manifest.pipeline.shape, precision, physical_cores(), not manifest.target.is_cpu)
    # A tiny autoencoder is our user's choice for speed: held to the base's own, it shows what that brings.
    spec = replace(manifest.spec, vae=None) if "decode" in manifest.lossy else manifest.spec
    with makers(rivals, spec, setup, lambda doing: report(doing, 0, 1)) as made:
        drawers = {SELF: Maker(draw_with_bundle, (bundle.folder,)), **made}
        yield Contest(bundle, others, drawers, setup.threads, work, tuple(notes))


def measure(
    rivals: Contest,
    runs: int,
    seconds: float,
    cold_starts: int,
    report: Report = lambda doing, done, total: None,
) -> Measured:
    """Samples of new processes: warm ones in turn, then cold starts."""
    measured = take_warm(rivals.drawers, rivals.prompt, rivals.threads, runs, seconds, report)
    if cold_starts:
        measured.colds = take_cold(rivals.drawers, rivals.prompt, rivals.threads, cold_starts, report)
    return measured


def cases_of(rivals: Contest, measured: Measured, peaks: Mapping[Precision, Peak]) -> tuple[Case, ...]:
    """The picture, each stage, and cold starts."""
    stages = [
        stage_case(
            stage,
            rivals.bundle,
            measured,
            rivals.work.get(stage.contract.name),
            peaks.get(stage.precision),
        )
        for stage in rivals.bundle.manifest.stages
    ]
    return picture_case(rivals.bundle, rivals.others, stages, measured), *stages, *cold_cases(measured)


def counted(bundle: EngineBundle) -> tuple[dict[str, Work], list[str]]:
    """The work of one pass by stage; none, and a note, where the checkpoint that it is counted on is gone."""
    manifest = bundle.manifest
    try:
        work = count_work(open_base(manifest.spec, half=True), manifest.pipeline.shape)
        return {DRAW: whole_picture(work)} if manifest.spec.whole_loop else work, []
    except LcmCompileError as error:
        return {}, [f"the work could not be counted, which takes the base's settings: {error.message}"]


def whole_picture(work: Mapping[str, Work]) -> Work:
    """That of all stages in one graph, which reads a step's weights at every step."""
    passes = [stage for name, stage in work.items() for _ in range(PASSES.get(name, 1))]
    return sum(passes[1:], passes[0])


def take_warm(
    drawers: Mapping[str, Maker], prompt: str, threads: int, runs: int, seconds: float, report: Report
) -> Measured:
    """Each loaded and warm in a process of its own, then samples of each in turn."""
    gpu_memory: dict[str, int | None] = {}
    with ExitStack() as stack:
        workers = {}
        for i, (name, maker) in enumerate(drawers.items()):
            report(f"load and warm up {name}", i, len(drawers))
            # In the turns all are loaded, and a look would cost whoever draws: warming up draws the same.
            with PeakGpuMemory() as gpu:
                workers[name] = stack.enter_context(Worker(name, maker, threads))
                timing.warm_up(workers[name], prompt)
            gpu_memory[name] = gpu.bytes
        samples = timing.take_turns(
            workers, prompt, runs, seconds, lambda done, total: report("draw in turn", done, total)
        )
        return Measured(samples, {name: worker.peak_memory() for name, worker in workers.items()}, gpu_memory)


def take_cold(
    drawers: Mapping[str, Maker], prompt: str, threads: int, rounds: int, report: Report
) -> dict[str, list[ColdStart]]:
    """Processes that draw one picture each, in turn; of what is compiled anew in each process, none.

    Files are in the system's cache by then: no disk is measured. A script loads everything and then draws. A
    bundle's start to end is that of another process, of the command that people type, which draws while
    engines still load and so can't tell the two apart.
    """
    names = [name for name in drawers if name not in RIVALS or RIVALS[name].starts_cold]
    colds: dict[str, list[ColdStart]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "picture.png"
        for i, (words, seed) in zip(range(rounds), timing.requests(prompt), strict=False):
            for name in timing.in_turn(names, i):
                cold = cold_start(drawers[name], words, seed, path, threads)
                if name not in RIVALS:
                    cold = replace(cold, ms=cold_run(drawers[name].args[0], words, seed, path, threads))
                colds[name].append(cold)
            report("start cold", i + 1, rounds)
    return colds


def milliseconds(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in values)


def picture_case(
    bundle: EngineBundle, others: Mapping[str, EngineBundle], stages: Sequence[Case], measured: Measured
) -> Case:
    """The whole picture, from prompt to 8-bit RGB; its parity as recorded where REFERENCE is no rival."""
    parity = parities(measured.samples) or recorded_parities({SELF: bundle, **others})
    batches = other_batches(measured.samples)
    limits = [stage.limit_ms for stage in stages if stage.limit_ms is not None]
    return Case(
        PICTURE,
        milliseconds([sample.ms for sample in measured.samples[SELF]]),
        {
            name: RivalSamples(
                milliseconds([sample.ms for sample in samples]),
                measured.memory[name] if name not in RIVALS or RIVALS[name].starts_cold else None,
                measured.gpu_memory[name],
                parity.get(name),
                batches.get(name),
            )
            for name, samples in measured.samples.items()
            if name != SELF
        },
        memory_bytes=measured.memory[SELF],
        gpu_memory_bytes=measured.gpu_memory[SELF],
        engine_bytes=sum(stage.engine_bytes or 0 for stage in stages),
        parity_db=parity.get(SELF),
        flop=sum(stage.flop or 0.0 for stage in stages) or None,
        weight_bytes=sum(stage.weight_bytes or 0 for stage in stages) or None,
        limit_ms=sum(limits) if limits else None,
    )


def stage_case(
    stage: StageFile, bundle: EngineBundle, measured: Measured, work: Work | None, peak: Peak | None
) -> Case:
    """One stage, with those rivals that could time it apart."""
    name = stage.contract.name
    figure = bundle.manifest.parity.get(name)
    apart = {
        who: milliseconds([sample.drawn.stages[name] for sample in samples])
        for who, samples in measured.samples.items()
        if name in samples[0].drawn.stages
    }
    passes, batches = PASSES.get(name, 1), other_batches(measured.samples)
    return Case(
        name,
        apart.pop(SELF, ()),
        {who: RivalSamples(samples, batch=batches.get(who)) for who, samples in apart.items()},
        engine_bytes=engine_bytes(bundle, stage),
        parity_db=None if figure is None else round(figure.db, 2),
        flop=None if work is None else passes * work.flop,
        weight_bytes=None if work is None else passes * work.weights * PRODUCT_BYTES[stage.precision.product],
        limit_ms=None if work is None or peak is None else passes * peak.limit_ms(work, stage.precision),
    )


def cold_cases(measured: Measured) -> list[Case]:
    """From a process's start to its end; loading alone; the first picture alone."""
    if not measured.colds:
        return []
    cases = []
    for case, of in zip(COLD, ("ms", "load_ms", "first_ms"), strict=True):
        samples = {
            name: milliseconds([getattr(cold, of) for cold in colds])
            for name, colds in measured.colds.items()
        }
        cases.append(Case(case, samples.pop(SELF), {name: RivalSamples(ms) for name, ms in samples.items()}))
    return cases


def engine_bytes(bundle: EngineBundle, stage: StageFile) -> int:
    """The engine's file, and those beside it under the same name: a backend may keep weights apart."""
    stem = stage.file.rpartition(".")[0] or stage.file
    files = [name for name in bundle.manifest.files if name == stage.file or name.startswith(f"{stem}.")]
    return sum((bundle.folder / name).stat().st_size for name in files)


def warnings(
    cases: Sequence[Case], precisions: Mapping[str, Precision], lossy: Mapping[str, str]
) -> list[str]:
    """What a reader of the figures must know."""
    picture, told = cases[0], loss_lines(lossy)
    others = {name: rival.samples_ms for name, rival in picture.rivals.items()}
    if noise := timing.too_noisy(picture.samples_ms, others):
        told.append(noise)
    floor = picture_floor(precisions.values())
    comparable = REFERENCE in picture.rivals and "decode" not in lossy
    if comparable and picture.parity_db is not None and picture.parity_db < floor:
        told.append(
            f"ours is not the picture that diffusers draws: PSNR {picture.parity_db:.1f} dB, and "
            f"{floor:g} dB is the floor of its precision; has the base changed since the build?"
        )
    over = [stage.name for stage in cases[1:] if stage.limit_ms and stage.limit_ms > median(stage.samples_ms)]
    if over:
        told.append(
            f"{', '.join(over)} took less than the limit: the engine does with less work than the plain "
            "model, or another program slowed the measuring of the peak"
        )
    return told
