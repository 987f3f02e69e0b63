"""TensorRT's runner and caches on a stand-in for its runtime.

test_tensorrt_bindings.py holds the stand-in to the real bindings.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import stand_in_tensorrt as stand_in
import torch

from lcm_compile import load
from lcm_compile.bundles.bundle import open_bundle, publishing
from lcm_compile.bundles.inventory import list_bundles, prune
from lcm_compile.bundles.manifest import MANIFEST
from lcm_compile.engines import gpu, onnxruntime, tensorrt, tensorrt_rtx
from lcm_compile.engines.scratch import Scratch
from lcm_compile.engines.tensors import TensorRunner
from lcm_compile.errors import BackendError
from lcm_compile.pipeline import load as loading
from lcm_compile.pipeline.cuda_graphs import FIRST, SWITCHED_OFF, USED
from lcm_compile.pipeline.load import load_tokenizers
from lcm_compile.pipeline.pipeline import LcmPipeline
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import snr_db
from lcm_compile.proof.recording import read_calls
from lcm_compile.targets import find_target

A10 = find_target("a10")


class Stream:
    """Of torch.cuda: it has an address, and work in order, which is done no sooner than somebody needs it."""

    every: ClassVar[dict] = {}

    def __init__(self, address=None):
        self.cuda_stream = address if address is not None else id(self)
        self.work = []
        Stream.every[self.cuda_stream] = self

    def wait_stream(self, other):
        """Everything that is on the other stream by now comes before what is later put on this one."""
        so_far = len(other.work)
        self.work.append(lambda: other.do(so_far))

    def do(self, count=None):
        """Does the work that is on the stream, or the first `count` pieces of it."""
        for i, piece in enumerate(self.work[:count]):
            self.work[i] = lambda: None
            piece()


class OnCpu:
    """A method of TensorRunner with its tensors on the processor."""

    def __init__(self, method):
        self.method = method

    def __get__(self, runner, owner):
        def call(*args):
            before, runner.device = runner.device, "cpu"
            try:
                return self.method(runner, *args)
            finally:
                runner.device = before

        return call


@pytest.fixture
def streams(monkeypatch):
    """The default stream of torch, and the one that is current: the same, to begin with."""
    default = Stream(0)
    held = {"current": default, "default": default}
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: held["current"])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: held["default"])
    monkeypatch.setattr(tensorrt, "ALIGNMENT", stand_in.ALIGNMENT)
    for module in (tensorrt, loading):
        monkeypatch.setattr(module, "Scratch", lambda device="cuda": Scratch("cpu"))
    for name in ("tensor", "empty", "to_device", "to_host", "all_to_host", "mark", "between"):
        monkeypatch.setattr(TensorRunner, name, OnCpu(vars(TensorRunner)[name]))
    stand_in.calls.clear()
    for done in (stand_in.compiled, stand_in.captured):
        done.clear()
    return held


STAGES = 4


def stage_of(bundle, name):
    return next(stage for stage in bundle.manifest.stages if stage.contract.name == name)


@pytest.fixture
def step(streams, sdxl_bundle):
    """The runner of a step, and one recorded call of it by torch."""
    bundle = open_bundle(sdxl_bundle)
    stage = stage_of(bundle, "step")
    call = read_calls(bundle.path("proof/step.npz"), stage.contract)[1]
    return tensorrt.TensorRtRunner(stand_in, bundle.path(stage.file), stage.contract), call


def test_an_engine_computes_where_it_is_told_to(step):
    runner, (inputs, expected) = step
    outputs = runner(inputs)
    for spec in runner.contract.outputs:
        found = outputs[spec.name]
        assert tuple(found.shape) == spec.shape and found.dtype == getattr(torch, spec.dtype)
        assert snr_db(expected[spec.name], runner.to_host(found)) > 80
    addressed = [name for kind, name, *_ in stand_in.calls if kind == "address"]
    contract = runner.contract
    assert sorted(addressed) == sorted(spec.name for spec in (*contract.inputs, *contract.outputs))


def test_an_address_is_told_again_only_when_it_is_another(step):
    runner, (inputs, _) = step
    tensors = {name: torch.from_numpy(array).clone() for name, array in inputs.items()}
    first = runner(tensors)
    stand_in.calls.clear()
    again = runner({**tensors, "latent": tensors["latent"].clone()})
    assert [name for kind, name, *_ in stand_in.calls if kind == "address"] == ["latent"]
    assert {n: a.data_ptr() for n, a in first.items()} == {n: a.data_ptr() for n, a in again.items()}


def test_an_input_that_is_not_aligned_is_copied(step):
    runner, (inputs, expected) = step
    latent = inputs["latent"]
    memory = torch.empty(latent.size + 1)
    memory[1:] = torch.from_numpy(latent).flatten()
    shifted = memory[1:].view(latent.shape)
    assert shifted.data_ptr() % stand_in.ALIGNMENT
    outputs = runner({**inputs, "latent": shifted})
    assert snr_db(expected["prediction"], runner.to_host(outputs["prediction"])) > 80


def test_another_shape_or_a_refused_address_is_an_error(step, monkeypatch):
    runner, (inputs, _) = step
    with pytest.raises(BackendError, match="takes latent as"):
        runner({**inputs, "latent": inputs["latent"][:, :2]})
    monkeypatch.setattr(stand_in.IExecutionContext, "set_tensor_address", lambda *_: False)
    with pytest.raises(BackendError, match="refuses the memory for"):
        runner({name: torch.from_numpy(array.copy()) for name, array in inputs.items()})


@pytest.mark.parametrize(
    ("side", "change", "told"),
    [
        ("inputs", {"shape": (1, 4, 16, 8)}, r"takes latent as \(\(1, 4, 16, 16\), 'float32'\), not"),
        ("inputs", {"dtype": "int64"}, r"takes latent as .*'float32'\), not .*'int64'\)"),
        ("inputs", {"name": "latents"}, "takes latent as .*, not None, and takes latents as None"),
        ("outputs", {"shape": (1, 4, 8, 8)}, r"gives \[\(\(1, 4, 16, 16\)"),
        ("outputs", {"dtype": "uint8"}, "gives .*'float32'.*, not .*'uint8'"),
    ],
)
def test_an_engine_of_another_contract_is_refused(step, sdxl_bundle, side, change, told):
    """It would read or write past the end of the memory that it is given."""
    runner, _ = step
    specs = [
        replace(spec, **change) if spec.name in ("latent", "prediction") else spec
        for spec in getattr(runner.contract, side)
    ]
    contract = replace(runner.contract, **{side: tuple(specs)})
    with pytest.raises(BackendError, match=told):
        tensorrt.TensorRtRunner(stand_in, sdxl_bundle / "engines" / "step.onnx", contract)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("which", ["default", "another"])
def test_a_launch_is_in_order_with_torchs_work_before_and_after(step, streams, monkeypatch, which, early):
    """What torch computes for it is read, and what it computes is there for torch; nobody waits meanwhile.

    Work on streams is done as early as it may be, or as late.
    """
    runner, (inputs, expected) = step
    current = streams["current"] if which == "default" else Stream()
    streams["current"] = current
    launched = []

    def launch(address, work):
        launched.append(address)
        Stream.every[address].work.append(work)

    monkeypatch.setattr(stand_in, "launch", launch)
    given = {name: torch.zeros_like(torch.from_numpy(array)) for name, array in inputs.items()}
    current.work.append(lambda: [given[n].copy_(torch.from_numpy(inputs[n])) for n in inputs])
    output = runner(given)["prediction"].fill_(torch.nan)
    current.work.append(lambda: found.append(output.clone()))
    found = []
    if early:
        Stream.every[launched[0]].do()
    current.do()
    assert snr_db(expected["prediction"], found[0].numpy()) > 80
    # TensorRT waits for the GPU at every launch on the default stream.
    assert launched == [runner._stream.cuda_stream if which == "default" else current.cuda_stream]
    assert launched != [streams["default"].cuda_stream]


@pytest.mark.parametrize("fault", ["launch", "context", "engine"])
def test_what_fails_is_an_error_with_a_reason(fault, step, sdxl_bundle, monkeypatch, tmp_path):
    runner, (inputs, _) = step
    if fault == "launch":
        monkeypatch.setattr(stand_in.IExecutionContext, "execute_async_v3", lambda *_: False)
        with pytest.raises(BackendError, match="the step engine failed"):
            runner(inputs)
        return
    path = sdxl_bundle / "engines" / "step.onnx"
    if fault == "context":
        monkeypatch.setattr(stand_in.ICudaEngine, "create_execution_context", lambda *_: None)
    else:
        path = tmp_path / "step.engine"
        path.write_bytes(bytes(100))
    told = "no engine: " if fault == "engine" else "can't run .*step.onnx"
    with pytest.raises(BackendError, match=told):
        tensorrt.TensorRtRunner(stand_in, path, runner.contract)


def pipeline_of(folder, **options):
    """The pipeline of a bundle, with its engines run by TensorRT's runner."""
    bundle = open_bundle(folder)
    runners = {
        s.contract.name: tensorrt.TensorRtRunner(stand_in, bundle.path(s.file), s.contract)
        for s in bundle.manifest.stages
    }
    settings = bundle.manifest.pipeline
    return LcmPipeline(settings, runners, load_tokenizers(bundle.folder, settings), **options)


