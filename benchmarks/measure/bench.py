"""`lcm-compile bench`: measures a bundle and its rivals in turn.

Main path: count the work → fuse the rivals' weights → measure the device's peak → take warm samples in turn →
take cold starts → BenchmarkReport.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from lcm_compile.benchmarks.measure import timing
from lcm_compile.benchmarks.measure.environment import PeakGpuMemory, environment_of
from lcm_compile.benchmarks.measure.peaks import PRODUCT_BYTES, Peak, higher, peaks_of, unpublished
from lcm_compile.benchmarks.measure.peers import spec_of_rivals
from lcm_compile.benchmarks.measure.pictures import REFERENCE, other_batches, parities, recorded_parities
from lcm_compile.benchmarks.measure.report import Benchmark, BenchmarkReport, Case, RivalSamples
from lcm_compile.benchmarks.measure.rivals import (
    RIVALS,
    SELF,
    Setup,
    check_rivals,
    draw_with_bundle,
    makers,
)
from lcm_compile.benchmarks.measure.timing import ProgressReport, silent
from lcm_compile.benchmarks.measure.work import Work, count_work
from lcm_compile.benchmarks.measure.worker import ColdStart, Maker, Sample, Worker, cold_run, cold_start
from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.bundles.manifest import BundleManifest, StageFile
from lcm_compile.checkpoint.open import open_base
from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.graphs import CONTROLS, DRAW, ENCODE_IMAGE
from lcm_compile.output.reports import loss_lines
from lcm_compile.pipeline.cuda_graphs import USED
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import picture_floor
from lcm_compile.stages.contracts import CONTEXT_STEPS
from lcm_compile.system.processor import physical_cores

PICTURE = "picture"
# The cases that are measured in new processes. Every case besides these and PICTURE is a stage.
COLD = ("cold start", "load", "first picture")
COLD_STARTS = 3  # how often each program is started cold by default


@dataclass
class Measured:
    """What the workers measured. Each mapping's keys are SELF and the rivals' names.

    `memory` and `gpu_memory` are peaks in bytes, None where they could not be measured.
    """

    samples: dict[str, list[Sample]]
    memory: dict[str, int | None]
    gpu_memory: dict[str, int | None]
    colds: dict[str, list[ColdStart]] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """A bundle and its rivals, ready to be loaded.

    `others` holds the rivals that are bundles, by name. `drawers` holds how to load each of the programs, by
    SELF and the rivals' names. `work` is the work of one pass by stage, empty if it could not be counted.
    """

    bundle: EngineBundle
    others: Mapping[str, EngineBundle]
    drawers: Mapping[str, Maker]
    threads: int
    work: Mapping[str, Work]
    notes: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The bundle's sample prompt, which every request varies."""
        return self.bundle.manifest.pipeline.sample_prompt

    @property
    def precisions(self) -> dict[str, Precision]:
        """The precision of each of the bundle's stages, by stage."""
        return {stage.contract.name: stage.precision for stage in self.bundle.manifest.stages}


def bench(
    bundle: EngineBundle,
    against: Sequence[str] = (),
    runs: int = 20,
    seconds: float = 120.0,
    report: ProgressReport = silent,
    cold_starts: int = COLD_STARTS,
) -> BenchmarkReport:
    """Measures every stage of a bundle, the complete picture and cold starts, with rivals taking turns.

    Takes `runs` samples of each, or fewer once `seconds` have passed, as timing.take_turns explains. Raises
    UsageError or BackendError if a rival can't be used here, and whatever fusing the rivals' weights or
    loading the bundle raises.
    """
    manifest, cores = bundle.manifest, physical_cores()
    with contest(bundle, against, report) as contestants:
        report("measure the device's peak", 0, 1)
        peaks = peaks_of(manifest.target, contestants.precisions.values(), cores)
        measured = measure(contestants, runs, seconds, min(cold_starts, runs), report)
    # Measured a second time, because another program may have slowed the first measurement.
    peaks = higher(peaks, peaks_of(manifest.target, contestants.precisions.values(), cores))
    cases = cases_of(contestants, measured, peaks)
    benchmark = Benchmark(
        spec=manifest.spec,
        against=tuple(name for name in contestants.drawers if name != SELF),
        runs=runs,
        seconds=seconds,
        backend=manifest.backend,
        precisions=contestants.precisions,
        shape=manifest.pipeline.shape,
        bundle=bundle.digest,
    )
    notes = [*contestants.notes, *warnings(cases, contestants.precisions, manifest.lossy)]
    notes += unpublished(manifest.target, contestants.precisions.values(), peaks)
    if not manifest.target.is_cpu and (graphs := measured.samples[SELF][-1].drawn.cuda_graph) != USED:
        notes.append(f"CUDA graphs were {graphs}")
    return BenchmarkReport(environment_of(manifest.target, cores, peaks), benchmark, cases, tuple(notes))


