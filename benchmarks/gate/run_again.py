"""A baseline's own benchmark, run again here in several fresh processes."""

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

# On a busy machine it takes so many to tell 15 % from nothing: tests/test_gate_power.py.
PROCESSES = 10


def run_again(benchmark: Benchmark, note: Callable[[str], None], processes: int) -> BenchmarkReport:
    """The benchmark's samples, its runs and seconds shared out; the bundle is built if need be.

    BackendError where its engines can't be had here; else what building or loading them raises.
    """
    bundle = build_again(benchmark)
    manifest = bundle.manifest
    runs = max(MIN_SAMPLES, math.ceil(benchmark.runs / processes))
    reports = []
    with contest(bundle, benchmark.against) as rivals:
        environment = environment_of(manifest.target, rivals.threads, {})
        asked = replace(
            benchmark,
            backend=manifest.backend,
            precisions=rivals.precisions,
            shape=manifest.pipeline.shape,
            bundle=bundle.digest,
        )
        for i in range(processes):
            note(f"benchmark, process {i + 1} of {processes}")
            measured = measure(rivals, runs, benchmark.seconds / processes, cold_starts=1)
            reports.append(BenchmarkReport(environment, asked, cases_of(rivals, measured, {})))
    return joined(reports)


def build_again(benchmark: Benchmark) -> EngineBundle:
    """The baseline's bundle, on the backend and in the precision that `auto` came to where it was measured.

    Another machine's `auto` may come to others, whose times would be held to these. BackendError where those
    of the baseline can't be had here.
    """
    spec, measured = benchmark.spec, benchmark.precisions
    if spec.precision == "auto" and measured:
        spec = replace(spec, precision=next(iter(measured.values())))  # all stages have one then
    spec = replace(spec, backend=benchmark.backend or spec.backend)
    way_out = "measure a baseline of what this machine can build: lcm-compile bench --save FILE"
    try:
        plan = make_plan(spec)
    except BackendError as error:
        raise BackendError(f"the baseline's engines can't be had here: {error.message}", way_out) from error
    assert plan.export is not None
    was, here = measured.get("step") or measured.get(DRAW), plan.export.precisions["step"]
    if was not in (None, here):  # what an 8-bit step has beside its products is the processor's to say
        raise BackendError(
            f"the baseline's step computes in {was}; with --precision {spec.precision}, {spec.backend} "
            f"builds {here} here",
            way_out,
        )
    return build(spec)


def joined(reports: Sequence[BenchmarkReport]) -> BenchmarkReport:
    """Reports of one benchmark from several processes as one; only cases and rivals that all of them have."""
    first = reports[0]
    cases = []
    for case in first.cases:
        same = [c for report in reports for c in report.cases if c.name == case.name]
        if len(same) == len(reports):
            cases.append(join_case(same))
    return replace(first, cases=tuple(cases))


def join_case(cases: Sequence[Case]) -> Case:
    """Sizes are the middle process's, parity is the worst one's; what one process lacks, all lack."""

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
    return replace(rivals[0], samples_ms=sum((rival.samples_ms for rival in rivals), ()))
