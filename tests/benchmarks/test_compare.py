"""The performance gate: what it fails on, what it does not, and what it says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from lcm_compile import BuildSpec, build
from lcm_compile.benchmarks.gate import run_again
from lcm_compile.benchmarks.gate.compare import DEFAULT_LIMITS, compare_reports
from lcm_compile.benchmarks.gate.statistics import change, spread, t_quantile
from lcm_compile.benchmarks.measure.report import (
    Benchmark,
    BenchmarkReport,
    Case,
    Environment,
    RivalSamples,
    read_report,
)
from lcm_compile.builder.plan import make_plan
from lcm_compile.errors import LcmCompileError

CPU = Environment("EPYC", "EPYC", 2, {"torch": "2.13.0"}, "2026-11-01T00:00:00+00:00")
OTHER_CPU = replace(CPU, device="Xeon", processor="Xeon")
GPU = replace(CPU, device="NVIDIA H200")


def case(
    seed=0, *, name="picture", scale=1.0, machine=1.0, processes=5, samples=20, rival="eager", **figures
):
    """Samples with what real ones have: noise within a process, more of it between processes, both sides
    slowed at once by the machine."""
    rng = np.random.default_rng(seed)
    shape = (processes, samples)
    together = machine * np.exp(0.2 * np.abs(rng.standard_normal(shape)))
    ours = 65 * scale * together * np.exp(0.02 * rng.standard_normal(shape))
    ours *= np.exp(0.01 * rng.standard_normal((processes, 1)))
    theirs = 210 * together * np.exp(0.02 * rng.standard_normal(shape))
    rivals = {rival: RivalSamples(tuple(theirs.ravel().tolist()))} if rival else {}
    figures = {"memory_bytes": 10**9, "engine_bytes": 10**8, "parity_db": 80.0, **figures}
    groups = (samples,) * processes if processes > 1 else ()
    return Case(name, tuple(ours.ravel().tolist()), rivals, groups=groups, **figures)


def report(*cases, environment=CPU):
    benchmark = Benchmark(BuildSpec(base="demo"), ("eager",), 100, 60.0)
    return BenchmarkReport(environment, benchmark, cases)


def statuses(base, new, limits=DEFAULT_LIMITS):
    found = compare_reports(base, new, limits)
    return {(v.case, v.metric): v.status for v in found.verdicts}


@pytest.fixture
def saved(tmp_path):
    def save(name, *cases, **options):
        path = tmp_path / name
        report(*cases, **options).save(path)
        return path

    return save


def test_the_same_again_passes(command, saved):
    code, out, err = command("compare", saved("base.json", case(1)), saved("new.json", case(2)))
    assert code == 0, out
    assert "none worse" in err
    assert max(map(len, out.splitlines())) <= 80


def test_a_slowdown_is_exit_3_and_told(command, saved, tmp_path):
    base, new = saved("base.json", case(1)), saved("new.json", case(2, scale=1.15))
    page, tests = tmp_path / "page.md", tmp_path / "tests.xml"
    code, out, err = command("compare", base, new, "--markdown", page, "--junit", tests)
    assert code == 3
    assert "picture median" in err and "limit 5 %" in err and "--loosen" in err
    assert "worse" in out and "eager" in out
    assert "**worse" in page.read_text()
    suite = ElementTree.parse(tests).getroot()
    failed = [test.get("name") for test in suite if test.find("failure") is not None]
    assert (suite.tag, suite.get("tests"), suite.get("failures"), failed) == (
        "testsuite",
        "4",
        "1",
        ["median"],
    )


def test_a_slower_machine_is_no_slower_program(command, saved):
    """Another processor, half as fast: the ratio to the rival is what it was."""
    base = saved("base.json", case(1))
    slow = saved("slow.json", case(2, machine=2.0), environment=OTHER_CPU)
    assert command("compare", base, slow)[0] == 0
    slower = saved("slower.json", case(2, machine=0.5, scale=1.15), environment=OTHER_CPU)
    assert command("compare", base, slower)[0] == 3


def test_what_no_rival_does_is_told_in_what_rivals_did_meanwhile(command, saved):
    """Nobody else has a context stage, or loads apart: those times too are ratios, on any processor."""
    context = {"name": "context", "rival": None}
    base = saved("base.json", case(1), case(1, **context))
    slow = saved("slow.json", case(2, machine=2.0), case(2, machine=2.0, **context), environment=OTHER_CPU)
    code, out, _ = command("compare", base, slow)
    assert code == 0 and "eager's picture in the same run" in out
    slower = case(2, machine=0.5, scale=1.15, **context)
    code, _, err = command(
        "compare", base, saved("new.json", case(2, machine=0.5), slower, environment=OTHER_CPU)
    )
    assert code == 3 and "context median" in err
    # Of a baseline whose pictures were tightened since, the context is still told in what it was told in.
    better = saved("better.json", case(4, scale=0.8), case(4, **context))
    assert command("compare", base, better, "--update")[0] == 0
    assert read_report(base).cases[0].samples_ms == case(4, scale=0.8).samples_ms
    again = case(2, machine=0.5, scale=0.8)
    code, _, err = command("compare", base, saved("new.json", again, slower, environment=OTHER_CPU))
    assert code == 3 and "context median" in err and "picture" not in err


def test_times_of_two_devices_are_refused_without_a_rival(refused, saved, command):
    base = saved("base.json", case(1, rival=None))
    refused(
        *(2, ["EPYC", "Xeon", "--against eager"]),
        *("compare", base, saved("new.json", case(2, rival=None), environment=OTHER_CPU)),
    )
    refused(2, "4 cores", "compare", base, saved("n.json", case(2), environment=replace(CPU, cores=4)))
    gpus = saved("gpu.json", case(1, rival=None), environment=GPU)
    refused(
        *(2, "NVIDIA L4", "compare", gpus),
        saved("other.json", case(1, rival=None), environment=replace(GPU, device="NVIDIA L4")),
    )
    assert command("compare", base, saved("same.json", case(2, rival="compile")))[0] == 0


def test_absolute_times_on_the_same_device():
    base = report(case(1, rival=None))
    assert statuses(base, report(case(2, rival=None)))[("picture", "median")] != "worse"
    slow = statuses(base, report(case(2, rival=None, scale=1.4)))
    assert slow[("picture", "median")] == "worse"


def test_a_cold_start_of_each_process_is_enough(command, saved):
    """A process starts once. Where there are several, their starts are held to the rival's."""
    starts = {"name": "cold start", "samples": 1, "processes": 10}
    base = saved("base.json", case(1, **starts))
    assert command("compare", base, saved("same.json", case(2, machine=2.0, **starts)))[0] == 0
    code, _, err = command("compare", base, saved("slow.json", case(2, scale=1.2, **starts)))
    assert code == 3 and "cold start median" in err