@contextmanager
def contest(
    bundle: EngineBundle, against: Sequence[str], report: ProgressReport = silent
) -> Iterator[Contest]:
    """Yields a bundle and its rivals, ready to be loaded.

    Fuses the rivals' weights into temporary folders, which are deleted when the context ends. Raises
    UsageError or BackendError if a rival can't be used here.
    """
    manifest = bundle.manifest
    if manifest.spec.t2i_adapters or manifest.spec.ip_adapter:
        kind = "a T2I-Adapter" if manifest.spec.t2i_adapters else "an IP-Adapter"
        raise UsageError(
            f"{bundle.folder} has {kind}, and bench measures bundles without",
            replace(manifest.spec, t2i_adapters=(), ip_adapter=None, ip_encoder=None).command(),
        )
    rivals = check_rivals(tuple(against), bundle)
    others = {name: other for name, other in rivals.items() if other is not None}
    work, notes = counted(bundle)
    precision = manifest.stages[0].precision.floats  # the same in all stages
    settings = manifest.pipeline
    setup = Setup(settings.shape, precision, physical_cores(), not manifest.target.is_cpu, settings)
    spec = spec_of_rivals(manifest)
    with makers(rivals, spec, manifest.backend, setup, lambda activity: report(activity, 0, 1)) as made:
        drawers = {SELF: Maker(draw_with_bundle, (bundle.folder,)), **made}
        yield Contest(bundle, others, drawers, setup.threads, work, tuple(notes))


def measure(
    contestants: Contest,
    runs: int,
    seconds: float,
    cold_starts: int,
    report: ProgressReport = silent,
) -> Measured:
    """Takes warm samples of all contestants in turn, and then `cold_starts` cold starts of each."""
    drawers, prompt, threads = contestants.drawers, contestants.prompt, contestants.threads
    measured = take_warm(drawers, prompt, threads, runs, seconds, report)
    if cold_starts:
        measured.colds = take_cold(drawers, prompt, threads, cold_starts, report)
    return measured


def cases_of(contestants: Contest, measured: Measured, peaks: Mapping[Precision, Peak]) -> tuple[Case, ...]:
    """Returns the report's cases: the picture, each stage, and the cold starts."""
    bundle = contestants.bundle
    stages = [
        stage_case(
            stage,
            bundle,
            measured,
            contestants.work.get(stage.contract.name),
            peaks.get(stage.precision),
        )
        for stage in bundle.manifest.stages
        # No picture begins at another one, and what ControlNets take is counted as the step's.
        if stage.contract.name not in (ENCODE_IMAGE, *CONTROLS)
    ]
    return picture_case(bundle, contestants.others, stages, measured), *stages, *cold_cases(measured)


def counted(bundle: EngineBundle) -> tuple[dict[str, Work], list[str]]:
    """Returns the work of one pass by stage, and notes for the reader.

    If the work can't be counted, for example because the base's checkpoint is gone, there is no work, and a
    note gives the reason.
    """
    manifest = bundle.manifest
    try:
        work = count_work(open_base(manifest.spec, half=True), manifest.pipeline.shape)
        return {DRAW: picture_work(work, manifest)} if manifest.spec.whole_loop else work, []
    except LcmCompileError as error:
        return {}, [f"the work could not be counted, because that needs the base's config: {error.message}"]


