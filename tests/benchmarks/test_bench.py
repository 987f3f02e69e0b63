"""`bench` against diffusers itself: the same pictures, in turn, the work counted, the files read back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import factories
import numpy as np
import pytest

from lcm_compile import BuildSpec, LoraSpec, build
from lcm_compile.benchmarks.measure import timing
from lcm_compile.benchmarks.measure.bench import counted, take_cold, warnings
from lcm_compile.benchmarks.measure.chart import draw_report
from lcm_compile.benchmarks.measure.peaks import Peak, measure
from lcm_compile.benchmarks.measure.pictures import parities
from lcm_compile.benchmarks.measure.report import Benchmark, BenchmarkReport, Case, Environment, read_report
from lcm_compile.benchmarks.measure.rivals import SELF, draw_with_bundle
from lcm_compile.benchmarks.measure.summary import budget, print_report, summarise
from lcm_compile.benchmarks.measure.work import Work, count_work
from lcm_compile.benchmarks.measure.worker import Drawn, Maker, Sample, Worker
from lcm_compile.benchmarks.pages import readme_table
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.checkpoint.checkpoint import Checkpoint, Component
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.engines.onnxruntime import OnnxRuntimeRunner
from lcm_compile.errors import BundleError, LcmCompileError, UsageError
from lcm_compile.precisions import Precision
from lcm_compile.spec import Shape
from lcm_compile.system.processor import instruction_set

DELAY = 0.5  # seconds
# For a sitecustomize.py: processes import it before they load.
SLOW_TO_LOAD = """
import time
from lcm_compile.engines import onnxruntime
plain = onnxruntime.load

def slow(path, contract, target, precision):
    if contract.name == "decode":
        time.sleep({seconds})
    return plain(path, contract, target, precision)

