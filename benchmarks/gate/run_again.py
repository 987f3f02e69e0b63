"""Runs a baseline's own benchmark again on this machine, in several fresh processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median_low

from lcm_compile.benchmarks.gate.statistics import MIN_SAMPLES
from lcm_compile.benchmarks.measure.bench import cases_of, contest, measure
from lcm_compile.benchmarks.measure.environment import environment_of
from lcm_compile.benchmarks.measure.report import Benchmark, BenchmarkReport, Case, RivalSamples
from lcm_compile.builder.build import build
from lcm_compile.builder.plan import make_plan
from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.errors import BackendError
from lcm_compile.graphs import DRAW

# This many processes detect a change of 15 % on a busy machine, as tests/benchmarks/test_gate_power.py shows.
PROCESSES = 10


def run_again(benchmark: Benchmark, note: Callable[[str], None], processes: int) -> BenchmarkReport:
    """Takes the benchmark's samples again, with its runs and seconds divided among the processes.

    The bundle is built if it is not in the cache. `note` shows a line of progress. Raises BackendError if
    this machine can't build the benchmark's engines, and whatever building or loading them raises.
    """
    bundle = build_again(benchmark)
    manifest = bundle.manifest
    runs = max(MIN_SAMPLES, math.ceil(benchmark.runs / processes))
    reports = []
    with contest(bundle, benchmark.against) as contestants:
        environment = environment_of(manifest.target, contestants.threads, {})
        rerun = replace(
            benchmark,
            backend=manifest.backend,
            precisions=contestants.precisions,
            shape=manifest.pipeline.shape,
            bundle=bundle.digest,
        )
        for i in range(processes):
            note(f"benchmark, process {i + 1} of {processes}")
            measured = measure(contestants, runs, benchmark.seconds / processes, cold_starts=1)
            reports.append(BenchmarkReport(environment, rerun, cases_of(contestants, measured, {})))
    return joined(reports)


def build_again(benchmark: Benchmark) -> EngineBundle:
    """Builds the baseline's bundle, with the backend and the precision that it was measured with.

    If the baseline's spec left them to `auto`, this machine's `auto` might choose others, and the times of
    different engines would be compared. Raises BackendError if this machine can't build the baseline's
    engines.
    """
    spec, measured = benchmark.spec, benchmark.precisions
    if spec.precision == "auto" and measured:
        # With `auto`, all stages have the same precision.
        spec = replace(spec, precision=next(iter(measured.values())))
    spec = replace(spec, backend=benchmark.backend or spec.backend)
    hint = "measure a new baseline with what this machine can build: lcm-compile bench --save FILE"
    try:
        plan = make_plan(spec)
    except BackendError as error:
        raise BackendError(
            f"the baseline's engines can't be built on this machine: {error.message}", hint
        ) from error
    assert plan.export is not None
    before, here = measured.get("step") or measured.get(DRAW), plan.export.precisions["step"]
    # These can differ in an 8-bit step: the processor decides which type is used besides the 8-bit products.
    if before not in (None, here):
        raise BackendError(
            f"the baseline's step computes in {before}; on this machine, --precision {spec.precision} with "
            f"{spec.backend} builds {here}",
            hint,
        )
    return build(spec)


def joined(reports: Sequence[BenchmarkReport]) -> BenchmarkReport:
    """Joins the reports that several processes made of one benchmark into one report.

    It has only the cases and rivals that are in all of them.
    """
    first = reports[0]
    cases = []
    for case in first.cases:
        parallel = [c for report in reports for c in report.cases if c.name == case.name]
        if len(parallel) == len(reports):
            cases.append(join_case(parallel))
    return replace(first, cases=tuple(cases))


def join_case(cases: Sequence[Case]) -> Case:
    """Joins one case's samples from several processes.

    Sizes are the median over processes, parity is the worst. A value that one process lacks is None.
    """

    def middle(name: str) -> int | None:
        values = [getattr(case, name) for case in cases]
        return None if None in values else median_low(values)

    parity = [case.parity_db for case in cases]
    names = [name for name in cases[0].rivals if all(name in case.rivals for case in cases)]
    return replace(
        cases[0],
        samples_ms=sum((case.samples_ms for case in cases), ()),
        rivals={name: join_rival([case.rivals[name] for case in cases]) for name in names},
        groups=tuple(len(case.samples_ms) for case in cases),
        memory_bytes=middle("memory_bytes"),
        gpu_memory_bytes=middle("gpu_memory_bytes"),
        engine_bytes=middle("engine_bytes"),
        parity_db=None if None in parity else min(p for p in parity if p is not None),
    )


def join_rival(rivals: Sequence[RivalSamples]) -> RivalSamples:
    """Joins one rival's samples from several processes; all other values are the first process's."""
    return replace(rivals[0], samples_ms=sum((rival.samples_ms for rival in rivals), ()))