def passes_of(stage: str, manifest: BundleManifest) -> int:
    """Returns how often a stage runs for one picture of those that the bundle draws by default."""
    settings = manifest.pipeline
    takes = {spec.name for one in manifest.stages for spec in one.contract.inputs}
    guided = settings.guidance_scale > 1 and "guidance" not in takes
    if stage == "step":
        return settings.steps * (1 + guided)
    if stage == "context":
        return -(-settings.steps // CONTEXT_STEPS) * (1 + guided)
    return 1 + guided if stage == "encode" else 1


def picture_work(work: Mapping[str, Work], manifest: BundleManifest) -> Work:
    """Returns the work of all stages as one graph, which reads the step's weights again at every step."""
    passes = [stage for name, stage in work.items() for _ in range(passes_of(name, manifest))]
    return sum(passes[1:], passes[0])


def take_warm(
    drawers: Mapping[str, Maker],
    prompt: str,
    threads: int,
    runs: int,
    seconds: float,
    report: ProgressReport,
) -> Measured:
    """Loads and warms up each program in a process of its own, then takes samples of them in turn."""
    gpu_memory: dict[str, int | None] = {}
    with ExitStack() as stack:
        workers = {}
        for i, (name, maker) in enumerate(drawers.items()):
            report(f"load and warm up {name}", i, len(drawers))
            # GPU memory is read here and not during the turns: then all programs are loaded at once, and
            # reading would slow the one that draws. The pictures of the warm-up take as much memory.
            with PeakGpuMemory() as gpu:
                workers[name] = stack.enter_context(Worker(name, maker, threads))
                timing.warm_up(workers[name], prompt)
            gpu_memory[name] = gpu.bytes
        samples = timing.take_turns(workers, prompt, runs, seconds, report)
        return Measured(samples, {name: worker.peak_memory() for name, worker in workers.items()}, gpu_memory)


def take_cold(
    drawers: Mapping[str, Maker], prompt: str, threads: int, rounds: int, report: ProgressReport
) -> dict[str, list[ColdStart]]:
    """Starts new processes in turn, each of which draws one picture, and returns their times by program.

    Rivals that compile anew in every process are left out. The files are in the system's cache by now, so
    that the disk is not measured. Loading and the first picture are timed in a script that loads everything
    and then draws. A bundle's time from start to end comes from another process, which runs the command that
    people type: that one draws while engines still load, and so can't time loading and drawing separately.
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
    """Returns milliseconds rounded to microseconds, as reports store them."""
    return tuple(round(value, 3) for value in values)


def picture_case(
    bundle: EngineBundle, others: Mapping[str, EngineBundle], stages: Sequence[Case], measured: Measured
) -> Case:
    """Returns the case of the complete picture, from prompt to 8-bit RGB.

    `others` holds the rivals that are bundles, by name. Parity is measured against REFERENCE's pictures; if
    that is not among the rivals, parity is what the builds recorded.
    """
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
    """Returns the case of one stage, with the rivals that could time it separately."""
    name = stage.contract.name
    figure = bundle.manifest.parity.get(name)
    times = {
        program: milliseconds([sample.drawn.stages[name] for sample in samples])
        for program, samples in measured.samples.items()
        if name in samples[0].drawn.stages
    }
    passes, batches = passes_of(name, bundle.manifest), other_batches(measured.samples)
    return Case(
        name,
        times.pop(SELF, ()),
        {rival: RivalSamples(samples, batch=batches.get(rival)) for rival, samples in times.items()},
        engine_bytes=sum(engine_bytes(bundle, one) for one in timed_as(name, bundle)),
        parity_db=None if figure is None else round(figure.db, 2),
        flop=None if work is None else passes * work.flop,
        weight_bytes=None if work is None else passes * work.weights * PRODUCT_BYTES[stage.precision.product],
        limit_ms=None if work is None or peak is None else passes * peak.limit_ms(work, stage.precision),
        passes=passes,
    )


def timed_as(name: str, bundle: EngineBundle) -> list[StageFile]:
    """Returns the stages whose time is counted as that of a stage: itself, and ControlNets as the step."""
    names = (*CONTROLS, name) if name == "step" else (name,)
    return [stage for stage in bundle.manifest.stages if stage.contract.name in names]


def cold_cases(measured: Measured) -> list[Case]:
    """Returns a case for a process from start to end, one for loading, and one for the first picture.

    Returns none if no cold starts were taken.
    """
    if not measured.colds:
        return []
    cases = []
    for case, field_name in zip(COLD, ("ms", "load_ms", "first_ms"), strict=True):
        samples = {
            name: milliseconds([getattr(cold, field_name) for cold in colds])
            for name, colds in measured.colds.items()
        }
        cases.append(Case(case, samples.pop(SELF), {name: RivalSamples(ms) for name, ms in samples.items()}))
    return cases


def engine_bytes(bundle: EngineBundle, stage: StageFile) -> int:
    """Returns the bytes of the engine's file and of files next to it with the same stem.

    A backend may keep the weights in such a file.
    """
    stem = stage.file.rpartition(".")[0] or stage.file
    files = [name for name in bundle.manifest.files if name == stage.file or name.startswith(f"{stem}.")]
    return sum((bundle.folder / name).stat().st_size for name in files)


def warnings(
    cases: Sequence[Case], precisions: Mapping[str, Precision], lossy: Mapping[str, str]
) -> list[str]:
    """Returns what a reader must know before relying on the figures."""
    picture, found = cases[0], loss_lines(lossy)
    others = {name: rival.samples_ms for name, rival in picture.rivals.items()}
    if noise := timing.too_noisy(picture.samples_ms, others):
        found.append(noise)
    floor = picture_floor(precisions.values())
    comparable = REFERENCE in picture.rivals and "decode" not in lossy
    if comparable and picture.parity_db is not None and picture.parity_db < floor:
        found.append(
            f"our picture differs from the one that diffusers draws: PSNR {picture.parity_db:.1f} dB, below "
            f"the floor of {floor:g} dB for its precision; has the base changed since the build?"
        )
    over = [stage.name for stage in cases[1:] if stage.limit_ms and stage.limit_ms > median(stage.samples_ms)]
    if over:
        found.append(
            f"{', '.join(over)} took less time than the limit: the engine does less work than the original "
            "model, or another program slowed the measurement of the peak"
        )
    return found
