"""Capturer with torch's own `torch.cuda.graph` and `torch.cuda.stream`, on a stand-in for what is below them.

The stand-in is a device with streams: work is done at once or, while a stream is captured, kept in the graph.
"""

from __future__ import annotations

import pytest
import torch

from lcm_compile.engines.capture import Capturer


class Device:
    def __init__(self):
        self.default = self.current = Stream(self)
        self.graph = None  # the one that is being captured
        self.done = []  # what was done on which stream, and which stream waited for which

    def work(self, name):
        if self.graph is None:
            self.done.append((name, self.current))
        elif self.current is not self.graph.stream:
            raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")
        else:
            self.graph.work.append((name, self.current))

    def wait(self):
        if self.graph is not None:
            self.graph.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")


class Stream:
    def __init__(self, own):
        self.own, self.device = own, "cuda:0"

    def wait_stream(self, other):
        self.own.done.append((self, "waits for", other))


class Graph:
    def __init__(self, own):
        self.own, self.work, self.broken = own, [], False

    def capture_begin(self, pool, capture_error_mode, **_):
        self.pool, self.mode, self.stream = pool, capture_error_mode, self.own.current
        self.own.graph = self

    def capture_end(self):
        self.own.graph = None
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        assert not self.broken and self.own.graph is None
        self.own.done.extend(self.work)


@pytest.fixture
def gpu(monkeypatch):
    own = Device()
    own.graphs = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(own))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: own.graphs.append(Graph(own)) or own.graphs[-1])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: own.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(own, "current", stream))
    monkeypatch.setattr(torch.cuda, "_get_device_index", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", own.wait)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    return own


def test_what_is_captured_is_done_at_each_launch_and_not_before(gpu):
    capturer, result = Capturer(), object()

    def draw():
        gpu.work("step")
        gpu.work("decode")
        return result

    launch, found = capturer.capture(draw)
    assert found is result and gpu.done == [] and gpu.current is gpu.default
    for count in (1, 2):
        launch()
        assert [name for name, _ in gpu.done] == ["step", "decode"] * count


def test_the_first_calls_are_on_the_stream_that_is_captured_later(gpu):
    """There libraries allocate what they need, in order with what was asked before and after."""
    capturer = Capturer()
    assert capturer.warm_up(lambda: gpu.work("set up") or "done") == "done"
    before, (name, stream), after = gpu.done
    assert name == "set up" and stream is not gpu.default and gpu.current is gpu.default
    assert before == (stream, "waits for", gpu.default) and after == (gpu.default, "waits for", stream)
    capturer.capture(lambda: gpu.work("step"))
    assert gpu.graphs[0].stream is stream


def test_graphs_share_their_memory_and_let_other_threads_use_the_gpu(gpu):
    capturer = Capturer()
    for name in ("step", "decode"):
        capturer.capture(lambda name=name: gpu.work(name))
    first, second = gpu.graphs
    assert first.pool is second.pool and first.stream is second.stream
    assert {graph.mode for graph in gpu.graphs} == {"thread_local"}


def test_a_capture_that_fails_leaves_the_gpu_as_it_was(gpu):
    """Torch itself leaves the capturing stream as the current one."""
    capturer = Capturer()
    with pytest.raises(RuntimeError, match=r"during capture|not permitted"):
        capturer.capture(gpu.wait)
    assert gpu.current is gpu.default
    gpu.work("a picture without graphs")
    assert gpu.done == [("a picture without graphs", gpu.default)]
    launch, _ = capturer.capture(lambda: gpu.work("step"))
    launch()
    assert gpu.done[-1] == ("step", gpu.graphs[-1].stream)
