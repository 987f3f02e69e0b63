"""Who may use a server: keys, names, other web pages, and sizes of requests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import time

import pytest
from conftest import Served
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from lcm_compile.serving import guard

KEY = "right-kéy"
BODY = json.dumps({"prompt": "a star", "steps": 1}).encode()


@pytest.fixture(scope="module")
def guarded(small):
    """A server with a key that pages of one other origin may use."""
    words = ("--allow-origin", "https://friend.example", "--allow-host", "pictures.example")
    with Served(f"small={small}", *words, env={"LCM_COMPILE_API_KEY": KEY}) as server:
        yield server


def bearer(key):
    return {"authorization": f"Bearer {key}".encode()}


def basic(key):
    return {"authorization": "Basic " + base64.b64encode(f"user:{key}".encode()).decode()}


@pytest.mark.parametrize("path", ["/v1/models", "/sdapi/v1/options", "/metrics"])
def test_everything_needs_the_key(guarded, path):
    get = guarded.client.get
    for headers in ({}, bearer("wrong"), basic(""), basic("wrong"), {"authorization": "Basic §".encode()}):
        answer = get(path, headers=headers)
        assert answer.status_code == 401 and "key" in answer.json()["error"]["message"]
    for headers in (bearer(KEY), basic(KEY)):
        assert get(path, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_none(guarded, path):
    assert guarded.client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("10.1.2.3:8000", 200),
        ("pictures.example", 200),
        ("evil.example:{port}", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_the_server_answers_to_its_own_names_alone(guarded, host, status):
    headers = {"host": host.format(port=guarded.port), **bearer(KEY)}
    assert guarded.client.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:{port}", 200),
        ("https://friend.example", 200),
        ("https://evil.example", 403),
        ("http://127.0.0.1:1", 403),
        ("https://friend.example.evil.example", 403),
        ("null", 403),
    ],
)
def test_pages_of_other_origins_are_refused(guarded, origin, status):
    headers = {"origin": origin.format(port=guarded.port), **bearer(KEY)}
    answer = guarded.client.post("/sdapi/v1/interrupt", headers=headers)
    assert answer.status_code == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if "friend.example" in origin and status == 200 else None)


def test_an_allowed_page_can_read_why_it_is_refused(guarded):
    """Browsers hide an answer without this header from the page, which then could not ask for the key."""
    answer = guarded.client.get("/v1/models", headers={"origin": "https://friend.example"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"


def test_a_browser_may_ask_before(guarded):
    headers = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    path = "/v1/images/generations"
    friend = guarded.client.options(path, headers={"origin": "https://friend.example", **headers})
    assert friend.status_code == 204 and friend.headers["access-control-allow-headers"] == "authorization"
    other = guarded.client.options(path, headers={"origin": "https://evil.example", **headers})
    assert other.status_code == 403 and "access-control-allow-origin" not in other.headers


def test_a_picture_of_another_page_is_not_loaded(guarded):
    headers = {"sec-fetch-site": "cross-site", **bearer(KEY)}
    assert guarded.client.get("/v1/models", headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"origin": "http://127.0.0.1:{port}"}, True),
        ({}, True),
        ({"origin": "https://evil.example"}, False),
        ({"host": "evil.example"}, False),
    ],
)
@pytest.mark.parametrize("key", [KEY, "wrong", None])
def test_a_websocket_is_guarded_too(guarded, headers, allowed, key):
    own = {name: value.format(port=guarded.port) for name, value in headers.items() if name != "host"}
    protocols = ["lcm-compile"] + ([f"lcm-compile.key.{key.encode().hex()}"] if key else [])
    url = f"ws://{headers.get('host', '127.0.0.1')}:{guarded.port}/live"

    def open_socket():
        own_address = socket.create_connection(("127.0.0.1", guarded.port))
        with connect(url, additional_headers=own, subprotocols=protocols, sock=own_address) as opened:
            opened.send(json.dumps({"id": 3, "prompt": "a star", "seed": 1}))
            return opened.recv()

    if allowed and key == KEY:
        assert b'"id": 3' in open_socket()
    else:
        with pytest.raises(InvalidStatus):
            open_socket()


def test_a_request_has_a_largest_size(guarded):
    headers = {"content-type": "application/json", **bearer(KEY)}
    most = 64 << 20
    with socket.create_connection(("127.0.0.1", guarded.port)) as raw:
        lines = ["POST /v1/images/generations HTTP/1.1", "Host: localhost", f"Content-Length: {most + 1}"]
        lines.append(f"Authorization: Bearer {KEY}")
        raw.sendall("\r\n".join([*lines, "", "{"]).encode())
        assert b" 413 " in raw.recv(100)

    def endless():
        for _ in range(66):
            yield b" " * (1 << 20)

    answer = guarded.client.post("/v1/images/generations", content=endless(), headers=headers)
    assert answer.status_code == 413


@contextlib.contextmanager
def begun(server, size, *, announced=None):
    """A connection that has sent so many bytes of a request, which is answered when it has sent BODY too."""
    length = size + len(BODY) if announced is None else announced
    lines = ["POST /v1/images/generations HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    lines += [f"Authorization: Bearer {KEY}", "Content-Type: application/json", "", ""]
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
        raw.sendall("\r\n".join(lines).encode() + b" " * size)
        yield raw


def wait_for_room(server, size, status):
    """Waits until a request of so many bytes gets an answer of this status, and returns it."""
    end = time.monotonic() + 60
    headers = {"content-type": "application/json", **bearer(KEY)}
    while True:
        answer = server.client.post("/v1/images/generations", content=b" " * size, headers=headers)
        if answer.status_code == status:
            return answer
        assert time.monotonic() < end, answer.status_code
        time.sleep(0.1)


def test_all_requests_together_have_a_largest_size(guarded):
    """256 MB, of what has come and is not answered: a request that is too much is told to come again."""
    mib = 1 << 20
    small, large, no_json = 2 * mib, 16 * mib, 400
    with contextlib.ExitStack() as stack:
        for _ in range(10):  # they have announced much, and sent nothing
            stack.enter_context(begun(guarded, 0, announced=60 * mib))
        assert wait_for_room(guarded, large, no_json)
        first, *_ = [stack.enter_context(begun(guarded, 62 * mib)) for _ in range(4)]
        refused = wait_for_room(guarded, large, 503)
        assert int(refused.headers["retry-after"]) >= 1 and "later" in refused.json()["error"]["message"]

        def unannounced():
            for _ in range(16):
                yield b" " * mib

        headers = {"content-type": "application/json", **bearer(KEY)}
        answer = guarded.client.post("/v1/images/generations", content=unannounced(), headers=headers)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        url = f"ws://127.0.0.1:{guarded.port}/live"
        protocols = [f"lcm-compile.key.{KEY.encode().hex()}"]
        with connect(url, subprotocols=["lcm-compile", *protocols], max_size=None) as live:
            live.send(b" " * large)
            with pytest.raises(ConnectionClosed, match="1013"):
                live.recv()
        assert wait_for_room(guarded, small, no_json)
        # Those that were let in are served, and leave their room to others.
        first.sendall(BODY)
        assert b" 200 " in first.recv(100)
        assert wait_for_room(guarded, large, no_json)
        assert guarded.client.get("/health").status_code == 200
    assert wait_for_room(guarded, 60 * mib, no_json)


def test_the_address_is_local_or_warned_of(small):
    with Served(f"small={small}", "--host", "0.0.0.0") as server:
        code, told = server.stop()
    assert code == 0 and "warning: anyone who reaches 0.0.0.0 may draw here" in told


def test_a_body_that_comes_too_slowly_is_given_up(monkeypatch):
    """In the time that a request has; what comes after it, the client's end, may take as long as it likes."""
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    messages = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def slow():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(0.4)
        return {"type": "http.disconnect"}

    async def read(first):
        messages[:] = [{"type": "http.request", "body": b"{", "more_body": first}]
        reader = guard.LimitedReader(slow, 10, guard.Room(10))
        return [(await reader())["type"] for _ in range(2)]

    with pytest.raises(guard.BodyTooSlow) as raised:
        asyncio.run(read(first=True))
    assert raised.value.status_code == 408
    assert asyncio.run(read(first=False)) == ["http.request", "http.disconnect"]
