"""What a server does with many requests, with slow ones, and when a worker dies: no picture is lost."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from conftest import Served
from test_openai_api import pixels

from lcm_compile import load

SLOW = {"prompt": "a star", "sampler": "ddim", "steps": 500, "guidance_scale": 3.0}  # a second or more


@pytest.fixture(scope="module")
def narrow(small, batched):
    """A server with room for four pictures."""
    words = (f"small={small}", f"pairs={batched}", "--queue", 4, "--batch-wait", 200)
    with Served(*words) as server:
        yield server


def post(server, body, path="/v1/images/generations", **options):
    return httpx.post(server.url + path, json=body, timeout=120, **options)


def wait_until(truth, seconds=60):
    end = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < end
        time.sleep(0.02)


def idle(server):
    return server.metric("lcm_compile_drawing_pictures") + server.metric("lcm_compile_queue_pictures") == 0


def test_a_full_queue_says_when_to_come_again(narrow):
    with ThreadPoolExecutor() as pool:
        slow = [pool.submit(post, narrow, {**SLOW, "n": 2}) for _ in range(3)]
        wait_until(lambda: narrow.metric("lcm_compile_queue_pictures") == 4)
        refused = post(narrow, {"prompt": "a star"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        stream = post(narrow, {"prompt": "a star", "stream": True})
        assert stream.status_code == 429
        assert [one.result().status_code for one in slow] == [200] * 3
    assert post(narrow, {"prompt": "a star"}).status_code == 200


def test_who_goes_is_not_drawn_for(narrow):
    body = {**SLOW, "n": 4}
    before = narrow.metric('lcm_compile_pictures_total{model="small"}')
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(narrow.url + "/v1/images/generations", json=body, timeout=0.2)
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.stream(
            "POST", narrow.url + "/v1/images/generations", json={**body, "stream": True}, timeout=0.2
        ) as stream,
    ):
        stream.read()
    wait_until(lambda: idle(narrow))
    assert narrow.metric('lcm_compile_pictures_total{model="small"}') - before <= 4  # of 8


def test_requests_share_an_engines_batch(narrow):
    def calls():
        return narrow.metric('lcm_compile_calls_total{model="pairs"}')

    bodies = [{"model": "pairs", "prompt": prompt, "seed": 5} for prompt in ("a star", "a blue ring")]
    start = time.monotonic()
    alone = post(narrow, bodies[0]).json()["data"][0]["b64_json"]
    assert time.monotonic() - start > 0.2  # it waits so long for another
    before = calls()
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(post, narrow, body) for body in bodies]
        found = [pixels(one.result().json()["data"][0]["b64_json"]) for one in answers]
    assert calls() - before == 1
    assert np.abs(pixels(alone).astype(int) - found[0]).max() <= 1
    assert (found[0] != found[1]).any()


def test_a_request_has_a_longest_time(small):
    with Served(f"small={small}", "--timeout", 1) as server:
        answer = post(server, {**SLOW, "n": 8})
        assert answer.status_code == 504 and "1 s" in answer.json()["error"]["message"]
        wait_until(lambda: idle(server))
        assert post(server, {"prompt": "a star"}).status_code == 200


def test_a_worker_that_dies_loses_nothing(small):
    with Served(f"small={small}") as server, ThreadPoolExecutor(8) as pool, load(small) as pipeline:
        slow = pool.submit(post, server, {**SLOW, "seed": 3})
        asked = [pool.submit(post, server, {"prompt": "a star", "seed": seed}) for seed in range(16)]
        wait_until(lambda: server.metric("lcm_compile_drawing_pictures") == 2)
        [worker] = server.workers()
        os.kill(worker, signal.SIGKILL)
        assert slow.result().status_code == 200
        for seed, one in enumerate(asked):
            text = one.result().json()["data"][0]["b64_json"]
            assert (pixels(text) == np.asarray(pipeline("a star", seed=seed)[0])).all()
        assert server.metric("lcm_compile_worker_deaths_total") == 1
        code, told = server.stop()
    assert code == 0 and told.count("a worker died") == 1


def test_a_picture_that_kills_every_worker_is_given_up(small):
    with Served(f"small={small}") as server, ThreadPoolExecutor() as pool:
        slow = pool.submit(post, server, SLOW)
        for _ in range(2):
            wait_until(lambda: server.metric("lcm_compile_drawing_pictures") > 0 and server.workers())
            wait_until(lambda: server.client.get("/ready").status_code == 200)
            [worker] = server.workers()
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda worker=worker: server.workers() not in ([], [worker]))
        answer = slow.result()
        assert answer.status_code == 500 and "ended 2 times" in answer.json()["error"]["message"]
        wait_until(lambda: server.client.get("/ready").status_code == 200)
        assert post(server, {"prompt": "a star"}).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_draws_what_was_asked_for(small, number):
    with Served(f"small={small}") as server, ThreadPoolExecutor() as pool:
        slow = [pool.submit(post, server, SLOW) for _ in range(2)]
        wait_until(lambda: server.metric("lcm_compile_drawing_pictures") == 2)
        workers = server.workers()
        code, _ = server.stop(number)
        assert code == 0
        assert [one.result().status_code for one in slow] == [200, 200]
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)  # noqa: PTH110


def test_a_dead_server_leaves_no_worker(small):
    with Served(f"small={small}") as server:
        [worker] = server.workers()
        server.process.kill()
        server.process.communicate()
    wait_until(lambda: not os.path.exists(f"/proc/{worker}"), 10)  # noqa: PTH110


def test_progress_and_interrupt_are_the_clients_own(narrow):
    with ThreadPoolExecutor() as pool:
        body = {"prompt": "a star", "sampler_name": "TCD", "steps": 8, "batch_size": 4}
        shares = []
        asked = pool.submit(post, narrow, {**body, "cfg_scale": 1.9}, "/sdapi/v1/txt2img")
        while not asked.done():
            shares.append(narrow.client.get("/sdapi/v1/progress").json()["progress"])
        assert len(asked.result().json()["images"]) == 4
        assert shares == sorted(shares) or shares[-1] == 0
        slow = pool.submit(post, narrow, {**SLOW, "n": 2})  # of the other API
        asked = pool.submit(post, narrow, body, "/sdapi/v1/txt2img")
        wait_until(lambda: narrow.client.get("/sdapi/v1/progress").json()["state"]["job_count"] == 1)
        narrow.client.post("/sdapi/v1/interrupt")
        assert asked.result().json()["images"] == []
        assert len(slow.result().json()["data"]) == 2


def test_what_can_not_be_served_is_told_at_once(refused, small, tmp_path, served):
    refused(1, "there is no bundle", "serve", tmp_path / "nothing")
    refused(2, "served as small", "serve", f"small={small}", f"small={small}")
    refused(2, "is no folder", "serve", small, "--loras", tmp_path / "nothing")
    refused(1, "can't be listened on", "serve", small, "--port", served.port)
