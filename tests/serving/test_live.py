"""The stream of pictures over a WebSocket."""

from __future__ import annotations

import io
import json
import struct

import numpy as np
import pytest
from factories import painting
from PIL import Image
from websockets.sync.client import connect

from lcm_compile import load


@pytest.fixture
def socket(served):
    with connect(f"ws://127.0.0.1:{served.port}/live") as socket:
        yield socket


def picture(message):
    """The facts and the pixels of an answer."""
    (length,) = struct.unpack(">I", message[:4])
    image = Image.open(io.BytesIO(message[4 + length :]))
    return json.loads(message[4 : 4 + length]), np.asarray(image.convert("RGB"))


def test_a_picture_is_the_pipelines(socket, small):
    socket.send(json.dumps({"id": 5, "prompt": "a star", "seed": 3, "output_format": "png", "size": "96x64"}))
    facts, pixels = picture(socket.recv())
    with load(small, width=96) as pipeline:
        assert (pixels == np.asarray(pipeline("a star", seed=3)[0])).all()
    assert (facts["id"], facts["seed"], facts["size"], facts["model"]) == (5, 3, "96x64", "small")
    assert set(facts["ms"]) >= {"encode", "step", "decode", "total", "waited"}


def test_the_latest_wins(socket):
    for i in range(200):
        socket.send(json.dumps({"id": i, "prompt": f"star {i}", "seed": 1}))
    seen = []
    while not seen or seen[-1] != 199:
        seen.append(picture(socket.recv(timeout=60))[0]["id"])
    assert seen == sorted(set(seen)) and len(seen) < 100


def test_it_begins_at_the_picture_that_was_sent(socket, small):
    data = io.BytesIO()
    painting().save(data, "PNG")
    wanted = {"prompt": "a star", "seed": 3, "image": True, "strength": 0.5, "output_format": "png"}
    socket.send(json.dumps({"id": 1, **wanted}))
    assert "has not been sent" in json.loads(socket.recv())["error"]
    socket.send(data.getvalue())
    socket.send(json.dumps({"id": 2, **wanted}))
    _, pixels = picture(socket.recv())
    with load(small) as pipeline:
        assert (pixels == np.asarray(pipeline("a star", seed=3, image=painting(), strength=0.5)[0])).all()


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ("{", "not JSON"),
        ("[]", "dict"),
        ('{"id": 4}', "prompt"),
        ('{"id": 4, "prompt": "x", "model": "nothing"}', "nothing"),
        ('{"id": 4, "prompt": "x", "size": "1x1"}', "64x64"),
    ],
)
def test_mistakes_are_told_and_the_stream_goes_on(socket, sent, told):
    socket.send(sent)
    assert told in json.loads(socket.recv())["error"]
    socket.send(json.dumps({"id": 9, "prompt": "a star"}))
    assert picture(socket.recv())[0]["id"] == 9


def test_a_client_that_goes_is_forgotten(served):
    with connect(f"ws://127.0.0.1:{served.port}/live") as socket:
        socket.send(json.dumps({"prompt": "a star", "sampler": "ddim", "steps": 500}))
    with connect(f"ws://127.0.0.1:{served.port}/live") as socket:
        socket.send(json.dumps({"id": 2, "prompt": "a star"}))
        assert picture(socket.recv(timeout=60))[0]["id"] == 2
