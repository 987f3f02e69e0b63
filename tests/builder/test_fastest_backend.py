"""`--backend auto` on a CPU: the fastest backend, measured once and remembered."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcm_compile.builder import fastest_backend
from lcm_compile.builder.fastest_backend import CPU, SLOW_TO_BUILD, choose_on_cpu, time_on_cpu
from lcm_compile.engines import BACKENDS, cannot_build_from, find_backend
from lcm_compile.errors import BackendError
from lcm_compile.precisions import Precision
from lcm_compile.system.processor import model_name

ABLE = [n for n in BACKENDS if n not in SLOW_TO_BUILD and not cannot_build_from(n, CPU, Precision.FP32, None)]


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LCM_COMPILE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def dry_run(command, checkpoint, *words):
    """The plan, and what was said meanwhile."""
    code, out, err = command(
        "build", "--base", checkpoint, "--no-lcm", "--gpu", "cpu", "--dry-run", "--json", *words
    )
    assert code == 0
    return json.loads(out), err


def test_auto_takes_the_fastest_and_tells_of_each_other_why_not(command, sdxl_checkpoint, own_home):
    plan, told = dry_run(command, sdxl_checkpoint)
    assert "time the backends" in told
    figures = next(iter(json.loads((own_home / "cpu.json").read_text()).values()))
    assert set(figures) == set(ABLE) and min(figures.values()) > 0
    near = [name for name in figures if figures[name] <= 1.25 * min(figures.values())]
    assert plan["backend"] == min(near, key=list(BACKENDS).index)
    why = dict(reason.split(": ", 1) for reason in plan["passed_over"])
    assert set(why) == set(BACKENDS) - {plan["backend"]}
    for name in figures.keys() - {plan["backend"]}:
        assert f"{figures[name]:.1f} ms" in why[name] and f"{figures[plan['backend']]:.1f} ms" in why[name]
    assert why["tensorrt-rtx"].startswith("builds for NVIDIA GPUs only") and "compiles" in why["aotinductor"]
    again, told = dry_run(command, sdxl_checkpoint)
    assert again["backend"] == plan["backend"] and "time the backends" not in told
    assert dry_run(command, sdxl_checkpoint, "--backend", "torchscript")[0]["passed_over"] == []


@pytest.mark.parametrize(("later", "taken"), [(2.5, "onnxruntime"), (2.3, "torchscript")])
def test_of_two_that_are_near_the_first_is_taken(monkeypatch, later, taken):
    """Of 3 ms and 2.5 no small network knows which draws sooner."""
    monkeypatch.setattr(fastest_backend, "time_on_cpu", lambda *_: {"onnxruntime": 3.0, "torchscript": later})
    monkeypatch.setattr(
        fastest_backend,
        "cannot_build_from",
        lambda name, *_: None if name in ("onnxruntime", "torchscript") else "not asked for",
    )
    chosen, why = choose_on_cpu(Precision.FP32)
    assert chosen == taken
    assert any("near enough" in reason for reason in why) is (taken == "onnxruntime")


def test_a_delay_in_a_runner_is_seen(monkeypatch):
    """The fastest is slowed down by a second a call, and is not the fastest any more."""
    before = fastest_backend.measure(ABLE, Precision.FP32)
    fastest = min(before, key=before.get)
    engines = fastest_backend.small_engines

    def slowed(*asked):
        for name, runner in engines(*asked):
            if name == fastest:
                call = type(runner).__call__
                slow = type(
                    "Slow", (type(runner),), {"__call__": lambda *a, f=call: (time.sleep(1), f(*a))[1]}
                )
                runner.__class__ = slow
            yield name, runner

    monkeypatch.setattr(fastest_backend, "small_engines", slowed)
    monkeypatch.setattr(fastest_backend, "ROUNDS", 2)
    after = fastest_backend.measure(ABLE, Precision.FP32)
    assert min(after, key=after.get) != fastest and after[fastest] >= 1000


def test_what_is_remembered_is_read_without_torch(own_home, monkeypatch):
    names = ["onnxruntime", "torchscript"]
    key = fastest_backend.circumstances(names, Precision.FP32)
    own_home.mkdir()
    (own_home / "cpu.json").write_text(json.dumps({key: {"onnxruntime": 3.0, "torchscript": 2.0}}))
    monkeypatch.setattr(fastest_backend, "measure", lambda *_: pytest.fail("measured again"))
    assert time_on_cpu(names, Precision.FP32) == {"onnxruntime": 3.0, "torchscript": 2.0}
    script = f"""