onnxruntime.load = slow
"""


def draw_slowly(folder):
    draw = draw_with_bundle(folder)

    def slowed(prompt, seed):
        time.sleep(DELAY)
        return draw(prompt, seed)

    return slowed


def stands_still(worker):
    """Whether the process gets stopped: then none of its threads can spin."""
    for _ in range(100):
        if Path(f"/proc/{worker._process.pid}/stat").read_text().split()[2] == "T":
            return True
        time.sleep(0.1)
    return False


class Unpacked:
    """As an engine that unpacks itself into a file, which it removes at its end, after some seconds."""

    def __init__(self, path, seconds):
        self.path, self.seconds = path, seconds
        path.touch()

    def __del__(self):
        time.sleep(self.seconds)
        self.path.unlink()


def give_up():
    raise UsageError("not today", "tomorrow")


@pytest.fixture(scope="module")
def fused_bundle(sdxl_checkpoint, tmp_path_factory):
    """The folder of an SDXL bundle with an LCM-LoRA that changes the picture."""
    from diffusers import DiffusionPipeline

    folder = tmp_path_factory.mktemp("fused")
    pipe = DiffusionPipeline.from_pretrained(sdxl_checkpoint)
    lora = factories.write_lora(pipe, folder / "lcm.safetensors", "kohya", seed=1)
    spec = BuildSpec(base=str(sdxl_checkpoint), lcm_lora=LoraSpec(str(lora)), backend="onnxruntime")
    return build(spec, folder / "bundle").folder


@pytest.fixture(scope="module")
def measured(fused_bundle, tmp_path_factory):
    """The command's own run against diffusers: stdout as JSON, the report, and the plot's path."""
    folder = tmp_path_factory.mktemp("measured")
    save, plot = folder / "report.json", folder / "chart.png"
    options = ("--against", "eager", "--runs", "2", "--save", save, "--plot", plot, "--json")
    done = subprocess.run(
        [sys.executable, "-m", "lcm_compile", "bench", fused_bundle, *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), read_report(save), plot


def test_every_stage_and_the_whole_are_measured_in_pairs(measured, fused_bundle):
    told, report, _ = measured
    cases = {case.name: case for case in report.cases}
    stages = [stage.contract.name for stage in open_bundle(fused_bundle).manifest.stages]
    assert list(cases) == ["picture", *stages, "cold start", "load", "first picture"]
    assert all(len(case.samples_ms) == 2 and min(case.samples_ms) > 0 for case in report.cases)
    assert all(
        len(rival.samples_ms) == len(case.samples_ms)
        for case in report.cases
        for rival in case.rivals.values()
    )
    for name in ("picture", "cold start", "load", "first picture"):
        assert set(cases[name].rivals) == {"eager"}
    assert {"encode", "step", "decode"} <= {name for name in stages if cases[name].rivals}
    of_stages = sum(np.array(cases[name].samples_ms) for name in stages)
    assert (of_stages <= np.array(cases["picture"].samples_ms)).all()
    assert min(cases["cold start"].samples_ms) > max(cases["load"].samples_ms)
    assert told["summary"]["cases"]["picture"]["median"] == median(cases["picture"].samples_ms)


def test_ours_is_the_picture_that_diffusers_draws_with_the_lora_fused(measured):
    _, report, _ = measured
    assert report.cases[0].parity_db > 60


def test_the_report_says_where_it_was_taken(measured, fused_bundle):
    _, report, _ = measured
    environment, asked = report.environment, report.benchmark
    manifest = open_bundle(fused_bundle).manifest
    assert asked.spec == manifest.spec and asked.against == ("eager",) and asked.runs == 2
    assert environment.threads and environment.device and {"python", "torch"} <= set(environment.versions)
    assert environment.peak_flops["fp32"] > 1e9 and environment.bandwidth > 1e8
    picture = report.cases[0]
    files = {stage.file for stage in manifest.stages}
    assert picture.engine_bytes == sum((fused_bundle / name).stat().st_size for name in files)
    assert 50e6 < picture.memory_bytes < picture.rivals["eager"].memory_bytes


def test_the_budget_names_the_stage_furthest_above_its_limit(measured):
    _, report, _ = measured

    def with_times(**ms):
        cases = [
            replace(case, samples_ms=(ms[case.name],) * 2, limit_ms=10.0) if case.name in ms else case
            for case in report.cases
        ]
        return replace(report, cases=tuple(cases))

    line = budget(with_times(picture=100.0, encode=11.0, step=40.0, decode=45.0))
    assert line.startswith("decode takes 45%") and "at 22%" in line and "35.0 ms of 100 ms" in line
    assert budget(with_times(picture=100.0, encode=11.0, step=70.0, decode=15.0)).startswith("step takes 70%")


def test_a_stage_that_beats_its_limit_is_told(measured):
    _, report, _ = measured
    picture, stage = report.cases[:2]
    slow, fast = (replace(stage, samples_ms=(ms, ms), limit_ms=10.0) for ms in (11.0, 9.0))
    assert not any("took less" in note for note in warnings([picture, slow], {"step": Precision.FP32}, {}))
    assert any(
        f"{stage.name} took less" in note for note in warnings([picture, fast], {"step": Precision.FP32}, {})
    )


def test_the_plot_shows_ours_by_its_parity_and_diffusers_by_its_time(measured):
    _, report, plot = measured
    assert plot.read_bytes().startswith(b"\x89PNG")
    picture, quality = report.cases[0], draw_report(report).axes[1]
    [points] = quality.collections
    assert points.get_offsets().tolist() == [[median(picture.samples_ms), picture.parity_db]]
    [line] = quality.lines
    assert set(line.get_xdata()) == {median(picture.rivals["eager"].samples_ms)}


def test_the_tables_fit_in_80_columns(measured, capsys):
    _, report, _ = measured
    print_report(report)
    out, err = capsys.readouterr()
    body = [line for line in out.splitlines() if str(report.benchmark.spec.base) not in line]
    assert max(map(len, body)) <= 80
    ratio = summarise(report)["cases"]["picture"]["rivals"]["eager"]["ratio"]
    assert f"{ratio:.2f}×" in out and "against eager" in out
    assert all(f"warning: {note}" in err for note in report.notes)


def test_the_readme_is_filled_between_its_markers(measured, tmp_path):
    _, report, _ = measured
    report.save(tmp_path / "results" / "bench-here.json")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench: start -->\nold\n<!-- bench: end -->\nafter\n")
    arguments = ["--results", str(tmp_path / "results"), "--readme", str(readme)]
    for _ in range(2):
        readme_table.main(arguments, standalone_mode=False)
    text = readme.read_text()
    ratio = summarise(report)["cases"]["picture"]["rivals"]["eager"]["ratio"]
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count(f"{ratio:.2f} ×") == 1 and "eager takes" in text


def test_turns_are_taken_one_at_a_time_in_swapping_order_and_a_slow_rival_is_told_slower(fused_bundle):
    makers = {SELF: Maker(draw_with_bundle, (fused_bundle,)), "slow": Maker(draw_slowly, (fused_bundle,))}
    with Worker(SELF, makers[SELF], 1) as ours, Worker("slow", makers["slow"], 1) as slow:
        workers = {SELF: ours, "slow": slow}
        samples = timing.take_turns(workers, "a star", runs=4, seconds=60)
        assert all(stands_still(worker) for worker in workers.values())
    taken = sorted((s.start, s.end, name) for name, taken in samples.items() for s in taken)
    assert [name for *_, name in taken] == [SELF, "slow", "slow", SELF] * 2
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(taken))
    for one, other in zip(samples[SELF], samples["slow"], strict=True):
        assert np.array_equal(one.drawn.pictures, other.drawn.pictures)
        assert other.ms > DELAY * 1000
    pictures = [s.drawn.pictures for s in samples[SELF]]
    assert not any(np.array_equal(a, b) for a, b in pairwise(pictures))
    assert median(timing.ratios(*([s.ms for s in samples[n]] for n in (SELF, "slow")))) > 1.2


def test_a_prompt_that_comes_again_is_encoded_again(fused_bundle, monkeypatch):
    """What is remembered would be no like for like: diffusers encodes each time."""
    plain, called = OnnxRuntimeRunner.__call__, []

    def counted(self, inputs):
        called.append(self.contract.name)
        return plain(self, inputs)

    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", counted)
    draw = draw_with_bundle(fused_bundle)
    for seed in range(3):
        draw("a star", seed)
    assert (called.count("encode"), called.count("context")) == (3, 3)


def test_loading_is_all_of_it_and_no_part_of_the_first_picture(fused_bundle, tmp_path, monkeypatch):
    """The last engine takes two seconds to load, which `run` spends drawing: those are the load's alone."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_TO_LOAD.format(seconds=2))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ours = {SELF: Maker(draw_with_bundle, (fused_bundle,))}
    (cold,) = take_cold(ours, "a star", 1, 1, lambda *_: None)[SELF]
    assert cold.first_ms < 2000 < min(cold.load_ms, cold.ms)


