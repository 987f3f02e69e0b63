"""The application on a real Ray cluster of two nodes on this machine, from the file that serve writes."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import yaml
from PIL import Image

from lcm_compile import load
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.bundles.sizes import further_sizes

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
IDLE = 4  # seconds
KEY = "secret"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def replicas():
    """The process ids of the replicas that draw, by their parents: the nodes."""
    found = {}
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if b"ServeReplica:lcm-compile:Painter" in (path / "cmdline").read_bytes():
                found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def wait_for(number, seconds=120):
    deadline = time.monotonic() + seconds
    while len(replicas()) != number:
        assert time.monotonic() < deadline, replicas()
        time.sleep(0.1)


def pixels(answer):
    text = answer["data"][0]["b64_json"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


@pytest.fixture(scope="module")
def place(small, tmp_path_factory):
    """A URL that has the bundles by their digests, and the paths that were asked for."""
    folder, paths = tmp_path_factory.mktemp("place"), []
    for bundle in (small, *further_sizes(small)):
        shutil.copytree(bundle, folder / open_bundle(bundle).digest)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *values):
            paths.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()


@pytest.fixture(scope="module")
def cluster(small, place, tmp_path_factory):
    """The URL of the application on two nodes, each with a cache folder and room for a replica."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("ray")
    common = {"RAY_USAGE_STATS_ENABLED": "0", "LCM_COMPILE_API_KEY": KEY}
    nodes = [{**common, "LCM_COMPILE_HOME": str(folder / name)} for name in ("first", "second")]
    options = {"object_store_memory": 100 << 20, "resources": {"painter": 1}}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in nodes[0].items():
            patch.setenv(name, value)
        patch.setenv("RAY_ADDRESS", "")
        own = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **options}
        )
        patch.setenv("LCM_COMPILE_HOME", nodes[1]["LCM_COMPILE_HOME"])
        own.add_node(num_cpus=1, **options)
    port = free_port()
    words = [
        "serve",
        f"small={small}",
        "--workers",
        "2",
        "--port",
        port,
        "--api-key",
        KEY,
        "--timeout",
        "120",
    ]
    words += ["--queue", "500", "--ray-from", place[0], "--ray-config", folder / "app.yaml"]
    subprocess.run([sys.executable, "-m", "lcm_compile", *map(str, words)], check=True)
    document = yaml.safe_load((folder / "app.yaml").read_text())
    document["applications"][0]["args"] |= {
        "idle_seconds": IDLE,
        "resources": {"num_cpus": 0, "resources": {"painter": 1}},
    }
    (folder / "app.yaml").write_text(yaml.safe_dump(document))
    serve = [Path(sys.executable).with_name("serve"), "run", "--address", own.address, folder / "app.yaml"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(serve, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[
                -3000:
            ]
            time.sleep(0.3)
        yield url, folder
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        own.shutdown()


@pytest.fixture(scope="module")
def ask(cluster):
    """Asks for a picture of a prompt and a seed; returns the status and the answer."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=cluster[0], headers=headers, timeout=120) as client:

        def one(seed, **fields):
            body = {"prompt": f"star {seed % 5}", "seed": seed, **fields}
            answer = client.post("/v1/images/generations", json=body)
            return answer.status_code, answer.json()

        yield one


@pytest.fixture(scope="module")
def drawn(small):
    """The pipeline's own picture of the same."""
    pipelines = {}

    @functools.cache
    def one(seed):
        pipeline = pipelines.setdefault(0, load(small))
        return np.asarray(pipeline(f"star {seed % 5}", seed=seed)[0])

    yield one
    for pipeline in pipelines.values():
        pipeline.close()


def test_the_first_request_starts_a_replica_and_gets_the_pipelines_picture(ask, drawn):
    wait_for(0)
    start = time.monotonic()
    status, answer = ask(7)
    print(f"from zero replicas: {time.monotonic() - start:.1f} s")
    assert status == 200, answer
    np.testing.assert_array_equal(pixels(answer), drawn(7))
    assert len(replicas()) == 1


def test_the_routes_are_those_of_serve(cluster, ask):
    assert httpx.get(f"{cluster[0]}/v1/models").status_code == 401
    status, answer = ask(1, size="31x31")
    assert status == 400 and "96x64" in answer["error"]["message"]
    status, answer = ask(1, size="96x64")
    assert status == 200 and pixels(answer).shape == (64, 96, 3)
    with openai.OpenAI(base_url=f"{cluster[0]}/v1", api_key=KEY, max_retries=0) as client:
        stream = client.images.generate(
            model="small", prompt="a star", stream=True, partial_images=2, extra_body={"seed": 3, "steps": 4}
        )
        kinds = [event.type for event in stream]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "a star", "seed": 3, "width": 1024, "height": 1024}
    answer = httpx.post(f"{cluster[0]}/sdapi/v1/txt2img", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200 and len(answer.json()["images"]) == 1


def test_a_drawing_that_is_interrupted_leaves_the_replica_free(cluster, ask):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=cluster[0], headers=headers, timeout=60) as client:
        with ThreadPoolExecutor(1) as thread:
            # The largest number of pictures at once, of the most steps: minutes if it were drawn.
            body = {"prompt": "a star", "steps": 8, "batch_size": 10, "sampler_name": "LCM"}
            drawing = thread.submit(client.post, "/sdapi/v1/txt2img", json=body)
            time.sleep(0.15)
            assert client.post("/sdapi/v1/interrupt", json={}).status_code == 200
            assert drawing.result().status_code == 200
        assert ask(5)[0] == 200


def test_a_client_that_goes_takes_no_others_picture_along(cluster, ask):
    def go(seed):
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"prompt": "a star", "seed": seed, "steps": 8, "n": 4}
        with contextlib.suppress(httpx.TimeoutException):
            url = f"{cluster[0]}/v1/images/generations"
            return httpx.post(url, json=body, headers=headers, timeout=0.02 + 0.01 * (seed % 5)).status_code

    with ThreadPoolExecutor(12) as clients:
        gone = [clients.submit(go, seed) for seed in range(30)]
        assert {status for status, _ in clients.map(ask, range(60))} == {200}
    assert None in {one.result() for one in gone}


