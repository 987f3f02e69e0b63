"""The settings of a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server. `commands/serve.py` has their defaults in words.

    host, port: The address that is listened on.
    api_key: What clients must send as a bearer token, or as the password of Basic authentication; None asks
        for nothing.
    workers: Processes that draw, each on a device of its own, or on its share of the processor's cores.
    queue: Pictures that may wait; a request that would make it more is refused.
    batch_wait_ms: Milliseconds that a picture waits for others to share an engine's batch with.
    timeout: Seconds that a request may take, with waiting.
    most_images: Pictures of one request.
    most_prompt: Characters of a prompt.
    most_body: Bytes of a request.
    most_bodies: Bytes of all requests together that are read and not answered yet.
    most_pixels: Pixels of a picture that a client sends.
    keep_seconds: How long a picture stays at its URL.
    loras: The folder whose LoRAs clients may put into slots, by name.
    origins: The origins of other web pages that may use the server; "*" is all.
    hosts: Names besides its own by which the server may be called; "*" is all.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    workers: int = 1
    queue: int = 64
    batch_wait_ms: float = 5.0
    timeout: float = 600.0
    most_images: int = 10
    most_prompt: int = 32_000
    most_body: int = 64 << 20
    most_bodies: int = 256 << 20
    most_pixels: int = 1 << 26
    keep_seconds: float = 3600.0
    loras: Path | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether the server listens on this machine's own address alone."""
        return self.host == "localhost" or (
            is_address(self.host) and ipaddress.ip_address(self.host).is_loopback
        )


def is_address(host: str) -> bool:
    """Returns whether a host is an address and not a name."""
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
