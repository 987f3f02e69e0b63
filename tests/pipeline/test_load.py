"""What is paid once: engines that load while the first stages run, prompts that are known, many prompts."""

from __future__ import annotations

import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from lcm_compile import load
from lcm_compile.engines import onnxruntime
from lcm_compile.errors import BackendError, UsageError
from lcm_compile.pipeline.request import Request

REQUEST = Request("a red star", 7)


@pytest.fixture
def slow_decoder(monkeypatch):
    """The decoder's engine takes half a second longer to load; returns when each stage was loaded."""
    real, loaded = onnxruntime.load, {}

    def slow(path, contract, target, precision):
        if contract.name == "decode":
            time.sleep(0.5)
        runner = real(path, contract, target, precision)
        loaded[contract.name] = time.perf_counter()
        return runner

    monkeypatch.setattr(onnxruntime, "load", slow)
    return loaded


def test_drawing_begins_before_the_last_engine_is_loaded(sdxl_bundle, slow_decoder):
    with load(sdxl_bundle) as pipeline:
        expected = pipeline.draw(REQUEST).pictures
    slow_decoder.clear()
    stepped = []
    with load(sdxl_bundle, wait=False) as pipeline:
        drawing = pipeline.draw(REQUEST, lambda done, total: stepped.append(time.perf_counter()))
    np.testing.assert_array_equal(expected, drawing.pictures)
    assert stepped[-2] < slow_decoder["decode"] < stepped[-1]  # all steps were done by then


def test_an_engine_that_can_not_be_loaded_is_told_when_it_is_needed(sdxl_bundle, monkeypatch):
    real = onnxruntime.load

    def broken(path, contract, target, precision):
        if contract.name == "step":
            raise BackendError("the step is broken")
        return real(path, contract, target, precision)

    monkeypatch.setattr(onnxruntime, "load", broken)
    before = threading.active_count()
    with pytest.raises(BackendError, match="the step is broken"), load(sdxl_bundle, wait=False) as pipeline:
        pipeline.draw(REQUEST)
    assert threading.active_count() <= before + 1


def test_closing_does_not_wait_for_an_engine_that_loads_and_frees_it_then(sdxl_bundle, monkeypatch):
    real, go, loaded = onnxruntime.load, threading.Event(), []

    def slow(path, contract, target, precision):
        assert go.wait(30)
        loaded.append(real(path, contract, target, precision))
        return loaded[-1]

    monkeypatch.setattr(onnxruntime, "load", slow)
    pipeline = load(sdxl_bundle, wait=False)
    before = time.perf_counter()
    pipeline.close()
    assert time.perf_counter() - before < 5
    go.set()
    until = time.monotonic() + 30
    while time.monotonic() < until and not (loaded and all(is_closed(one) for one in loaded)):
        time.sleep(0.01)
    assert loaded and all(is_closed(one) for one in loaded)


def is_closed(runner):
    try:
        runner({spec.name: np.zeros(spec.shape, spec.dtype) for spec in runner.contract.inputs})
    except UsageError:
        return True
    return False


def test_a_prompt_that_is_known_is_not_encoded_again(sdxl_bundle):
    with load(sdxl_bundle) as pipeline, load(sdxl_bundle, prompt_cache=0) as forgetful:
        counts = {p: count_calls(p, "encode", "context") for p in (pipeline, forgetful)}
        requests = [
            REQUEST,
            Request("a red star", 8),
            Request("a red star", 7, steps=2),
            Request("a red star", 7, "blue", guidance_scale=1.5),
            Request("a red star", 9, "blue", guidance_scale=1.5),
        ]
        for request in requests:
            np.testing.assert_array_equal(pipeline.draw(request).pictures, forgetful.draw(request).pictures)
        assert counts[forgetful] == {"encode": 7, "context": 7}
        assert counts[pipeline] == {"encode": 2, "context": 4}  # two steps want other conditions than four
        stars = [Request(f"a star {i}", 7, steps=1) for i in range(9)]
        for request in stars:
            pipeline.draw(request)
        for request in stars[::-1]:
            pipeline.draw(request)
        assert counts[pipeline]["encode"] == 2 + 9 + 1  # eight are remembered


def count_calls(pipeline, *stages):
    counts = dict.fromkeys(stages, 0)

    class Counting:
        def __init__(self, runner):
            self.runner = runner

        def __getattr__(self, name):
            return getattr(self.runner, name)

        def __call__(self, inputs):
            counts[self.runner.contract.name] += 1
            return self.runner(inputs)

    pipeline.runners |= {name: Counting(pipeline.runners[name]) for name in stages}
    return counts


def test_a_prompt_a_line_loads_once(command, sdxl_bundle, tmp_path, monkeypatch):
    loaded, real = [], onnxruntime.load
    monkeypatch.setattr(onnxruntime, "load", lambda path, *rest: (loaded.append(path), real(path, *rest))[1])
    lines = "a red star\r\n\r\n  a blue circle \r\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode("utf-16"))))
    words = ("run", "--stdin", "--engine", sdxl_bundle, "--out", tmp_path)
    code, out, err = command(*words, "--seed", 3, "--json")
    assert code == 0 and len(loaded) == 4, err
    told = [json.loads(line) for line in out.splitlines()]
    assert [one["prompt"] for one in told] == ["a red star", "a blue circle"]
    assert [one["images"][0]["path"] for one in told] == [
        str(tmp_path / "a-red-star-3.png"),
        str(tmp_path / "a-blue-circle-3.png"),
    ]
    command("run", "a blue circle", "--engine", sdxl_bundle, "--seed", 3, "--out", tmp_path / "one.png")
    one, other = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "a-blue-circle-3.png"))
    np.testing.assert_array_equal(one, other)

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a star\na star\n")))
    code, out, _ = command(*words, "--num-images", 2, "--quiet")
    assert code == 0 and len(set(out.split())) == 4  # without a seed, each prompt draws its own


@pytest.mark.parametrize("more", [["a star"], ["--grid", "steps=1..2"]])
def test_stdin_excludes_other_prompts(refused, sdxl_bundle, more):
    refused(2, "--stdin", "run", "--stdin", "--engine", sdxl_bundle, *more)


def test_many_prompts_need_a_folder(refused, sdxl_bundle, tmp_path):
    refused(2, "is no folder", "run", "--stdin", "--engine", sdxl_bundle, "--out", tmp_path / "x.png")