import sys
from lcm_compile.builder.fastest_backend import time_on_cpu
from lcm_compile.precisions import Precision
time_on_cpu({names!r}, Precision.FP32)
assert not set(sys.modules) & {{"torch", "onnx", "openvino", "onnxruntime"}}
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("changed", ["model_name", "instruction_set", "installed_version", "options"])
def test_another_processor_version_or_way_to_build_is_measured_anew(own_home, monkeypatch, changed):
    asked = []
    monkeypatch.setattr(
        fastest_backend, "measure", lambda names, _: asked.append(names) or dict.fromkeys(names, 1.0)
    )
    time_on_cpu(ABLE, Precision.FP32)
    time_on_cpu(ABLE, Precision.FP32)
    assert len(asked) == 1
    where = find_backend(ABLE[0]) if changed == "options" else fastest_backend
    monkeypatch.setattr(where, changed, lambda *_: "another")
    time_on_cpu(ABLE, Precision.FP32)
    assert len(asked) == 2
    time_on_cpu(ABLE, Precision.BF16)
    assert len(asked) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "\x00"])
def test_a_broken_memory_is_measured_over(own_home, monkeypatch, content):
    monkeypatch.setattr(fastest_backend, "measure", lambda names, _: dict.fromkeys(names, 1.0))
    own_home.mkdir()
    (own_home / "cpu.json").write_text(content)
    assert set(time_on_cpu(ABLE, Precision.FP32)) == set(ABLE)
    assert json.loads((own_home / "cpu.json").read_text())


def test_one_candidate_needs_no_measurement(own_home, monkeypatch):
    monkeypatch.setattr(fastest_backend, "measure", lambda *_: pytest.fail("nothing to compare"))
    assert choose_on_cpu(Precision.FP32, graph_format="torchscript")[0] == "torchscript"
    assert not Path(own_home / "cpu.json").exists()
    with pytest.raises(BackendError, match="no backend can build"):
        choose_on_cpu(Precision.FP32, graph_format="no such format")


def test_the_processor_is_told_with_its_cores(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU 9000\nflags\t: avx\n")
    assert model_name(cpuinfo).startswith("Some CPU 9000, ") and model_name(cpuinfo).endswith(" threads")


def test_a_build_in_fp32_tells_what_bf16_would_gain(command, own_home, sdxl_checkpoint, monkeypatch):
    """By stored figures alone where the model is small, and only where nobody asked for a precision."""
    figures = {}
    for precision, milliseconds in ((Precision.FP32, 30.0), (Precision.BF16, 12.0)):
        able = [n for n in ABLE if cannot_build_from(n, CPU, precision, None) is None]
        if not able:
            pytest.skip("no backend computes in bf16 here")
        figures[fastest_backend.circumstances(able, precision)] = dict.fromkeys(able, milliseconds)
    monkeypatch.setattr(fastest_backend, "measure", lambda *_: pytest.fail("nothing is to be measured"))
    own_home.mkdir()
    fp32, both = (dict(list(figures.items())[:count]) for count in (1, 2))
    (own_home / "cpu.json").write_text(json.dumps(fp32))
    assert "bf16" not in dry_run(command, sdxl_checkpoint)[1]
    (own_home / "cpu.json").write_text(json.dumps(both))
    assert "2.5 × as fast in bf16 (--precision bf16)" in dry_run(command, sdxl_checkpoint)[1]
    assert "as fast in bf16" not in dry_run(command, sdxl_checkpoint, "--precision", "fp32")[1]
