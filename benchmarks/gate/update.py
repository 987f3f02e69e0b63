"""Updates a baseline after a comparison: tightens it by what became better, or replaces it, with a reason."""

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
    case_environment,
    pair_of,
    too_few,
    yardsticks,
)
from lcm_compile.benchmarks.gate.statistics import spread
from lcm_compile.benchmarks.measure.report import BenchmarkReport, Case, Loosening, RivalSamples


def tightened(base: BenchmarkReport, new: BenchmarkReport, comparison: Comparison) -> BenchmarkReport:
    """Returns the baseline with every figure whose verdict is BETTER, and with the cases that only NEW has.

    Nothing becomes worse. A case's samples are replaced all together, if the verdict on one of their
    quantiles is BETTER and no quantile is greater.
    """
    better = {(v.case, v.metric) for v in comparison.verdicts if v.status == BETTER}
    new_cases = {case.name: case for case in new.cases}
    if not better and new_cases.keys() == {case.name for case in base.cases}:
        return base

    def tighten(case: Case) -> Case:
        pair = pair_of(case, base, new_cases.pop(case.name), new)
        case, newer = with_yardsticks(case, base), with_yardsticks(pair.new, new)
        figures = {
            field: getattr(newer, field)
            for metric, field in {**SIZES, PARITY: "parity_db"}.items()
            if (case.name, metric) in better
        }
        times = {v.status for v in comparison.verdicts if v.case == case.name and v.metric in QUANTILES}
        if BETTER in times and none_is_slower(pair):
            samples = {name: getattr(newer, name) for name in ("samples_ms", "rivals", "groups")}
            case = replace(case, **samples, environment=case_environment(newer, new))
        return replace(case, **figures)

    cases = [tighten(case) for case in base.cases]
    cases += [
        replace(with_yardsticks(case, new), environment=case_environment(case, new))
        for case in new_cases.values()
    ]
    return replace(base, cases=tuple(cases))


def none_is_slower(pair: Pair) -> bool:
    """Returns whether no quantile is greater in NEW than in the baseline, by the estimates.

    It compares all quantiles that the baseline has enough samples for, also those without a limit. One that
    NEW has too few samples for counts as greater.
    """
    for metric, quantile in QUANTILES.items():
        base, new = both_log_times(pair, metric)
        if too_few(base, quantile):
            continue
        if too_few(new, quantile) or spread(new, quantile).value > spread(base, quantile).value:
            return False
    return True


def with_yardsticks(case: Case, report: BenchmarkReport) -> Case:
    """Returns the case with its yardsticks as its rivals.

    They may come from the report's picture, which an update can replace.
    """
    return replace(
        case, rivals=case.rivals or {k: RivalSamples(v) for k, v in yardsticks(case, report).items()}
    )


def replaced(base: BenchmarkReport, new: BenchmarkReport, why: str) -> BenchmarkReport:
    """Returns `new` as the baseline, with the reasons of this replacement and of all earlier ones."""
    loosening = Loosening(datetime.now(UTC).isoformat(timespec="seconds"), why)
    return replace(new, loosened=(*base.loosened, loosening))