def test_a_whole_picture_through_the_runner(streams, sdxl_bundle):
    request = Request("a red star", 7, guidance_scale=1.5)
    with load(sdxl_bundle) as plain, pipeline_of(sdxl_bundle, cuda_graph=False) as pipeline:
        expected, found = plain.draw(request).pictures, pipeline.draw(request).pictures
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_engines_that_torch_cannot_capture_capture_themselves(streams, sdxl_bundle, monkeypatch):
    """Once for each stage: what they read is always at the same address, whatever is drawn."""
    monkeypatch.setattr(stand_in, "capturable", False)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(("a red star", "a ring", "", "a star"))]
    told = []
    with load(sdxl_bundle) as plain, pipeline_of(sdxl_bundle) as pipeline:
        for request in (*requests, requests[1]):
            pipeline.cuda_graph = len(told) < len(requests)
            drawing = pipeline.draw(request)
            expected = plain.draw(request).pictures
            assert np.abs(drawing.pictures.astype(int) - expected.astype(int)).max() <= 1
            told.append(drawing.cuda_graph)
            if len(told) == len(requests):
                assert len(stand_in.captured) == len(set(stand_in.captured)) == STAGES
    assert told == [FIRST, USED, USED, USED, SWITCHED_OFF]
    assert len(stand_in.captured) == STAGES


