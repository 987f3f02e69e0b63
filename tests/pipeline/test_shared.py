"""A pipeline that several threads share, one that is closed, and one that a forked process has inherited."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from factories import build_from

from lcm_compile import BuildSpec, build, load
from lcm_compile.builder.export import export
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.engines import onnxruntime
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.pipeline import LcmPipeline
from lcm_compile.pipeline.request import Request

THREADS = 4
DRAWN = {True: 500, False: 100}  # by whether the bundle has an engine for each stage
# One graph has the same runners, so one backend stands for all. Compiling takes minutes for any model.
BUNDLES = [
    "onnxruntime",
    "openvino",
    "torchscript",
    "torchscript, one graph",
    pytest.param("aotinductor", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def graphs(sd15_checkpoint, tmp_path_factory):
    """The ONNX graphs that two of the backends build from."""
    folder = tmp_path_factory.mktemp("graphs") / "graphs"
    spec = BuildSpec(str(sd15_checkpoint), no_lcm=True, few_step="lcm", precision="fp32", height=32, width=32)
    export(spec, folder)
    return folder


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(request, sd15_checkpoint, tmp_path_factory):
    backend, comma, _ = request.param.partition(",")
    pytest.importorskip({"openvino": "openvino"}.get(backend, "onnxruntime"))
    if backend == "aotinductor" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    out = tmp_path_factory.mktemp(backend) / "bundle"
    if backend in ("onnxruntime", "openvino"):
        return build_from(request.getfixturevalue("graphs"), "cpu", backend, out)[1]
    spec = BuildSpec(
        str(sd15_checkpoint),
        no_lcm=True,
        few_step="lcm",
        height=32,
        width=32,
        backend=backend,
        whole_loop=bool(comma),
    )
    return build(spec, out)


def requests(bundle):
    """Different prompts, more of them than are remembered, and one prompt in many ways."""
    many = [Request(f"a {colour} star {i}", i) for i in range(6) for colour in ("red", "blue")]
    many += [Request("a red star", 7, num_images=n) for n in (1, 2, 3)]
    if len(bundle.manifest.stages) > 1:
        many += [Request("a red star", 7, steps=steps) for steps in (1, 2, 3)]
        many += [Request("a red star", 7, "blue", guidance_scale=scale) for scale in (1.5, 2.0)]
    return many


def draw_at_once(pipeline, requests):
    """The pictures of requests, in their order, drawn from several threads that begin together."""
    begin = threading.Barrier(THREADS)

    def draw_some(first):
        begin.wait()
        return [pipeline.draw(request).pictures for request in requests[first::THREADS]]

    with ThreadPoolExecutor(THREADS) as pool:
        parts = list(pool.map(draw_some, range(THREADS)))
    return [parts[i % THREADS][i // THREADS] for i in range(len(requests))]


def test_each_picture_of_threads_is_the_one_drawn_alone(bundle):
    different = requests(bundle)
    count = DRAWN[len(bundle.manifest.stages) > 1]
    order = np.random.default_rng(0).integers(len(different), size=count)
    with load(bundle, prompt_cache=0) as alone:
        expected = [alone.draw(request).pictures for request in different]
    assert len({pictures.tobytes() for pictures in expected}) == len(expected)
    with load(bundle) as shared:
        drawn = draw_at_once(shared, [different[i] for i in order])
    for i, pictures in zip(order, drawn, strict=True):
        np.testing.assert_array_equal(pictures, expected[i])


@pytest.fixture(scope="module")
def fixed(sdxl_bundle):
    """A pipeline of engines that write every result to the same memory, as those on a GPU do."""
    bundle = open_bundle(sdxl_bundle)
    with load(bundle) as plain:

        def open_fixed():
            runners = {}
            for stage in bundle.manifest.stages:
                path, contract = bundle.path(stage.file), stage.contract
                session = onnxruntime.open_checked(path, contract, [onnxruntime.CPU])
                runners[contract.name] = onnxruntime.BoundRunner(session, contract, "cpu")
            return LcmPipeline(bundle.manifest.pipeline, runners, plain.prompts.tokenizers)

        yield open_fixed


def test_engines_with_fixed_memory_draw_one_picture_at_a_time(fixed):
    different = [Request(f"a red star {i}", i, steps=1 + i % 3) for i in range(9)]
    with fixed() as pipeline:
        expected = [pipeline.draw(request).pictures for request in different]
        for pictures, alone in zip(draw_at_once(pipeline, different * 4), expected * 4, strict=True):
            np.testing.assert_array_equal(pictures, alone)


def test_a_second_picture_within_a_thread_is_refused_where_it_would_wait_for_itself(fixed):
    one, other = Request("a red star", 1), Request("a blue star", 2)
    with fixed() as pipeline:
        begun = pipeline.progress(one)
        next(begun)
        with pytest.raises(UsageError, match="this thread has begun another picture"):
            pipeline.draw(other)
        begun.close()
        pipeline.draw(other)
        with pytest.raises(ZeroDivisionError) as kept:  # which keeps the frames of the picture
            pipeline.draw(one, lambda done, total: 1 // 0)
        pipeline.draw(other)
        assert kept.tb is not None


def test_a_picture_that_is_shown_may_close_its_pipeline(fixed):
    closing = fixed()

    def draw():
        with pytest.raises(UsageError, match="is closed"):
            closing.draw(Request("a star", 1), show=lambda pictures: closing.close())

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_two_pictures_in_turn_within_a_thread(bundle):
    one, other = Request("a red star", 1), Request("a blue star", 2)
    with load(bundle) as pipeline:
        expected = [pipeline.draw(request).pictures for request in (one, other)]
        progress = [pipeline.progress(request) for request in (one, other)]
        drawn = [None, None]
        while None in [d if d is None else 0 for d in drawn]:
            for i in (0, 1):
                try:
                    if drawn[i] is None:
                        next(progress[i])
                except StopIteration as stop:
                    drawn[i] = stop.value.pictures
    np.testing.assert_array_equal(drawn, expected)


def test_a_closed_pipeline_says_so(bundle):
    request = Request("a red star", 1)
    pipeline = load(bundle)
    begun = pipeline.progress(request)
    next(begun)
    runner = next(iter(pipeline.runners.values()))
    zeros = {s.name: runner.to_device(np.zeros(s.shape, s.dtype)) for s in runner.contract.inputs}
    for _ in range(2):
        pipeline.close()
        for draw in (lambda: pipeline("a red star"), lambda: next(begun), lambda: runner(zeros)):
            with pytest.raises((UsageError, StopIteration)) as error:
                draw()
            assert error.type is StopIteration or "is closed" in error.value.message


@pytest.mark.parametrize("wait", [True, False])
def test_a_pipeline_can_be_closed_while_another_thread_draws(bundle, wait):
    pipeline, told = load(bundle, wait=wait), []

    def draw():
        try:
            while True:
                pipeline("a red star")
        except Exception as error:
            told.append(error)

    threads = [threading.Thread(target=draw, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    pipeline.close()
    for thread in threads:
        thread.join(20)
    assert [type(error) for error in told] == [UsageError] * 2
    assert all("is closed" in error.message for error in told)


def in_a_fork(function, seconds=20):
    """What a function returns or raises in a forked process, as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = f"returned {function()}"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    for _ in range(seconds * 20):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    with open(read, "rb") as pipe:  # noqa: PTH123 - a pipe, not a path
        return pipe.read().decode() or f"hung for {seconds} s"


def test_a_forked_process_is_told_to_load_the_bundle_itself(bundle):
    with load(bundle) as pipeline:
        pipeline("a red star")

        def draw():
            try:
                pipeline("a red star")
            finally:
                pipeline.close()

        assert in_a_fork(draw).startswith("UsageError: this pipeline was loaded in process")
        pipeline("a red star")  # and the parent goes on


def test_a_forked_process_loads_the_bundle_or_says_why_it_can_not(bundle):
    with load(bundle) as pipeline:
        pipeline("a red star")
    if bundle.manifest.backend in ("torchscript", "aotinductor"):
        told = in_a_fork(lambda: load(bundle))
        assert told.startswith("BackendError: process") and "torch" in told
    else:
        assert in_a_fork(lambda: len(load(bundle)("a red star"))) == "returned 1"
