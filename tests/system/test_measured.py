"""Measurements that are kept: taken once by a process, even where they can't be written."""

from __future__ import annotations

import pytest

from lcm_compile.system.measured import Measured


def test_a_process_decides_the_same_where_nothing_can_be_written(tmp_path, monkeypatch):
    """A build plans twice, and a second measurement may come out otherwise."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LCM_COMPILE_HOME", str(tmp_path / "file" / "home"))
    kept = Measured("kept.json", str)
    assert kept.of("here", ["a"], lambda: {"a": "F2"}) == {"a": "F2"}
    assert kept.of("here", ["a"], lambda: pytest.fail("measured again")) == {"a": "F2"}
    assert kept.of("there", ["a"], lambda: {"a": "F4"}) == {"a": "F4"}


def test_another_process_reads_what_one_has_measured(tmp_path, monkeypatch):
    """One with other names in it is none of these measurements, and is made anew."""
    monkeypatch.setenv("LCM_COMPILE_HOME", str(tmp_path))
    assert Measured("kept.json", float).of("here", ["a"], lambda: {"a": 1.5}) == {"a": 1.5}
    assert Measured("kept.json", float).of("here", ["a"], lambda: pytest.fail("again")) == {"a": 1.5}
    assert Measured("kept.json", float).of("here", ["a", "b"], lambda: {"a": 2.0, "b": 1.0})["b"] == 1.0
