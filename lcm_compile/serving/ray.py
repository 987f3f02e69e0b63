"""The server on more than one machine, as an application of Ray Serve: `serve run` of a configuration.

A replica of `Server` answers HTTP as `lcm-compile serve` does. Its dispatcher's workers are places in flight:
each hands what it is sent to Ray's router, which gives it to a replica of `Painter` that has room, or starts
one. A replica that dies loses no picture: the dispatcher draws it again, as it does with processes.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from ray import serve
from ray.exceptions import RayTaskError
from starlette.types import ASGIApp

from lcm_compile.errors import LcmCompileError
from lcm_compile.serving.app import make_app
from lcm_compile.serving.messages import Cancel, Draw, Drawn, Failed, Progress, Stopped
from lcm_compile.serving.ray_config import KEY_VARIABLE, RayConfig
from lcm_compile.serving.service import Service
from lcm_compile.serving.worker import Worker

# Groups of pictures that a replica has at once: the one that it draws, and the next.
IN_FLIGHT = 2
# Of the pictures in flight, whose mean says how many replicas there should be.
LOOK_BACK_SECONDS = 5
# Requests that a replica of Server has at once: its own queue refuses what is too much.
MOST_REQUESTS = 10_000
PROGRESS_SECONDS = 0.2  # between two messages that tell how much is drawn
logger = logging.getLogger("ray.serve")


class Painter:
    """A replica that draws: it loads the bundles on its device, and draws one group at a time."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        """Fetches and loads the bundles of an application's arguments, as RayConfig has them."""
        catalog = RayConfig.read(args).catalog()
        bundles = [bundle for model in catalog.models.values() for bundle in model.bundles.values()]
        self._folders = {bundle.digest: bundle.folder for bundle in bundles}
        self._answers: asyncio.Queue[object] = asyncio.Queue()
        self._worker = Worker(cast(Any, self))
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        for model in catalog.models.values():
            self._worker.pipeline(model.first.folder)

    def send(self, message: object) -> None:
        """Takes what the worker sends, in the thread that draws."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._answers.put_nowait, message)

    async def draw(self, digest: str, message: Draw) -> AsyncIterator[object]:
        """Draws with the bundle of a digest. Yields the worker's messages; the last one is the result.

        If the caller is gone or cancels it, the drawing ends between two passes of an engine.
        """
        self._loop = asyncio.get_running_loop()
        async with self._turn:
            self._answers = asyncio.Queue()
            own = replace(message, number=next(self._numbers), folder=self._folders[digest])
            drawing = asyncio.ensure_future(asyncio.to_thread(self._worker.draw, own))
            last = time.monotonic()
            try:
                while True:
                    answer = cast(Any, await self._answers.get())
                    if isinstance(answer, Progress):
                        if time.monotonic() - last < PROGRESS_SECONDS:
                            continue
                        last = time.monotonic()
                    yield replace(answer, number=message.number)
                    if isinstance(answer, Drawn | Failed | Stopped):
                        break
            finally:
                self._worker.cancel(own.number)
                await asyncio.shield(drawing)


class RayWorker:
    """A place in flight. All methods are called in the thread of the event loop."""

    ready = True

    def __init__(
        self,
        painter: Any,
        digests: Mapping[Any, str],
        told: Callable[[RayWorker, object], None],
        died: Callable[[RayWorker, str], None],
    ) -> None:
        """Takes a handle of the deployment that draws, and the digest of each bundle by its folder here."""
        self._draw = painter.options(method_name="draw", stream=True)
        self._digests = digests
        self._told = told
        self._died = died
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def send(self, message: object) -> None:
        """Hands pictures to a replica, or takes them back."""
        loop = asyncio.get_running_loop()
        if isinstance(message, Draw):
            # In a context of its own: in that of a client's request Ray would end the call with it, and this
            # picture may be another client's.
            task = loop.create_task(self._drawn(message), context=contextvars.Context())
            self._tasks[message.number] = task
        elif isinstance(message, Cancel) and message.number in self._tasks:
            self._tasks.pop(message.number).cancel()
            loop.call_soon(self._told, self, Stopped(message.number))

    async def _drawn(self, message: Draw) -> None:
        answers = self._draw.remote(self._digests[message.folder], message)
        try:
            async for answer in answers:
                if isinstance(answer, Drawn | Failed | Stopped):
                    self._tasks.pop(message.number, None)
                self._told(self, answer)
        except asyncio.CancelledError:
            answers.cancel()
        except RayTaskError:
            logger.exception("a replica failed")
            self._tasks.pop(message.number, None)
            self._told(self, Failed(message.number, "internal error of a replica", "its log tells more"))
        except Exception as error:
            # All that this worker has is drawn again, so what else it has in flight is taken back: it may be
            # with the same replica, whose one death would count twice.
            if self._tasks.pop(message.number, None) is not None:
                self.stop()
                self._died(self, type(error).__name__)

    def stop(self) -> None:
        """Takes everything back."""
        for task in [*self._tasks.values()]:
            task.cancel()
        self._tasks.clear()

    def kill(self) -> None:
        """Takes everything back, because a drawing that was cancelled does not end."""
        self.stop()
        self._died(self, "it did not answer")


class RayService(Service):
    """The parts of a server whose pictures are drawn by replicas of Painter."""

    def __init__(self, config: RayConfig, painter: Any) -> None:
        """Takes a handle of the deployment that draws. Raises what `RayConfig` does."""
        settings = config.server_settings(os.environ.get(KEY_VARIABLE) or None)
        super().__init__(config.catalog(), settings, logger.info)
        self._painter = painter
        self._most = config.most

    def start(self) -> None:
        """Takes as many workers as there may be replicas."""
        bundles = [b for model in self.catalog.models.values() for b in model.bundles.values()]
        digests = {bundle.folder: bundle.digest for bundle in bundles}
        for _ in range(self._most):
            worker = RayWorker(self._painter, digests, self._take, self._lose)
            self.workers.append(worker)
            self.dispatcher.add(worker)

    def _lose(self, worker: Any, how: str) -> None:
        self.metrics.deaths.inc()
        self.told(f"a replica died ({how}); another one draws what it had")
        self.dispatcher.lose(worker, how)


class Server:
    """A replica that answers HTTP."""

    def __init__(self, args: Mapping[str, Any], painter: Any) -> None:
        """Takes an application's arguments, as RayConfig has them, and a handle of what draws."""
        self._service = RayService(RayConfig.read(args), painter)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_app(self._service)


def app(args: dict[str, Any]) -> Any:
    """Returns the application of arguments as RayConfig has them. Raises UsageError if they are none."""
    try:
        config = RayConfig.read(args)
    except LcmCompileError as error:  # Ray tells the user its text alone
        raise ValueError(f"{error.message} ({error.hint})") from error
    painter = serve.deployment(Painter).options(
        max_ongoing_requests=IN_FLIGHT,
        ray_actor_options=dict(config.resources or {}),
        autoscaling_config={
            "min_replicas": config.least,
            "max_replicas": config.most,
            # More than one picture in flight is one that waits.
            "target_ongoing_requests": 1,
            "look_back_period_s": LOOK_BACK_SECONDS,
            "metrics_interval_s": 1,
            "upscale_delay_s": 2,
            "downscale_delay_s": config.idle_seconds,
            "downscale_to_zero_delay_s": config.idle_seconds,
        },
    )
    server = serve.deployment(serve.ingress()(Server)).options(
        name="Server", num_replicas=1, max_ongoing_requests=MOST_REQUESTS
    )
    return server.bind(args, painter.bind(args))
