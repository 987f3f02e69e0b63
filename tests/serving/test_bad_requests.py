"""What clients must not send, and how they must not behave: each is told, and the server goes on."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import Served
from PIL import Image
from test_queue import SLOW, idle, post, wait_until
from websockets.sync.client import connect

HUGE = "9" * 400  # more than a float can be
GENERATE, TXT2IMG = "/v1/images/generations", "/sdapi/v1/txt2img"


@pytest.fixture(scope="module")
def bare(small, lora_files, tmp_path_factory):
    """A server of its own, with a LoRA that is none, which ends without a traceback and soon."""
    folder = tmp_path_factory.mktemp("secret")
    (folder / "bad.safetensors").write_bytes(b"no weights")
    with Served(f"small={small}", "--loras", folder) as server:
        yield server
        _, told = server.stop()
    assert "Traceback" not in told


def send(server, path, text):
    return server.client.post(path, content=text, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (GENERATE, '"loras": {"x": null}'),
        (GENERATE, f'"loras": {{"x": {HUGE}}}'),
        (GENERATE, '"loras": [{"name": "x", "weight": {}}]'),
        (GENERATE, '"loras": "' + "[" * 9999 + '"'),
        (GENERATE, '"guidance_scale": NaN'),
        (GENERATE, '"seed": Infinity'),
        (TXT2IMG, f'"width": {HUGE}'),
        (TXT2IMG, f'"enable_hr": true, "hr_resize_x": 1, "width": {HUGE}'),
        (TXT2IMG, f'"batch_size": {HUGE * 10}, "n_iter": {HUGE * 10}'),
        (TXT2IMG, '"cfg_scale": NaN'),
        (TXT2IMG, '"hr_scale": Infinity'),
    ],
)
def test_numbers_that_are_none(bare, path, fields):
    answer = send(bare, path, f'{{"prompt": "a star", {fields}}}')
    assert answer.status_code in (400, 422) and answer.json()["error"]["message"]


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://[x]y"])
def test_an_origin_that_is_no_address(bare, origin):
    assert bare.client.get("/health", headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {"prompt": "a star", "loras": {"bad": 1}}),
        (GENERATE, {"prompt": "a star", "model": "small+bad:nan"}),
        (TXT2IMG, {"prompt": "a star <lora:bad:1>"}),
    ],
)
def test_errors_name_no_folder(bare, path, body):
    answer = post(bare, body, path)
    assert answer.status_code == 400 and "bad.safetensors" in answer.text and "secret" not in answer.text
    with connect(f"ws://127.0.0.1:{bare.port}/live") as live:
        live.send(json.dumps({"prompt": "a star", "loras": {"bad": 1}}))
        assert "secret" not in live.recv()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {"prompt": " " * 31_000 + "x", "prompt_syntax": "webui", "steps": 1}),
        (TXT2IMG, {"prompt": "<lora:" + "1" * 31_000}),
        ("/sdapi/v1/options", {"sd_model_checkpoint": "x" + " " * 100_000 + "x"}),
    ],
    ids=["blanks", "LoRA", "model"],
)
def test_texts_that_are_slow_to_match(bare, path, body):
    start = time.monotonic()
    assert post(bare, body, path).status_code in (200, 404)
    assert time.monotonic() - start < 5  # of 20 and more, in which nobody else was served


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_a_picture_whose_colours_are_multiplied_by_alpha(bare):
    extra = b"\x52\x01\x03\x00\x01\x00\x00\x00"  # TIFF's ExtraSamples: 2 is alpha, 1 is such alpha
    data = saved(Image.new("LA", (8, 8), (9, 9)), "TIFF").replace(extra + b"\x02", extra + b"\x01")
    assert Image.open(io.BytesIO(data)).mode == "La"
    fields = {"prompt": "a star", "strength": "1"}
    answer = bare.client.post("/v1/images/edits", data=fields, files={"image": data})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("declared", ["foo", "utf-16", "utf-8"])
def test_settings_that_can_not_be_read(bare, declared):
    xmp = f"<?xml version='1.0' encoding='{declared}'?><a xmlns='urn:lcm-compile:'><b>".encode()
    data = base64.b64encode(saved(Image.new("RGB", (8, 8)), "JPEG", xmp=xmp)).decode()
    answer = post(bare, {"image": data}, "/sdapi/v1/png-info")
    assert answer.status_code == 200 and answer.json()["items"] == {}


def opened(server, path, body, length=None):
    """A connection on which a request was sent, or the beginning of one with more bytes."""
    raw = socket.create_connection(("127.0.0.1", server.port))
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length or len(body)}"]
    kind = "multipart/form-data; boundary=x" if "edits" in path else "application/json"
    head.append(f"Content-Type: {kind}")
    raw.sendall("\r\n".join([*head, "", ""]).encode() + body)
    return raw


def test_clients_that_go_at_once(bare):
    for _ in range(5):
        opened(bare, "/v1/images/edits", b"--x\r\nCont", 1000).close()
        opened(bare, GENERATE, b"{", 1000).close()
        opened(bare, GENERATE, json.dumps({**SLOW, "n": 4, "stream": True}).encode()).close()
    wait_until(lambda: idle(bare), 5)
    assert post(bare, {"prompt": "a star"}).status_code == 200


def stopped(server):
    """Stops a server, and returns the seconds that it took."""
    start = time.monotonic()
    code, told = server.stop()
    assert code == 0 and "Traceback" not in told and "ERROR" not in told
    return time.monotonic() - start


def test_stopping_waits_for_no_idle_client(small):
    with Served(f"small={small}") as server, connect(f"ws://127.0.0.1:{server.port}/live"):
        assert stopped(server) < 6


@pytest.mark.slow
def test_stopping_waits_not_long_for_a_slow_client(small):
    with Served(f"small={small}") as server:
        uploading = opened(server, GENERATE, b"{", 1000)
        assert httpx.get(server.url + "/health").status_code == 200
        assert 10 < stopped(server) < 20  # of --timeout 600
        uploading.close()


def test_what_can_no_longer_be_drawn_is_told(small, tmp_path):
    bundle = shutil.copytree(small, tmp_path / "moved")
    with Served(f"small={bundle}") as server, ThreadPoolExecutor() as pool:
        asked = [pool.submit(post, server, SLOW) for _ in range(3)]
        wait_until(lambda: server.metric("lcm_compile_drawing_pictures") == 2)
        bundle.rename(tmp_path / "gone")
        os.kill(server.workers()[0], signal.SIGKILL)
        for one in asked:
            answer = one.result()
            assert answer.status_code == 500 and "moved" in answer.json()["error"]["message"]
            assert str(tmp_path) not in answer.text
        assert server.process.wait(20) == 1
