"""Who may use a server: the key, the names it is called by, other web pages, and how much it reads.

A browser sends requests for any web page that its user looks at, to local addresses too. Those of other
origins are refused, and so are names that are not the server's: a page could have its own name point here
(DNS rebinding).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import socket
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lcm_compile.serving.settings import ServerSettings, is_address

# What needs no key: whether the server is up, and the page, which holds no secret. A kept picture's name is
# its key.
OPEN = ("/health", "/ready", "/", "/favicon.ico")
OPEN_FOLDERS = ("/page/", "/files/", "/docs")
KEY_PROTOCOL = "lcm-compile.key."  # before the key, as a subprotocol of a WebSocket: browsers send no header
BODY_SECONDS = 120.0  # in which a request must have come whole
TOO_LARGE = "the request is larger than this server reads"
TOO_MUCH = "the requests that are being answered are all that this server holds at once; send it again later"
RETRY_SECONDS = 5  # after which a request that found no room should come again


class Guard:
    """ASGI middleware that refuses what the settings do not allow, before anything else reads it."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._room = Room(settings.most_bodies)
        self._names = {"localhost", socket.gethostname().lower(), *(host.lower() for host in settings.hosts)}
        if not is_address(settings.host):
            self._names.add(settings.host.lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a request on, or answers it with the reason why not."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin is not None and self._allows(origin)

        async def send_allowed(message: Message) -> None:
            if allowed and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *allowing(headers)]
            await send(message)

        if refusal := self._refusal(scope, headers, allowed):
            await refuse(scope, receive, send_allowed, *refusal)
            return
        if scope["type"] == "websocket":
            messages = LimitedMessages(receive, send, self._room)
            try:
                await self._app(scope, messages, send)
            finally:
                self._room.give(messages.held)
            return
        if allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await answer_preflight(send, headers)
            return
        reader = LimitedReader(receive, self._settings.most_body, self._room)
        try:
            await self._app(scope, reader, send_allowed)
        finally:
            self._room.give(reader.held)

    def _allows(self, origin: str) -> bool:
        return origin in self._settings.origins or "*" in self._settings.origins

    def _refusal(self, scope: Scope, headers: Headers, allowed: bool) -> tuple[int, str] | None:
        """Returns the status and the reason with which a request is refused, or None."""
        host = headers.get("host", "")
        if "*" not in self._settings.hosts and not self._is_own(host):
            return 421, f"this server is not called {shown(host)}; serve --allow-host allows another name"
        if (origin := headers.get("origin")) is not None and not allowed and not is_same(origin, host):
            return 403, f"pages of {shown(origin)} may not use this server; serve --allow-origin allows them"
        if headers.get("sec-fetch-site") == "cross-site" and origin is None and not is_open(scope["path"]):
            return 403, "other pages may not use this server; serve --allow-origin allows them"
        if self._settings.api_key is not None and not is_open(scope["path"]):
            is_preflight = scope["type"] == "http" and scope["method"] == "OPTIONS" and allowed
            if not is_preflight and not self._has_key(scope, headers):
                return 401, "the API key is missing or wrong"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self._settings.most_body:
            return 413, TOO_LARGE
        if int(length) > self._room.left:
            return 503, TOO_MUCH
        return None

    def _is_own(self, host: str) -> bool:
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        return is_address(name) or name.lower() in self._names

    def _has_key(self, scope: Scope, headers: Headers) -> bool:
        """Returns whether the key was sent: compared in a time that tells nothing of it."""
        assert self._settings.api_key is not None
        own = self._settings.api_key.encode()
        return any(hmac.compare_digest(own, given) for given in keys_in(scope, headers))


def keys_in(scope: Scope, headers: Headers) -> Iterable[bytes]:
    """Yields what a request has as its key: a bearer token, a password, or a WebSocket's subprotocol."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        yield value.strip().encode("latin-1")  # as headers are read
    elif kind.lower() == "basic":
        with contextlib.suppress(binascii.Error, ValueError):
            yield base64.b64decode(value, validate=True).partition(b":")[2]
    for protocol in scope.get("subprotocols", ()):
        if protocol.startswith(KEY_PROTOCOL):
            yield bytes.fromhex(text) if is_hex(text := protocol.removeprefix(KEY_PROTOCOL)) else b""


def is_hex(text: str) -> bool:
    """Returns whether a text is the hexadecimal form of bytes."""
    return len(text) % 2 == 0 and all(letter in "0123456789abcdef" for letter in text)


def is_open(path: str) -> bool:
    """Returns whether a path needs no key."""
    return path in OPEN or path.startswith(OPEN_FOLDERS)


def is_same(origin: str, host: str) -> bool:
    """Returns whether a page's origin is the server itself, by the name that it was called by."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:  # it is no address
        return False