def test_a_rival_that_the_baseline_has_is_missed(command, saved):
    """Neither the times as they are nor another rival may stand in for it."""
    context = {"name": "context", "rival": None}
    base = saved("base.json", case(1), case(1, **context))
    for environment in (CPU, OTHER_CPU):
        alone = saved("alone.json", case(2, rival=None), case(2, **context), environment=environment)
        code, out, err = command("compare", base, alone)
        assert code == 3 and "missing" in out and "median" not in out
        assert "picture rival: missing" in err and "in turn with eager;" in err
        assert "context rival: missing" in err and "in turn with eager's picture" in err
    code, _, err = command("compare", base, saved("other.json", case(2, rival="compile"), case(2, **context)))
    assert code == 3 and "in turn with eager" in err
    eager, compiled = case(1), case(1, rival="compile")
    both = saved("both.json", replace(eager, rivals={**eager.rivals, **compiled.rivals}))
    code, _, err = command("compare", both, base)
    assert code == 3 and "in turn with compile" in err and "eager" not in err
    assert command("compare", base, both)[0] == 3  # of which the context is gone
    assert command("compare", saved("b.json", case(1)), both)[0] == 0


def test_new_processes_are_not_told_in_what_rivals_drew_when_warm(command, saved):
    """Three of each in a short benchmark are not of the same rounds; ten processes start ten times."""
    start = {"name": "load", "rival": None}
    short = {"processes": 1, "samples": 3}
    base = saved("base.json", case(1, rival="compile", **short), case(1, **short, **start))
    new = saved("new.json", case(2, rival="compile"), case(2, processes=10, samples=1, **start))
    code, out, err = command("compare", base, new)
    assert code == 0 and "missing" not in out, err