def test_a_bundle_is_a_rival(command, fused_bundle, tmp_path):
    twin = shutil.copytree(fused_bundle, tmp_path / "twin")
    code, out, _ = command("bench", fused_bundle, "--against", twin, "--runs", 1, "--json", "--quiet")
    data = json.loads(out)
    assert code == 0
    cases = {case["name"]: case for case in data["cases"]}
    assert set(cases["load"]["rivals"]) == set(cases["picture"]["rivals"]) == {str(twin)}
    # Without diffusers' picture, parity is what was recorded when it was built.
    recorded = open_bundle(fused_bundle).manifest.parity["picture"].db
    assert cases["picture"]["parity_db"] == round(recorded, 2)


@pytest.mark.slow
def test_a_bundle_of_another_batch_is_compared_by_the_picture(command, sdxl_checkpoint, tmp_path):
    one, two = (
        build(
            BuildSpec(
                base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="torchscript", batch=batch
            ),
            path,
        )
        for batch, path in ((1, tmp_path / "one"), (2, tmp_path / "two"))
    )
    save = tmp_path / "report.json"
    code, out, _ = command(
        "bench", one.folder, "--against", two.folder, "--runs", 1, "--save", save, "--quiet"
    )
    report, name = read_report(save), str(two.folder)
    told, picture = summarise(report), report.cases[0]
    assert code == 0 and {case.name for case in report.cases if name in case.rivals} >= {"step", "decode"}
    ours, theirs = (np.array(side.samples_ms) for side in (picture, picture.rivals[name]))
    ratio = median(theirs / 2 / ours)
    assert told["cases"]["picture"]["rivals"][name]["ratio"] == pytest.approx(ratio)
    rates = [1000 / median(ours), 2000 / median(theirs)]
    assert told["pictures_a_second"] == pytest.approx(rates[0]) and told["batch"] == 1
    assert told["rivals"][name] == {"pictures_a_second": pytest.approx(rates[1]), "batch": 2}
    assert f"{ratio:.2f}×" in out and all(f"{rate:.2f}, by {n}" in out for n, rate in enumerate(rates, 1))
    assert readme_table.table([report]).count(f"{ratio:.2f} ×") == 1
    # A process is started once, whatever it draws.
    cold, of_two = report.cases[-3], report.cases[-3].rivals[name]
    assert cold.name == "cold start" and of_two.batch is None
    starts = median(np.array(of_two.samples_ms) / np.array(cold.samples_ms))
    assert told["cases"]["cold start"]["rivals"][name]["ratio"] == pytest.approx(starts)
    recorded = [round(bundle.manifest.parity["picture"].db, 2) for bundle in (one, two)]
    assert [picture.parity_db, picture.rivals[name].parity_db] == recorded