def shown(text: str) -> str:
    """Returns a client's text as a message may show it."""
    return ascii(text[:100])


def allowing(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Returns the headers that let a page of another origin read an answer."""
    return [(b"access-control-allow-origin", headers["origin"].encode("latin-1")), (b"vary", b"Origin")]


async def answer_preflight(send: Send, headers: Headers) -> None:
    """Tells a browser that a page of another origin may send what it asks for."""
    wanted = headers.get("access-control-request-headers", "")
    more = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", wanted.encode("latin-1")),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": [*allowing(headers), *more]})
    await send({"type": "http.response.body"})


async def refuse(scope: Scope, receive: Receive, send: Send, status: int, text: str) -> None:
    """Answers a request with an error."""
    if scope["type"] == "websocket":
        await receive()  # the attempt to connect
        await send({"type": "websocket.close", "code": 1008, "reason": text[:120]})
        return
    headers = [(b"content-type", b"application/json")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"%d" % RETRY_SECONDS))
    body = json.dumps(error_body(text, status)).encode()
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(text: str, status: int, code: str | None = None) -> Mapping[str, object]:
    """Returns an error as OpenAI's clients read it, and as A1111's do, which look for `detail`."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": code}, "detail": text}


class BodyTooLarge(HTTPException):
    """A request has more bytes than the server reads."""

    def __init__(self) -> None:
        super().__init__(413, TOO_LARGE)


class NoRoom(HTTPException):
    """The server holds as many bytes of requests as it does at once."""

    def __init__(self) -> None:
        super().__init__(503, TOO_MUCH, {"Retry-After": str(RETRY_SECONDS)})


class BodyTooSlow(HTTPException):
    """A request has not come whole in the time that it has."""

    def __init__(self) -> None:
        super().__init__(408, f"the request did not come whole within {BODY_SECONDS:g} s")


class Room:
    """The bytes of requests that a server holds at once: those that have come and are not answered yet.

    What has not come takes no room, so that who only announces much keeps nobody out.
    """

    def __init__(self, most: int) -> None:
        self.left = most

    def take(self, count: int) -> None:
        """Takes room for so many bytes. Raises NoRoom if there is none."""
        if count > self.left:
            raise NoRoom
        self.left -= count

    def give(self, count: int) -> None:
        """Gives room back."""
        self.left += count


class LimitedReader:
    """Counts what is read of a request, and takes room for it, of which it `held` so many bytes.

    Raises BodyTooLarge above a number of bytes, NoRoom, and BodyTooSlow.
    """

    def __init__(self, receive: Receive, most: int, room: Room) -> None:
        self._receive = receive
        self._left = most
        self._room = room
        self.held = 0
        self._deadline: float | None = asyncio.get_running_loop().time() + BODY_SECONDS

    async def __call__(self) -> Message:
        """Returns the next message of the client. After the body that is its end, which may take long."""
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow from None
        if not message.get("more_body", False):
            self._deadline = None
        count = len(message.get("body", b""))
        self._left -= count
        if self._left < 0:
            raise BodyTooLarge
        self._room.take(count)
        self.held += count
        return message


class LimitedMessages:
    """Takes room for the last picture that a WebSocket's client has sent. Closes it if there is none."""

    def __init__(self, receive: Receive, send: Send, room: Room) -> None:
        self._receive = receive
        self._send = send
        self._room = room
        self.held = 0

    async def __call__(self) -> Message:
        """Returns the next message of the client."""
        message = await self._receive()
        if (data := message.get("bytes")) is not None:
            self._room.give(self.held)
            self.held = 0
            try:
                self._room.take(len(data))
            except NoRoom:
                await self._send({"type": "websocket.close", "code": 1013, "reason": TOO_MUCH[:120]})
                return {"type": "websocket.disconnect", "code": 1013}
            self.held = len(data)
        return message