def test_times_that_the_baseline_tells_and_the_new_report_can_not_are_missing(command, saved):
    enough, few = saved("b.json", case(1)), saved("n.json", case(2, samples=9))
    assert command("compare", enough, few)[0] == 0  # for the median one would do
    code, out, err = command("compare", enough, few, "--fail-on", "p90:50%")
    assert code == 3 and "picture p90: missing: takes 10 samples from every process" in err and "has 9" in out
    code, out, _ = command("compare", few, enough, "--fail-on", "p90:50%")
    assert code == 0 and "~: takes 10 samples" in out
    two = saved("two.json", case(2, processes=1, samples=2))
    assert command("compare", enough, two)[0] == 3
    code, out, _ = command("compare", two, enough)
    assert code == 0 and "3 samples" in out


def test_what_noise_hides_is_told_as_unknown_and_passes(command, saved):
    """Three samples of one process say little."""
    base, new = case(3, processes=1, samples=3), case(4, processes=1, samples=3, scale=1.08)
    code, out, _ = command("compare", saved("b.json", base), saved("n.json", new))
    assert code == 0 and " ~" in out


def test_one_process_is_judged_with_room_for_the_next():
    """6 % between two processes is nothing; 6 % between five and five is a regression."""
    one = [report(case(seed, processes=1, samples=60, scale=s)) for seed, s in ((1, 1.0), (2, 1.06))]
    five = [report(case(seed, samples=60, scale=s)) for seed, s in ((1, 1.0), (2, 1.06))]
    assert statuses(*one)[("picture", "median")] == "~"
    assert statuses(*five)[("picture", "median")] == "worse"
    assert any("one process" in note for note in compare_reports(*one, DEFAULT_LIMITS).notes)


def test_improvement_is_told(command, saved):
    code, out, _ = command("compare", saved("b.json", case(1)), saved("n.json", case(2, scale=0.85)))
    assert code == 0 and "better" in out


@pytest.mark.parametrize(
    ("metric", "base", "fine", "worse"),
    [
        ("memory", {"memory_bytes": 1000}, {"memory_bytes": 1090}, {"memory_bytes": 1110}),
        ("engine-size", {"engine_bytes": 1000}, {"engine_bytes": 1040}, {"engine_bytes": 1060}),
        ("parity", {"parity_db": 48.0}, {"parity_db": 47.5}, {"parity_db": 46.5}),
        ("parity", {"parity_db": 84.0}, {"parity_db": 71.0}, {"parity_db": 58.5}),
    ],
)
def test_sizes_and_parity_are_gated(metric, base, fine, worse):
    before = report(case(1, **base))
    assert statuses(before, report(case(1, **fine)))[("picture", metric)] == "ok"
    assert statuses(before, report(case(1, **worse)))[("picture", metric)] == "worse"
    gone = dict.fromkeys(base)
    assert statuses(before, report(case(1, **gone)))[("picture", metric)] == "missing"
    assert statuses(report(case(1, **gone)), before)[("picture", metric)] == "~"