@pytest.mark.parametrize("fault", ["the context", "the package"])
def test_engines_that_nothing_can_capture_say_why(streams, sdxl_bundle, monkeypatch, fault):
    monkeypatch.setattr(stand_in, "capturable", False)
    with pipeline_of(sdxl_bundle) as pipeline:
        if fault == "the context":
            monkeypatch.setattr(stand_in.ICudaEngine, "create_execution_context", lambda *_: None)
        else:
            monkeypatch.delattr(stand_in, "CudaGraphStrategy")
        told = [pipeline.draw(Request("a red star", seed)).cuda_graph for seed in range(3)]
    reason = "can't run" if fault == "the context" else "does not let torch capture"
    assert "not used" in told[0] and all(reason in status for status in told[1:])


def test_the_stages_of_a_pipeline_compute_in_one_memory(streams, sdxl_bundle, monkeypatch):
    """As large as the stage needs that needs the most: they run in turn, and leave nothing there."""
    loaded = []

    def load_stage(path, contract, target, precision):
        loaded.append(tensorrt.TensorRtRunner(stand_in, path, contract))
        return loaded[-1]

    with load(sdxl_bundle) as plain:
        expected = [plain.draw(Request("a red star", seed)).pictures for seed in range(2)]
    monkeypatch.setattr(loading, "check_backend", lambda bundle: SimpleNamespace(load=load_stage))
    with load(sdxl_bundle, cuda_graph=False) as pipeline:
        for seed, pictures in enumerate(expected):
            found = pipeline.draw(Request("a red star", seed)).pictures
            assert np.abs(found.astype(int) - pictures.astype(int)).max() <= 1
        memory = weakref.ref(loaded[0]._scratch.memory())
    assert memory() is None  # a closed pipeline has none, even if it is kept
    lent = [call[1:] for call in stand_in.calls if call[0] == "scratch"]
    assert len(lent) == len(loaded) == STAGES
    most = max(len(runner.contract.inputs) + len(runner.contract.outputs) for runner in loaded)
    assert len(set(lent)) == 1 and lent[0][1] == stand_in.SCRATCH * most


def test_memory_that_grows_stays_where_graphs_were_captured_with_it():
    scratch = Scratch("cpu")
    scratch.reserve(100)
    first = weakref.ref(scratch.memory())
    scratch.reserve(50)
    assert scratch.memory() is first() and first().numel() == 100
    scratch.reserve(200)
    assert scratch.memory().numel() == 200 and first() is not None


