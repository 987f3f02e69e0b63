"""What `bench --plot` shows, read from matplotlib's own objects."""

from __future__ import annotations

import pytest

from lcm_compile import BuildSpec
from lcm_compile.benchmarks.measure.chart import draw_report, plot_report
from lcm_compile.benchmarks.measure.report import Benchmark, BenchmarkReport, Case, Environment, RivalSamples
from lcm_compile.spec import Shape

HERE = Environment("some CPU", "some CPU", 2, {}, "2026-01-01T00:00:00+00:00")
OTHER = "/bundles/other"


def report_of(ours, rivals, batch=1):
    """Of one stage and the picture; rivals are a picture's and a stage's median, parity and batch."""
    against = {
        name: RivalSamples((ms,) * 3, parity_db=db, batch=many) for name, (ms, _, db, many) in rivals.items()
    }
    apart = {
        name: RivalSamples((ms,) * 3, batch=many)
        for name, (_, ms, _, many) in rivals.items()
        if ms is not None
    }
    ms, stage_ms, db = ours
    cases = (
        Case("picture", (ms - 1, ms, ms + 9), against, parity_db=db),
        Case("step", (stage_ms,) * 3, apart),
        Case("cold start", (900.0,)),
    )
    asked = Benchmark(BuildSpec("demo"), tuple(rivals), 3, 60.0, "onnxruntime", {}, Shape(batch, 64, 64))
    return BenchmarkReport(HERE, asked, cases)


def points(axes):
    return sorted(tuple(place) for drawn in axes.collections for place in drawn.get_offsets().tolist())


def bars(axes):
    return [sorted(bar.get_width() for bar in drawn) for drawn in axes.containers]


@pytest.fixture
def drawn():
    import matplotlib.pyplot as plt

    yield lambda report: draw_report(report).axes
    plt.close("all")


def test_quality_is_the_psnr_to_eager_whose_time_is_a_line(drawn):
    rivals = {"eager": (80.0, 60.0, None, None), "openvino": (50.0, None, 61.0, None)}
    times, quality = drawn(report_of((40.0, 30.0, 70.0), rivals))
    assert points(quality) == [(40, 70), (50, 61)]
    assert [line.get_xdata() for line in quality.lines] == [[80, 80]]
    assert quality.get_xlabel() == "milliseconds a picture, median"
    assert quality.get_ylabel() == "PSNR to the picture of eager (dashed), dB"
    assert bars(times) == [[30, 40], [60, 80], [50]]
    assert [label.get_text() for label in times.get_yticklabels()] == ["step", "picture"]
    assert [text.get_text() for text in times.figure.legends[0].get_texts()] == ["ours", "eager", "openvino"]


def test_without_eager_quality_is_what_the_builds_recorded(drawn):
    rivals = {"openvino": (50.0, None, None, None), OTHER: (45.0, 33.0, 38.5, None)}
    times, quality = drawn(report_of((40.0, 30.0, 70.0), rivals))
    assert points(quality) == [(40, 70), (45, 38.5)] and not quality.lines
    assert quality.get_ylabel() == "PSNR to the picture of torch, as recorded by its build, dB"
    assert bars(times) == [[30, 40], [50], [33, 45]]


def test_times_are_of_one_picture_whatever_the_batches(drawn):
    times, quality = drawn(report_of((40.0, 30.0, 70.0), {OTHER: (100.0, 60.0, 65.0, 4)}, batch=2))
    assert bars(times) == [[15, 20], [15, 25]]
    assert points(quality) == [(20, 70), (25, 65)]


def test_where_no_quality_is_known_the_times_stand_alone(drawn):
    assert len(drawn(report_of((40.0, 30.0, None), {"openvino": (50.0, None, None, None)}))) == 1


def test_a_plot_is_written_whole(tmp_path):
    path = tmp_path / "chart.png"
    plot_report(report_of((40.0, 30.0, 70.0), {}), path)
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["chart.png"]