def test_engines_of_another_gpu_have_other_sizes():
    small, large = case(1, engine_bytes=1000), case(1, engine_bytes=2000)
    other = replace(GPU, device="NVIDIA L4")
    assert statuses(report(small, environment=GPU), report(large))[("picture", "engine-size")] == "~"
    moved = statuses(report(small, environment=GPU), report(large, environment=other))
    assert moved[("picture", "engine-size")] == "~"
    assert (
        statuses(report(small), report(large, environment=OTHER_CPU))[("picture", "engine-size")] == "worse"
    )


def test_a_case_that_was_measured_elsewhere_is_judged_as_there():
    """An updated baseline keeps the machine of each case, and may be given as NEW too."""
    new = report(replace(case(2, rival=None), environment=OTHER_CPU))
    with pytest.raises(LcmCompileError, match="two machines"):
        statuses(report(case(2, rival=None)), new)
    there = report(case(1, rival=None), environment=OTHER_CPU)
    assert statuses(there, new)[("picture", "median")] != "worse"


def test_a_missing_case_fails_and_a_new_one_does_not(command, saved):
    both = case(1), case(1, name="load")
    code, out, err = command("compare", saved("b.json", *both), saved("n.json", case(2)))
    assert code == 3 and "missing" in out and "load" in err
    code, out, _ = command("compare", saved("b.json", case(1)), saved("n.json", *both))
    assert code == 0 and "new" in out


def test_limits(command, saved, refused):
    base, new = saved("b.json", case(1)), saved("n.json", case(2, scale=1.15, parity_db=57.0))
    assert command("compare", base, new, "--fail-on", "median:30%", "--fail-on", "parity:4dB")[0] == 0
    assert command("compare", base, new, "--fail-on", "median:30%")[0] == 3
    slow = saved("s.json", case(2, scale=2.0))
    data = json.loads(command("compare", base, slow, "--fail-on", "p90:5%", "--json")[1])
    p90 = next(v for v in data["verdicts"] if v["metric"] == "p90")
    assert (data["passed"], p90["status"]) == (False, "worse")
    assert p90["change"] == pytest.approx(1.0, abs=0.3) and p90["low"] < p90["change"] < p90["high"]
    data = json.loads(command("compare", base, new, "--fail-on", "p99:5%", "--json")[1])
    p99 = next(v for v in data["verdicts"] if v["metric"] == "p99")
    assert p99["status"] == "~" and "100 samples" in p99["why"]
    for words, told in (
        ("speed:5%", "median"),
        ("median:fast", "fast"),
        ("median", "median:5%"),
        ("median:-5%", "-5%"),
        ("parity:5%", "dB"),
        ("memory:1dB", "%"),
    ):
        refused(2, told, "compare", base, new, "--fail-on", words)


def change_case(path, **changes):
    data = json.loads(path.read_text())
    data["cases"][0].update(changes)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples_ms": []}, "samples"),
        ({"samples_ms": [1.0, 0.0], "rivals": {}, "groups": []}, "above zero"),
        ({"samples_ms": ["fast"]}, "samples_ms.0"),
        ({"rivals": {"eager": {"samples_ms": [1.0]}}}, "pair"),
        ({"groups": [3]}, "add up"),
        ({"speed": 3}, "speed"),
    ],
)
def test_bad_files_are_refused(refused, saved, changes, told):
    good, bad = saved("good.json", case(1)), change_case(saved("bad.json", case(1)), **changes)
    refused(2, [told, "bad.json"], "compare", good, bad)


def test_other_files_are_refused(refused, saved, tmp_path):
    good, other = saved("good.json", case(1)), tmp_path / "other.json"
    refused(2, "other.json", "compare", other, good)
    for text in ("{", "[]", "{}", '{"schema": 2}'):
        other.write_text(text)
        refused(2, "other.json", "compare", good, other)
    data = json.loads(good.read_text())
    other.write_text(json.dumps({**data, "cases": data["cases"] * 2}))
    refused(2, "one name", "compare", other, good)
    refused(2, "--update", "compare", good, good, "--loosen", "because")
    refused(2, "reason", "compare", good, good, "--update", "--loosen", " ")


