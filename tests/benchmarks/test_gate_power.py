"""The gate on real samples: 20 fresh processes of the demo model, each in turn with diffusers.

processes.json beside this file is what benchmarks/pages/record_processes.py wrote on a busy machine.
Their ratios to diffusers have a standard deviation of 7 %, their own times one of 26 %. Each draw takes ten
processes as a baseline and the ten others as the new report: as many as `compare` runs by itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lcm_compile.benchmarks.gate.compare import DEFAULT_LIMITS, compare_reports
from lcm_compile.benchmarks.gate.run_again import PROCESSES
from lcm_compile.benchmarks.measure.report import BenchmarkReport, RivalSamples, read_report

DRAWS = 50


@pytest.fixture(scope="module")
def recorded():
    return read_report(Path(__file__).with_name("processes.json"))


def some(report: BenchmarkReport, which, slower: float = 1.0, rival: bool = True) -> BenchmarkReport:
    """The samples of these processes alone, ours `slower` times as long."""
    (case,) = report.cases
    cuts = np.cumsum(case.groups)[:-1]

    def of(samples):
        parts = np.split(np.asarray(samples), cuts)
        return np.concatenate([parts[i] for i in which])

    rivals = {name: RivalSamples(tuple(of(r.samples_ms).tolist())) for name, r in case.rivals.items()}
    ours = tuple((slower * of(case.samples_ms)).tolist())
    groups = tuple(case.groups[i] for i in which)
    select = replace(case, samples_ms=ours, rivals=rivals if rival else {}, groups=groups)
    return replace(report, cases=(select,))


def failures(recorded, slower, rival=True):
    """How many of 50 draws fail."""
    rng = np.random.default_rng(2026)
    failed = 0
    for _ in range(DRAWS):
        order = rng.permutation(len(recorded.cases[0].groups))
        base = some(recorded, order[:PROCESSES], rival=rival)
        new = some(recorded, order[PROCESSES : 2 * PROCESSES], slower, rival)
        failed += bool(compare_reports(base, new, DEFAULT_LIMITS).failures)
    return failed


def test_the_samples_are_of_twenty_processes(recorded):
    assert len(recorded.cases[0].groups) == 20
    assert min(recorded.cases[0].groups) >= 20


@pytest.mark.parametrize("rival", [True, False], ids=["paired", "absolute"])
def test_the_same_program_fails_in_at_most_one_of_fifty(recorded, rival):
    assert failures(recorded, 1.0, rival) <= 1


def test_a_slowdown_of_15_percent_is_caught_in_at_least_45_of_fifty(recorded):
    assert failures(recorded, 1.15) >= 45


def test_a_speedup_never_fails(recorded):
    assert failures(recorded, 1 / 1.15) == 0