def test_replicas_that_are_killed_under_load_lose_no_request(ask, drawn):
    killed, nodes, answers = [], set(), []

    def kill():
        while len(killed) < 3:
            time.sleep(2)
            if found := [*replicas()]:
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])

    thread = threading.Thread(target=kill)
    thread.start()
    deadline = time.monotonic() + 120
    with ThreadPoolExecutor(12) as clients:
        while thread.is_alive() or len(answers) < 400 or len(nodes) < 2:
            assert time.monotonic() < deadline, (killed, nodes)
            for seed, (status, answer) in enumerate(clients.map(ask, range(60))):
                assert status == 200, answer
                answers.append((seed, pixels(answer)))
            nodes |= set(replicas().values())
    for seed, picture in answers:
        np.testing.assert_array_equal(picture, drawn(seed))
    print(f"{len(answers)} pictures, and {len(killed)} replicas killed")


def test_each_node_has_fetched_the_bundles_once(cluster, place):
    digests = {path.name for path in (cluster[1] / "first" / "fetched").iterdir()}
    assert digests == {path.name for path in (cluster[1] / "second" / "fetched").iterdir()}
    for digest in digests:
        assert place[1].count(f"/{digest}/manifest.json") == 2


def test_replicas_with_nothing_to_draw_are_ended(ask, drawn):
    assert ask(7)[0] == 200
    wait_for(0)
    np.testing.assert_array_equal(pixels(ask(8)[1]), drawn(8))


@pytest.mark.alone
@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 6, reason="two replicas, the server and Ray need six cores"
)
def test_two_replicas_serve_nearly_twice_as_much_as_one(ask):
    def rate(clients):
        with ThreadPoolExecutor(clients) as threads:
            start = time.monotonic()
            assert {status for status, _ in threads.map(ask, range(200))} == {200}
            return 200 / (time.monotonic() - start)

    wait_for(0)
    ask(1)
    one = rate(1)
    rate(16)  # starts the second
    wait_for(2)
    assert rate(16) >= 1.7 * one