def test_update_only_tightens(command, saved):
    base = saved("b.json", case(1, memory_bytes=1000), case(1, name="load"))
    before = read_report(base)

    same = saved("same.json", case(2, memory_bytes=1050), case(2, name="load"))
    assert command("compare", base, same, "--update")[0] == 0
    assert read_report(base) == before

    bad = saved("bad.json", case(2, scale=0.8), case(2, name="load", scale=1.3))
    assert command("compare", base, bad, "--update")[0] == 3
    assert read_report(base) == before

    good = saved(
        *("good.json", case(2, scale=0.8, memory_bytes=1050), case(2, name="load"), case(3, name="extra")),
        environment=OTHER_CPU,
    )
    assert command("compare", base, good, "--update")[0] == 0
    after = {c.name: c for c in read_report(base).cases}
    assert after["picture"].samples_ms == read_report(good).cases[0].samples_ms
    assert after["picture"].memory_bytes == 1000
    assert after["picture"].environment == OTHER_CPU
    assert after["load"] == before.cases[1]
    assert after["extra"].samples_ms == read_report(good).cases[2].samples_ms
    assert command("compare", base, good)[0] == 0
    assert command("compare", base, saved("old.json", *before.cases, case(4, name="extra")))[0] == 3


def slow_tail(case):
    """The same, but that every fifth sample takes three times as long."""
    return replace(
        case, samples_ms=tuple(3 * ms if i % 5 == 0 else ms for i, ms in enumerate(case.samples_ms))
    )


def test_update_takes_no_median_whose_tail_became_worse(command, saved):
    """Whether or not the tail has a limit; nor samples too few to tell what the baseline's tell."""
    base = saved("b.json", case(1, engine_bytes=1000))
    before = read_report(base)
    faster = {"scale": 0.8, "engine_bytes": 800}
    for new in (slow_tail(case(2, **faster)), case(2, samples=9, **faster)):
        code, out, _ = command("compare", base, saved("n.json", new), "--update")
        assert code == 0 and "better" in out
        after = read_report(base).cases[0]
        assert after.samples_ms == before.cases[0].samples_ms and after.rivals == before.cases[0].rivals
    assert after.engine_bytes == 800  # which has nothing to do with it
    fine = case(2, **faster)
    assert command("compare", base, saved("n.json", fine), "--update")[0] == 0
    assert read_report(base).cases[0].samples_ms == fine.samples_ms


def test_loosen_replaces_and_notes_why(command, saved):
    base, worse = saved("b.json", case(1)), saved("w.json", case(2, scale=1.5))
    assert command("compare", base, worse)[0] == 3
    assert command("compare", base, worse, "--update", "--loosen", "a safer VAE")[0] == 0
    assert command("compare", base, worse)[0] == 0
    assert (
        command("compare", base, saved("w2.json", case(3, scale=2.0)), "--update", "--loosen", "more")[0] == 0
    )
    data = json.loads(base.read_text())
    assert [noted["why"] for noted in data["loosened"]] == ["a safer VAE", "more"]


def test_versions_that_differ_are_told(command, saved):
    newer = saved("n.json", case(2), environment=replace(CPU, versions={"torch": "2.14.0"}))
    _, _, err = command("compare", saved("b.json", case(1)), newer)
    assert "torch 2.13.0 → 2.14.0" in err


def test_names_of_any_letters(command, saved, tmp_path):
    name = "a|b <&> \x1b[31m"
    files = saved("b.json", case(1, name=name)), saved("n.json", case(2, name=name, scale=1.3))
    page, tests = tmp_path / "p.md", tmp_path / "t.xml"
    code, out, _ = command("compare", *files, "--markdown", page, "--junit", tests)
    assert code == 3 and "\x1b" not in out
    assert "a\\|b" in page.read_text()
    assert ElementTree.parse(tests).getroot()[0].get("classname").startswith("a|b <&>")