def bound_runner(path, contract):
    session = onnxruntime.open_checked(path, contract, [onnxruntime.CPU])
    return onnxruntime.BoundRunner(session, contract, "cpu")


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_threads_may_share_a_runner(backend, streams, sdxl_bundle, monkeypatch):
    """Each call computes with its own inputs, however the threads come to be mixed."""
    bundle = open_bundle(sdxl_bundle)
    stage = stage_of(bundle, "step")
    path = bundle.path(stage.file)
    runner = (
        bound_runner(path, stage.contract)
        if backend == "onnxruntime"
        else tensorrt.TensorRtRunner(stand_in, path, stage.contract)
    )
    calls = [inputs for inputs, _ in read_calls(bundle.path("proof/step.npz"), stage.contract)]
    expected = [runner(inputs)["prediction"].clone().numpy() for inputs in calls]
    given, tensor = [], runner.tensor

    def slow(spec, array):
        time.sleep(0.0002)  # the other thread's turn
        return tensor(spec, array)

    def written(launch):
        def call(*arguments):
            done = launch(*arguments)
            given.append(runner._outputs["prediction"].clone().numpy())
            return done

        return call

    monkeypatch.setattr(runner, "tensor", slow)
    if backend == "tensorrt":
        monkeypatch.setattr(runner, "_enqueue", written(runner._enqueue))
    else:
        session = runner._session
        monkeypatch.setattr(
            runner, "_session", SimpleNamespace(run_with_iobinding=written(session.run_with_iobinding))
        )
    threads = [threading.Thread(target=runner, args=(inputs,)) for inputs in calls for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = [sum(snr_db(wanted, array) > 80 for array in given) for wanted in expected]
    assert counts == [3] * len(calls)


@pytest.fixture
def rtx(streams, sdxl_bundle, tmp_path, monkeypatch):
    """The folder of a bundle in a store, as one of TensorRT for RTX on an A10, and what draws with it."""
    store = tmp_path / "home" / "bundles"
    store.mkdir(parents=True)
    monkeypatch.setenv("LCM_COMPILE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stand_in, "gpu", "NVIDIA A10")
    monkeypatch.setattr(stand_in, "__version__", "1.7.1.116")
    monkeypatch.setattr(gpu, "gpu_here", lambda: (stand_in.gpu, "8.6"))
    monkeypatch.setattr(tensorrt_rtx, "gpu_here", gpu.gpu_here)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in)

    def draw(folder):
        """Loads and closes its engines; how many compiled kernels."""
        bundle = open_bundle(folder)
        stand_in.compiled.clear()
        for stage in bundle.manifest.stages:
            tensorrt_rtx.load(bundle.path(stage.file), stage.contract, A10).close()
        return len(stand_in.compiled)

    return shutil.copytree(sdxl_bundle, store / "a"), draw


def kept(folder):
    return sorted(p.name for p in folder.with_name(f"{folder.name}.cache").glob("*"))


def test_kernels_are_kept_beside_the_bundle_and_travel_with_it(rtx, tmp_path):
    folder, draw = rtx
    assert (draw(folder), draw(folder)) == (STAGES, 0)
    assert all("NVIDIA-A10-1.7.1.116" in name for name in kept(folder)) and len(kept(folder)) == STAGES
    assert not list((tmp_path / "home").rglob("runtime-cache"))
    moved = tmp_path / "other"
    for ending in ("", ".cache"):
        shutil.move(f"{folder}{ending}", f"{moved}{ending}")
    assert draw(moved) == 0


@pytest.mark.parametrize(("name", "value"), [("gpu", "NVIDIA A40"), ("__version__", "1.8.0.1")])
def test_another_gpu_or_version_compiles_its_own(rtx, monkeypatch, name, value):
    folder, draw = rtx
    draw(folder)
    monkeypatch.setattr(stand_in, name, value)
    assert (draw(folder), draw(folder)) == (STAGES, 0)
    assert len(kept(folder)) == 2 * STAGES


def test_kernels_of_another_engine_are_not_read(rtx):
    folder, draw = rtx
    draw(folder)
    (folder / "engines" / "step.onnx").write_bytes((folder / "engines" / "decode.onnx").read_bytes())
    path = folder / "engines" / "step.onnx"
    before = kept(folder)
    assert tensorrt_rtx.kernels_path(stand_in, path, stand_in.gpu).name not in before


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "folder"])
def test_damaged_kernels_are_not_given_to_the_library(rtx, damage, monkeypatch):
    folder, draw = rtx
    draw(folder)
    given = []
    deserialize = stand_in.IRuntimeCache.deserialize
    monkeypatch.setattr(
        stand_in.IRuntimeCache,
        "deserialize",
        lambda self, blob: given.append(blob) or deserialize(self, blob),
    )
    for path in folder.with_name("a.cache").iterdir():
        content = path.read_bytes()
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.unlink()
        if damage == "folder":
            path.mkdir()
        else:
            path.write_bytes({"flipped": flipped, "cut": content[:40], "empty": b""}[damage])
    assert draw(folder) == STAGES and not given
    assert draw(folder) == (STAGES if damage == "folder" else 0)