def test_pictures_of_another_batch_are_not_compared_with_those_of_diffusers():
    def sample(pictures):
        return Sample(0.0, 1.0, Drawn(pictures, {}))

    black = np.zeros((1, 8, 8, 3), np.uint8)
    samples = {SELF: black + np.uint8(255), "eager": black, "./by-2": np.concatenate([black, black])}
    assert parities({name: [sample(pictures)] for name, pictures in samples.items()}) == {SELF: 0.0}


def test_measuring_ends_after_its_seconds_but_not_before_three_rounds(fused_bundle):
    with Worker(SELF, Maker(draw_with_bundle, (fused_bundle,)), 1) as worker:
        assert len(timing.take_turns({SELF: worker}, "a star", 100, 0.0)[SELF]) == 3
        assert len(timing.take_turns({SELF: worker}, "a star", 2, 60.0)[SELF]) == 2


def test_what_fails_in_a_worker_is_raised_here():
    with pytest.raises(UsageError, match="not today"):
        Worker("none", Maker(give_up), 1)
    with pytest.raises(BundleError, match="no bundle at"):
        Worker("none", Maker(draw_with_bundle, (Path("/nowhere"),)), 1)


def test_a_process_ends_by_itself_or_is_ended(tmp_path, monkeypatch):
    """AOTInductor unpacks gigabytes, which only its own end removes."""
    with Worker("quick", Maker(Unpacked, (tmp_path / "quick", 0)), 1):
        assert (tmp_path / "quick").exists()
    assert not (tmp_path / "quick").exists()
    monkeypatch.setattr("lcm_compile.benchmarks.measure.worker.ENDING", 0.2)
    with Worker("slow", Maker(Unpacked, (tmp_path / "slow", 600)), 1):
        start = time.monotonic()
    assert time.monotonic() - start < 10 and (tmp_path / "slow").exists()


def test_a_worker_that_dies_is_told(fused_bundle):
    with Worker("ours", Maker(draw_with_bundle, (fused_bundle,)), 1) as worker:
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(LcmCompileError, match="measures ours ended"):
            worker._ask(("a star", 1))


@pytest.mark.parametrize(
    ("family", "side", "unet", "decoder", "text"),
    [("sd15", 512, 0.80, 2.52, 0.013), ("sdxl", 1024, 6.76, 10.47, 0.111)],
)
def test_the_counted_work_is_the_published_one(family, side, unet, decoder, text):
    """Against the figures of the architectures, in TFLOP, counted apart from this project."""
    components = {name: Component(name, config) for name, config in FAMILIES[family].models.items()}
    checkpoint = Checkpoint(family, Path("none"), FAMILIES[family], components, {}, False)
    work = count_work(checkpoint, Shape(1, side, side))
    assert work["step"].flop / 1e12 == pytest.approx(unet, abs=0.005)
    assert work["decode"].flop / 1e12 == pytest.approx(decoder, rel=0.003)
    assert work["encode"].flop / 1e12 == pytest.approx(text, rel=0.05)
    assert work["step"].weights / 1e6 == pytest.approx({"sd15": 859.5, "sdxl": 2567.5}[family], abs=0.05)
    assert work["decode"].weights / 1e6 == pytest.approx(49.5, abs=0.05)


def test_work_grows_with_the_batch(sdxl_checkpoint):
    from lcm_compile.checkpoint.find import open_checkpoint

    one, four = (count_work(open_checkpoint(str(sdxl_checkpoint)), Shape(b, 64, 64)) for b in (1, 4))
    for stage in one:
        assert four[stage].flop == pytest.approx(4 * one[stage].flop, rel=0.01)
        assert four[stage].weights == one[stage].weights


def known(samples, batch=1):
    """A report of a picture that takes so many milliseconds."""
    here = Environment("EPYC", "EPYC", 2, {}, "2026-11-01T00:00:00+00:00")
    asked = Benchmark(BuildSpec("demo"), (), 100, 60.0, shape=Shape(batch, 64, 64))
    step = Case("step", samples, limit_ms=20.2, passes=4)
    return BenchmarkReport(here, asked, (Case("picture", samples), step))


def test_the_figures_of_known_samples_are_the_known_ones(capsys):
    """Of 1, 2, … 100 ms: linear between the samples, 0.1 of 90 to 91 and 0.01 of 99 to 100."""
    report = known(tuple(map(float, range(100, 0, -1))), batch=4)
    told = summarise(report)
    assert told["pictures_a_second"] == pytest.approx(4 * 1000 / 50.5)
    step = told["cases"]["step"]
    assert [step[name] for name in ("median", "p90", "p99", "share")] == pytest.approx(
        [50.5, 90.1, 99.01, 0.4]
    )
    print_report(report)
    out = capsys.readouterr().out
    assert re.search(r"step × 4 +50\.5 ms +90\.1 ms +99\.0 ms +40%\n", out)
    assert re.search(r"pictures a second +79\.21, by 4\n", out)


