"""A worker that is stopped by SIGSTOP, as one that hangs: the server answers on, and starts another."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time

import httpx
import numpy as np
import pytest
from factories import painting
from test_openai_api import same
from test_queue import SLOW, wait_until

from lcm_compile import load
from lcm_compile.serving import worker_process
from lcm_compile.serving.catalog import open_catalog
from lcm_compile.serving.server import Server, listen
from lcm_compile.serving.service import Service
from lcm_compile.serving.settings import ServerSettings


@pytest.fixture
def start(small, monkeypatch):
    """What starts a server in this process, which takes a worker for hung after 3 s and not 60."""
    monkeypatch.setattr(worker_process, "LOOK_SECONDS", 0.25)
    with contextlib.ExitStack() as stack:

        def run(**settings):
            told = []
            service = Service(open_catalog([f"small={small}"]), ServerSettings(**settings), told.append)
            listening = listen("127.0.0.1", 0)
            server = Server(service)
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.stop)
            stack.callback(go_on, service)
            client = httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=120)
            stack.enter_context(client)
            wait_until(lambda: service.is_ready)
            return service, client, told

        yield run


def go_on(service):
    """Lets stopped workers run: a server that waits for one could not end."""
    for worker in service.workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)


class Asking(threading.Thread):
    """A request that runs beside the test."""

    def __init__(self, client, *words, **options):
        super().__init__()
        self.send = lambda: client.post(*words, **options)
        self.start()

    def run(self):
        self.answer = self.send()

    def get(self):
        self.join()
        return self.answer


def test_a_stopped_worker_holds_up_nobody_and_is_replaced(start, small):
    service, client, told = start()
    [worker] = service.workers
    large = painting(1500, 1500)  # 7 MB, which no pipe takes unread
    file = io.BytesIO()
    large.save(file, "PNG")
    stopped = worker.pid
    os.kill(stopped, signal.SIGSTOP)
    edit = {"files": {"image": file.getvalue()}, "data": {"prompt": "a star", "seed": 2, "size": "64x64"}}
    asking = [
        Asking(client, "/v1/images/edits", **edit),
        Asking(client, "/v1/images/generations", json={"prompt": "a star", "seed": 3}),
    ]
    slowest = 0.0
    while worker.pid == stopped:
        begin = time.monotonic()
        assert client.get("/health", timeout=10).status_code == 200
        slowest = max(slowest, time.monotonic() - begin)
        assert all(one.is_alive() for one in asking)
        time.sleep(0.02)
    assert slowest < 1.5  # of the 3 s for which the worker reads nothing
    with load(small) as pipeline:
        answers = [one.get().json()["data"][0]["b64_json"] for one in asking]
        assert same(answers[0], pipeline("a star", seed=2, image=large)[0])
        assert same(answers[1], pipeline("a star", seed=3)[0])
    assert service.metrics.registry.get_sample_value("lcm_compile_worker_deaths_total") == 1
    assert [line for line in told if "did not answer for 3 s" in line]


def test_of_two_workers_one_draws_for_both_and_a_slow_picture_is_no_hang(start):
    service, client, _ = start(workers=2)
    wait_until(lambda: all(worker.ready for worker in service.workers))
    os.kill(service.workers[0].pid, signal.SIGSTOP)
    asked = [Asking(client, "/v1/images/generations", json={**SLOW, "seed": seed}) for seed in range(3)]
    assert [one.get().status_code for one in asked] == [200] * 3
    wait_until(lambda: all(worker.ready for worker in service.workers))
    assert service.metrics.registry.get_sample_value("lcm_compile_worker_deaths_total") == 1


def test_a_picture_that_stops_every_worker_is_given_up(start):
    service, client, _ = start()
    [worker] = service.workers
    asked = Asking(client, "/v1/images/generations", json=SLOW)
    seen = set()
    for _ in range(2):
        wait_until(lambda: worker.ready and worker.pid not in seen and service.dispatcher.drawing)
        seen.add(worker.pid)
        os.kill(worker.pid, signal.SIGSTOP)
    answer = asked.get()
    assert answer.status_code == 500 and "did not answer" in answer.json()["error"]["message"]


def test_processor_time_is_read():
    begin, own = worker_process.cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - own < 0.1:
        np.sqrt(np.arange(1000))
    assert 0.05 < worker_process.cpu_seconds(os.getpid()) - begin < 1
    assert worker_process.cpu_seconds(1 << 30) == 0
