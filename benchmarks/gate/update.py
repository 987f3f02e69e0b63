"""A baseline after a comparison: tightened by what became better, or replaced for a reason."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from lcm_compile.benchmarks.gate.compare import (
    BETTER,
    PARITY,
    QUANTILES,
    SIZES,
    Comparison,
    Pair,
    both_log_times,
    pair_of,
    too_few,
    where,
    yardsticks,
)
from lcm_compile.benchmarks.gate.statistics import spread
from lcm_compile.benchmarks.measure.report import BenchmarkReport, Case, Loosening, RivalSamples


def tightened(base: BenchmarkReport, new: BenchmarkReport, comparison: Comparison) -> BenchmarkReport:
    """`base`, with what NEW is surely better at and the cases that only NEW has. Nothing gets worse.

    A case's samples are taken together: where a quantile is surely better, and none is worse.
    """
    better = {(v.case, v.metric) for v in comparison.verdicts if v.status == BETTER}
    given = {case.name: case for case in new.cases}
    if not better and given.keys() == {case.name for case in base.cases}:
        return base

    def tighten(case: Case) -> Case:
        pair = pair_of(case, base, given.pop(case.name), new)
        case, fresh = alone(case, base), alone(pair.new, new)
        figures = {
            field: getattr(fresh, field)
            for metric, field in {**SIZES, PARITY: "parity_db"}.items()
            if (case.name, metric) in better
        }
        times = {v.status for v in comparison.verdicts if v.case == case.name and v.metric in QUANTILES}
        if BETTER in times and none_is_slower(pair):
            taken = {name: getattr(fresh, name) for name in ("samples_ms", "rivals", "groups")}
            case = replace(case, **taken, environment=where(fresh, new))
        return replace(case, **figures)

    cases = [tighten(case) for case in base.cases]
    cases += [replace(alone(case, new), environment=where(case, new)) for case in given.values()]
    return replace(base, cases=tuple(cases))


def none_is_slower(pair: Pair) -> bool:
    """Whether no quantile that the baseline tells is greater in NEW by the estimates, judged or not."""
    for metric, quantile in QUANTILES.items():
        base, new = both_log_times(pair, metric)
        if too_few(base, quantile):
            continue
        if too_few(new, quantile) or spread(new, quantile).value > spread(base, quantile).value:
            return False
    return True


def alone(case: Case, report: BenchmarkReport) -> Case:
    """The case with its yardsticks, which the other cases of its report may not keep."""
    return replace(
        case, rivals=case.rivals or {k: RivalSamples(v) for k, v in yardsticks(case, report).items()}
    )


def replaced(base: BenchmarkReport, new: BenchmarkReport, why: str) -> BenchmarkReport:
    """NEW as the baseline, with the reasons of this replacement and of those before."""
    noted = Loosening(datetime.now(UTC).isoformat(timespec="seconds"), why)
    return replace(new, loosened=(*base.loosened, noted))