@pytest.mark.parametrize(
    ("count", "p90", "p99"), [(9, None, None), (10, 1.0, None), (99, 1.0, None), (100, 1.0, 1.0)]
)
def test_a_tail_that_samples_are_too_few_for_is_left_empty(capsys, count, p90, p99):
    report = known((1.0,) * count)
    step = json.loads(json.dumps(summarise(report)))["cases"]["step"]
    assert (step["p90"], step["p99"], step["median"]) == (p90, p99, 1.0)
    print_report(report)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ×")]
    assert line.count("1.0 ms") == 1 + (p90 is not None) + (p99 is not None)


def test_the_limit_is_the_longer_of_computing_and_reading():
    """2 GFLOP at 1 TFLOP/s are 2 ms; a million weights at 1 GB/s are 4, 2 or 1 ms, by their size."""
    work, slow = Work(2e9, 1_000_000), Peak(1e12, 1e9)
    assert slow.limit_ms(work, Precision.FP32) == pytest.approx(4.0)
    assert Peak(1e12, 0.5e9).limit_ms(work, Precision.BF16) == pytest.approx(4.0)
    assert Peak(1e12, 0.25e9).limit_ms(work, Precision.INT8_BF16) == pytest.approx(4.0)
    assert slow.limit_ms(work, Precision.INT8_BF16) == pytest.approx(2.0)


@pytest.mark.skipif("avx512_vnni" not in instruction_set(), reason="this processor has no 8-bit products")
def test_the_peak_in_8_bits_is_that_of_8_bit_products():
    assert measure(Precision("int8+fp32"), 1)[0] > 1.5 * measure(Precision.FP32, 1)[0]


def test_without_its_checkpoint_the_work_is_not_counted_and_that_is_told(fused_bundle):
    bundle = open_bundle(fused_bundle)
    gone = replace(bundle.manifest, spec=replace(bundle.manifest.spec, base="/gone"))
    work, notes = counted(replace(bundle, manifest=gone))
    assert work == {} and "could not be counted" in notes[0] and "/gone" in notes[0]


def test_noise_is_told_where_the_middle_half_of_the_ratios_is_wide():
    ours = [100.0, 101.0, 99.0, 100.0, 102.0]
    assert timing.too_noisy(ours, {"eager": [2 * x for x in ours]}) is None
    # Both slow down together: the ratio holds.
    drifting = [100.0, 150.0, 200.0, 250.0, 300.0]
    assert timing.too_noisy(drifting, {"eager": [2 * x for x in drifting]}) is None
    assert "eager" in timing.too_noisy(ours, {"eager": [100.0, 150.0, 220.0, 300.0, 120.0]})
    assert "samples" in timing.too_noisy(drifting, {})


def test_bad_requests_are_refused_before_anything_is_measured(refused, fused_bundle, tmp_path, monkeypatch):
    refused(2, ("eagr", "eager", "openvino", "euler-25"), "bench", fused_bundle, "--against", "eagr")
    refused(2, "runs", "bench", fused_bundle, "--runs", 0)
    refused(2, "folder", "bench", fused_bundle, "--save", tmp_path)
    refused(2, "does not exist", "bench", fused_bundle, "--save", tmp_path / "no" / "r.json")
    refused(2, ".png", "bench", fused_bundle, "--plot", tmp_path / "chart.jpg")
    refused(1, "no bundle", "bench", tmp_path / "nothing")
    for package in ("openvino", "matplotlib"):
        monkeypatch.setitem(sys.modules, package, None)
    refused(2, "pip install openvino", "bench", fused_bundle, "--against", "openvino")
    refused(2, "pip install matplotlib", "bench", fused_bundle, "--plot", tmp_path / "chart.png")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_another_size_is_no_rival(refused, sdxl_checkpoint, fused_bundle, tmp_path):
    other = tmp_path / "other"
    spec = BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", width=32, backend="torchscript")
    build(spec, other)
    refused(2, ("1×64×32", "1×64×64"), "bench", fused_bundle, "--against", other)


def test_a_file_that_is_no_report_is_refused(tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"schema": 1, "cases": []}')
    with pytest.raises(UsageError, match="not a benchmark report"):
        read_report(path)