def test_without_new_the_baselines_benchmark_runs_in_several_processes(
    command, sdxl_bundle, sdxl_checkpoint, tmp_path, monkeypatch
):
    """For real, against another bundle: what each process gave becomes a group, and nothing has changed."""
    monkeypatch.setattr(run_again, "PROCESSES", 2)
    plain = BuildSpec(
        str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="onnxruntime", without=("qkv",)
    )
    other = build(plain, tmp_path / "other")
    base = tmp_path / "base.json"
    words = ("bench", sdxl_bundle, "--against", other.folder, "--runs", 1, "--save", base)
    assert command(*words, "--quiet")[0] == 0
    code, out, err = command("compare", base, "--fail-on", "median:400%", "--fail-on", "memory:50%", "--json")
    assert code == 0, err
    assert "process 2 of 2" in err
    picture = json.loads(out)["new"]["cases"][0]
    assert picture["groups"] == [3, 3] and len(picture["samples_ms"]) == 6
    assert len(picture["rivals"][str(other.folder)]["samples_ms"]) == 6


@pytest.fixture
def measured_on(sdxl_checkpoint, tmp_path):
    """A baseline that says on what it was measured, whose spec left that to `auto`."""

    def save(backend, step, **asked):
        spec = BuildSpec(str(sdxl_checkpoint), no_lcm=True, few_step="lcm", **asked)
        precisions = {"encode": "fp32", "context": "fp32", "step": step, "decode": "fp32"}
        benchmark = Benchmark(spec, (), 3, 0.0, backend=backend, precisions=precisions)
        path = tmp_path / "base.json"
        BenchmarkReport(CPU, benchmark, (case(1),)).save(path)
        return path

    return save


def test_a_baseline_is_run_again_on_its_own_backend(measured_on):
    """And not on what `auto` takes here."""
    benchmark = read_report(measured_on("torchscript", "fp32")).benchmark
    if make_plan(benchmark.spec).backend_name == "torchscript":
        benchmark = replace(benchmark, backend="onnxruntime")
    assert run_again.build_again(benchmark).manifest.backend == benchmark.backend


def test_what_a_baseline_was_measured_on_and_is_not_here_is_told(refused, measured_on, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    told = ["baseline", "openvino is not installed", "bench --save"]
    refused(1, told, "compare", measured_on("openvino", "fp32"))
    # int8 is beside fp32 or bf16, as the processor has it.
    refused(
        1,
        ["baseline", "int8+fp16", "bench --save"],
        "compare",
        measured_on("onnxruntime", "int8+fp16", precision="int8"),
    )


def test_engines_that_differ_are_told(measured_on, command):
    base = measured_on("openvino", "fp32")
    new = base.with_name("new.json")
    new.write_text(base.read_text())
    assert "engines differ" not in command("compare", base, new)[2]
    measured_on("onnxruntime", "int8+fp32")
    assert "openvino fp32 → onnxruntime fp32 int8+fp32" in command("compare", new, base)[2]


def test_t_is_students():
    """Values of any table of Student's distribution."""
    for p, freedom, value in ((0.975, 1, 12.706), (0.99, 8, 2.896), (0.995, 4, 4.604), (0.9995, 30, 3.646)):
        assert t_quantile(p, freedom) == pytest.approx(value, abs=1e-3)


def test_intervals_hold_what_they_promise():
    """Of 95 % intervals of five processes with a known change of nothing, 2.5 % miss on either side."""
    rng = np.random.default_rng(5)

    def side():
        processes = 0.03 * rng.standard_normal((5, 1)) + 0.05 * rng.standard_normal((5, 15))
        return spread(list(processes), 0.5)

    found = [change(side(), side(), 0.025) for _ in range(200)]
    assert sum(not c.low <= 0 <= c.high for c in found) <= 16  # more has a chance under 3 % at 5 % misses
    assert np.mean([c.high - c.low for c in found]) < 0.15
