"""Engines compute with as many threads as their rivals, in the processes that are measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factories import build_from

from lcm_compile.benchmarks.measure.worker import Drawn, Maker, Worker
from lcm_compile.system.processor import physical_cores, threads

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(scope="module", params=BACKENDS)
def bundle(request, tmp_path_factory):
    if request.param == "onnxruntime":
        return request.getfixturevalue("sdxl_bundle")
    pytest.importorskip("openvino")
    out = tmp_path_factory.mktemp(request.param) / "bundle"
    return build_from(request.getfixturevalue("sdxl_graphs"), "cpu", request.param, out)[1].folder


def threads_of(folder):
    """What the libraries themselves say, engine by engine."""
    from lcm_compile.pipeline.load import load

    told = set()
    with load(folder) as pipeline:
        for runner in pipeline.runners.values():
            if hasattr(runner, "_session"):
                told.add(runner._session.get_session_options().intra_op_num_threads)
            else:
                told.add(runner._model.get_property("INFERENCE_NUM_THREADS"))
    [number] = told
    return number


def tell_threads(folder):
    number = threads_of(folder)
    return lambda prompt, seed: Drawn(np.zeros((1, 1, 1, 3), np.uint8), {"threads": number})


@pytest.fixture
def every_core():
    """A test may run on one core alone, beside others."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield
    os.sched_setaffinity(0, allowed)


@pytest.mark.usefixtures("every_core")
def test_a_measured_process_computes_with_the_rivals_threads(bundle):
    with Worker("ours", Maker(tell_threads, (bundle,)), 1) as worker:
        assert worker.draw("a star", 1).drawn.stages["threads"] == 1


@pytest.mark.usefixtures("every_core")
def test_by_itself_a_process_computes_with_the_cores_that_it_may_run_on(bundle):
    one = min(os.sched_getaffinity(0))
    script = f"""
import os, sys
os.sched_setaffinity(0, [{one}])
sys.path[:0] = {[str(folder) for folder in list(Path(__file__).parents)[:2]]!r}
from test_threads import threads_of
print(threads_of({str(bundle)!r}))
"""
    alone = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=alone)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.parametrize(("asked", "given"), [("3", 3), ("4,2", 4), (" 2 ", 2), ("0", None), ("many", None)])
def test_omp_num_threads_is_heeded_where_it_is_a_number(monkeypatch, asked, given):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads() == (given or physical_cores())
