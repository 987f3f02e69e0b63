"""A delay that is really planted in the runner is caught, in real runs.

Ten runs of ten fresh processes, each in turn with the same model on OpenVINO, as `bench` measures: minutes.
The delay comes from a sitecustomize.py of the test's own, which the measured processes import.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lcm_compile import BuildSpec, build
from lcm_compile.benchmarks.gate.compare import DEFAULT_LIMITS, compare_reports
from lcm_compile.benchmarks.gate.run_again import PROCESSES, joined
from lcm_compile.benchmarks.measure import timing
from lcm_compile.benchmarks.measure.report import Benchmark, BenchmarkReport, Case, Environment, RivalSamples
from lcm_compile.benchmarks.measure.rivals import draw_with_bundle
from lcm_compile.benchmarks.measure.worker import Maker, Worker

HERE = Environment("cpu", "cpu", 1, {}, "2026-11-01T00:00:00+00:00")
PROMPT = "a large red star on a striped pink background"
PLANT = """
import time
from lcm_compile.engines import onnxruntime
plain = onnxruntime.OnnxRuntimeRunner.__call__

def slow(self, inputs):
    time.sleep({seconds})
    return plain(self, inputs)

onnxruntime.OnnxRuntimeRunner.__call__ = slow
"""
CALLS = 7  # of the runner for one picture: encode, context, four steps, decode


@pytest.fixture(scope="module")
def bundles():
    spec = BuildSpec(base="demo", backend="onnxruntime")
    pytest.importorskip("openvino")
    return {"ours": build(spec).folder, "openvino": build(replace(spec, backend="openvino")).folder}


def measure(bundles, runs=15):
    """Ten pairs of fresh processes, `runs` pictures in turn in each."""
    reports = []
    for _ in range(PROCESSES):
        ours = Worker("ours", Maker(draw_with_bundle, (bundles["ours"],)), 1)
        with ours, Worker("rival", Maker(draw_with_bundle, (bundles["openvino"],)), 1) as rival:
            for worker in (ours, rival):
                timing.warm_up(worker, PROMPT)
            samples = timing.take_turns({"ours": ours, "rival": rival}, PROMPT, runs, 60.0)
        ms = {name: tuple(sample.ms for sample in taken) for name, taken in samples.items()}
        case = Case("picture", ms["ours"], {"openvino": RivalSamples(ms["rival"])})
        reports.append(BenchmarkReport(HERE, Benchmark(BuildSpec("demo"), (), runs, 60.0), (case,)))
    return joined(reports)


@pytest.mark.slow
@pytest.mark.alone
def test_a_delay_in_the_runner_is_caught_in_ten_of_ten_runs(bundles, tmp_path, monkeypatch):
    base = measure(bundles)
    assert not compare_reports(base, measure(bundles), DEFAULT_LIMITS).failures
    delay = 0.2 * float(np.median(base.cases[0].samples_ms)) / CALLS / 1000
    (tmp_path / "sitecustomize.py").write_text(PLANT.format(seconds=delay))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = [compare_reports(base, measure(bundles), DEFAULT_LIMITS).verdicts[0] for _ in range(10)]
    print(*found, sep="\n")
    assert [verdict.status for verdict in found] == ["worse"] * 10, found
