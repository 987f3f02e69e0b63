"""Runs a server until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from urllib.parse import quote

import uvicorn

from lcm_compile.errors import LcmCompileError
from lcm_compile.serving.app import make_app
from lcm_compile.serving.catalog import Catalog
from lcm_compile.serving.service import Service
from lcm_compile.serving.settings import ServerSettings

SLOW = 10.0  # seconds that a client gets to send a request or read an answer when the server stops


def serve(catalog: Catalog, settings: ServerSettings, told: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C, and then ends when what it was asked for is drawn, or at a second one.

    `told` is called with lines for whoever started it. Raises LcmCompileError if the address is taken, or if
    the models can't be loaded.
    """
    service = Service(catalog, settings, told)
    listening = listen(settings.host, settings.port)
    told(f"serving at {page_address(settings, listening.getsockname()[1])}")
    Server(service).run([listening])
    if service.failure is not None:
        raise service.failure


def page_address(settings: ServerSettings, port: int) -> str:
    """Returns the address of the page, with the key in the part that browsers send to no server."""
    host = settings.host.strip("[]")
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    key = f"#key={quote(settings.api_key, safe='')}" if settings.api_key is not None else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{key}"


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound to an address. Raises LcmCompileError if it can't be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(found[0], socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(found[4])
    except OSError as error:
        why = error.strerror or error
        raise LcmCompileError(
            f"{host} port {port} can't be listened on: {why}", "give another --port"
        ) from error
    return bound


class Server(uvicorn.Server):
    """uvicorn's server of one service, which ends with success when it is told to stop."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                make_app(service),
                access_log=False,
                log_level="warning",
                ws_max_size=settings.most_body,
                timeout_graceful_shutdown=int(settings.timeout) + 1,
                server_header=False,
            )
        )
        self._service = service
        service.on_failure = self.stop

    def stop(self) -> None:
        """Stops the server when it has answered what it was asked."""
        self._service.stopping = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends when what was asked for is answered, or its clients are too slow to send or read it."""
        watching = asyncio.ensure_future(self._drop_slow_clients())
        try:
            await super().shutdown(sockets)
        finally:
            watching.cancel()

    async def _drop_slow_clients(self) -> None:
        """Closes the connections that are left when nothing has been drawn for some seconds."""
        idle = 0.0
        while idle < SLOW:
            await asyncio.sleep(0.1)
            idle = 0.0 if self._service.dispatcher.is_busy else idle + 0.1
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops at a signal, and at once at a second one. uvicorn's own would raise it again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def take(number: int, frame: FrameType | None) -> None:
            if self.should_exit:
                self.force_exit = True
            else:
                self._service.told("stopping: what was asked for is drawn first")
            self.stop()

        before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
