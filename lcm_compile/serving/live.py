"""A stream of pictures over a WebSocket, for pages that draw while one types or moves.

The client sends what it wants as JSON in text, as often as it changes; a binary message is the picture that
later requests with `"image": true` begin at. The latest request is drawn next, and those that it overtook
never are. An answer is one binary message: four bytes with the length of the JSON that follows (big-endian),
the JSON, and the file of the picture, which holds its settings. Errors are JSON in text.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from PIL import Image
from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.serving.answers import text_of, validation_text
from lcm_compile.serving.dispatcher import Picture
from lcm_compile.serving.guard import KEY_PROTOCOL
from lcm_compile.serving.jobs import Job, checked, draw
from lcm_compile.serving.openai import Edit
from lcm_compile.serving.service import Service
from lcm_compile.serving.uploads import image_of

PROTOCOL = "lcm-compile"


class Wanted(Edit):
    """What a client wants to see. `id` comes back with its picture."""

    id: int = 0
    image: bool = False


def live_routes(service: Service) -> APIRouter:
    """Returns the route of live pictures."""
    router = APIRouter()

    @router.websocket("/live")
    async def live(socket: WebSocket) -> None:
        offered = socket.scope["subprotocols"]
        named = [one for one in offered if not one.startswith(KEY_PROTOCOL)]
        await socket.accept(PROTOCOL if PROTOCOL in named else None)
        stream = LiveStream(socket, service)
        receiving = asyncio.ensure_future(stream.receive())
        drawing = asyncio.ensure_future(stream.draw())
        try:
            await asyncio.wait({receiving, drawing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (receiving, drawing):
                task.cancel()
            results = await asyncio.gather(receiving, drawing, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect | RuntimeError):
                raise result

    return router


class LiveStream:
    """One client's stream. The next picture is drawn while the last one is made a file and sent."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self._socket = socket
        self._service = service
        self._latest: Wanted | None = None
        self._image: bytes | None = None
        self._opened: tuple[bytes, Image.Image] | None = None
        self._changed = asyncio.Event()
        self._sending: asyncio.Future[None] | None = None

    async def receive(self) -> None:
        """Takes what the client sends until it goes."""
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if (data := message.get("bytes")) is not None:
                self._image = data
                continue
            try:
                wanted = json.loads(message["text"])
                self._latest = Wanted.model_validate(wanted)
            except ValidationError as error:
                number = wanted.get("id", 0) if isinstance(wanted, dict) else 0
                await self._tell(number, validation_text([*error.errors()]))
            except (ValueError, RecursionError):
                await self._tell(0, "the message is not JSON")
            else:
                self._changed.set()

    async def draw(self) -> None:
        """Draws what is wanted, as long as the client is there."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted, data = self._latest, self._image
            assert wanted is not None
            try:
                job = await self._job(wanted, data)
                pictures = await draw(job, self._service.dispatcher, self._service.settings.timeout)
            except LcmCompileError as error:
                self._service.metrics.errors.labels(type(error).__name__).inc()
                await self._tell(wanted.id, self._service.catalog.without_folders(text_of(error)))
                continue
            if self._sending is not None:
                await self._sending
            self._sending = asyncio.ensure_future(self._send(wanted, job, pictures))

    async def _job(self, wanted: Wanted, data: bytes | None) -> Job:
        fields: dict[str, Any] = {}
        asked = await asyncio.to_thread(wanted.asked, self._service.settings.most_pixels)
        bundle = None
        if wanted.image:
            if data is None:
                raise UsageError("the picture to begin at has not been sent")
            if self._opened is None or self._opened[0] is not data:
                most = self._service.settings.most_pixels
                self._opened = data, await asyncio.to_thread(image_of, data, "image", most)
            image = self._opened[1]
            fields = {"image": image, "strength": wanted.strength}
            if asked.size is None:
                model = self._service.catalog.find(asked.model)[0]
                bundle = model.nearest((image.height, image.width))
        asked = replace(asked, count=1, fields={**asked.fields, **fields})
        return await checked(asked, self._service.catalog, self._service.settings, bundle)

    async def _send(self, wanted: Wanted, job: Job, pictures: list[Picture]) -> None:
        form = wanted.output_format or "jpeg"
        [file] = await self._service.files(job, pictures, form, wanted.output_compression)
        ms = pictures[0].future.result()[1]
        facts = {
            "id": wanted.id,
            "seed": pictures[0].request.seed,
            "model": job.model.name,
            "size": f"{job.size[1]}x{job.size[0]}",
            "format": form,
            "ms": {**ms, "waited": pictures[0].waited * 1000},
        }
        head = json.dumps(facts).encode()
        await self._socket.send_bytes(struct.pack(">I", len(head)) + head + file)

    async def _tell(self, number: Any, text: str) -> None:
        answer: Mapping[str, Any] = {"id": number if isinstance(number, int) else 0, "error": text}
        await self._socket.send_text(json.dumps(answer))
