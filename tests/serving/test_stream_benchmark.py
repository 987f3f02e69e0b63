"""The benchmark of the stream, small: what it draws, and what it makes of its samples."""

from __future__ import annotations

import asyncio

import pytest

from lcm_compile.benchmarks.measure.stream import measure, summary_of


def test_a_round_times_as_many_pictures_each_way(small):
    [samples] = asyncio.run(measure(small, rounds=1, count=4))
    assert len(samples["bare"]) == len(samples["streamed"]) == 4
    assert 1 <= len(samples["typed"]) <= 4
    assert all(time > 0 for times in samples.values() for time in times)


def test_the_summary_compares_with_the_bare_pipeline_of_the_same_round():
    samples = [
        {"bare": [10.0, 10.0], "streamed": [11.0, 9.0], "typed": [15.0]},
        {"bare": [20.0, 20.0], "streamed": [25.0, 25.0], "typed": [40.0]},
        {"bare": [10.0, 10.0], "streamed": [12.5, 12.5], "typed": [15.0]},
    ]
    summary = summary_of(samples)
    assert summary["frames_share"] == pytest.approx(0.8)
    assert summary["key_pictures"] == pytest.approx(1.5)