@pytest.mark.parametrize("wait", [True, False])
def test_kernels_are_kept_after_the_second_picture(rtx, monkeypatch, wait):
    """A server is killed, and then nothing is closed."""
    folder, draw = rtx
    backend = SimpleNamespace(load=tensorrt_rtx.load)
    monkeypatch.setattr(loading, "check_backend", lambda bundle: backend)
    pipeline = loading.load(folder, cuda_graph=False, wait=wait)
    for seed, count in enumerate((0, STAGES, STAGES)):
        pipeline.draw(Request("a red star", seed))
        assert len(kept(folder)) == count
    written = [path.stat().st_mtime_ns for path in sorted(folder.with_name("a.cache").iterdir())]
    assert draw(folder) == 0
    pipeline.close()
    assert [path.stat().st_mtime_ns for path in sorted(folder.with_name("a.cache").iterdir())] == written


def test_where_nothing_can_be_written_kernels_are_compiled_each_time(rtx):
    folder, draw = rtx
    beside = folder.with_name("a.cache")
    beside.write_bytes(b"a file, where the folder would be")  # for root no folder is read-only
    assert (draw(folder), draw(folder)) == (STAGES, STAGES)
    assert beside.is_file()


def test_an_engine_in_no_bundle_leaves_nothing_behind(rtx, tmp_path):
    """As those that `doctor` tries."""
    folder, _ = rtx
    (tmp_path / "some" / "engines").mkdir(parents=True)
    path = shutil.copy(folder / "engines" / "step.onnx", tmp_path / "some" / "engines")
    tensorrt_rtx.load(Path(path), stage_of(open_bundle(folder), "step").contract, A10).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "some"]


def test_they_are_part_of_the_bundle_in_the_list_and_go_with_it(rtx, command):
    folder, draw = rtx
    plain = list_bundles()[0].size
    draw(folder)
    [one] = json.loads(command("bundles", "--json")[1])["bundles"]
    kernels = sum(p.stat().st_size for p in folder.with_name("a.cache").iterdir())
    assert (one["bundle"], one["bytes"]) == (str(folder), plain + kernels)
    (folder.with_name("a.cache") / ".x.kernels.part").touch()  # a process was killed while it wrote
    assert command("bundles", "rm", "a")[0] == 0
    assert list(folder.parent.iterdir()) == []


def test_prune_takes_them_too_and_those_whose_bundle_has_gone(rtx):
    folder, draw = rtx
    shutil.copytree(folder, folder.with_name("b"))
    for name in "ab":
        draw(folder.with_name(name))
    shutil.rmtree(folder)
    prune(1 << 40, pretend=True)
    assert len(list(folder.parent.iterdir())) == 3
    prune(1 << 40)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["b", "b.cache"]
    prune(0)
    assert list(folder.parent.iterdir()) == []


def test_what_else_lies_in_such_a_folder_stays(rtx, command):
    folder, draw = rtx
    draw(folder)
    mine = folder.with_name("a.cache") / "notes.txt"
    mine.write_text("mine")
    command("bundles", "rm", "a")
    assert mine.read_text() == "mine" and kept(folder) == ["notes.txt"]


def test_a_bundle_that_is_built_again_has_none_of_the_old_ones_kernels(rtx, sdxl_bundle):
    """But those that were compiled while its engines were checked, before it got its name."""
    folder, draw = rtx
    draw(folder)
    old = kept(folder)
    (folder.with_name("a.cache") / "step-of-an-older-engine.kernels").touch()
    with publishing(folder) as part:
        shutil.copytree(sdxl_bundle, part, dirs_exist_ok=True)
        data = json.loads((part / MANIFEST).read_text())
        (part / MANIFEST).write_text(json.dumps(data))
        assert draw(part) == STAGES
    assert draw(folder) == 0 and kept(folder) == old
    assert sorted(p.name for p in folder.parent.iterdir()) == ["a", "a.cache"]
