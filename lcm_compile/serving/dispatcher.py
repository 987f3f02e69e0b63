"""The queue of pictures, and who draws which: the part of a server that loses none."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.pipeline.request import Request, drawn_together
from lcm_compile.serving.messages import Cancel, Draw, Drawn, Failed, Preview, Progress, Ready, Stopped

TRIES = 2  # of a picture whose worker dies while it draws it
# Seconds that a worker gets to stop drawing: it does so between two passes, which may be slow.
PATIENCE = 120.0
# Groups that a worker has at once: the one that it draws, and the next, so that it need not wait for it.
GROUPS = 2


class Link(Protocol):
    """What a dispatcher needs of a worker."""

    @property
    def ready(self) -> bool:
        """Whether it can draw now."""

    def send(self, message: object) -> None:
        """Sends it Draw or Cancel. What it answers comes to `take`, and its death to `lose`."""

    def stop(self) -> None:
        """Ends it."""

    def kill(self) -> None:
        """Ends it at once, because it does not answer; that is a death."""


class QueueFull(LcmCompileError):
    """There is no room for a request. `seconds` is when there should be."""

    def __init__(self, pictures: int, seconds: float) -> None:
        super().__init__(f"{pictures} pictures are waiting already", f"try again in {seconds:.0f} s")
        self.seconds = seconds


class WorkerDied(LcmCompileError):
    """A picture's worker died each time that it drew it."""


@dataclass(eq=False)
class Picture:
    """A picture to draw: a request of one picture, for a bundle.

    `future` gets (pixels (height, width, 3), milliseconds by stage). `previews` are the steps after which
    `show` is called with (step, pixels) of what is foreseen. `share` is the part of it that is drawn.
    """

    bundle: EngineBundle
    request: Request
    previews: tuple[int, ...] = ()
    show: Callable[[int, np.ndarray], None] = lambda step, pixels: None
    future: asyncio.Future[tuple[np.ndarray, dict[str, Any]]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    put: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    share: float = 0.0
    tries: int = 0

    def __post_init__(self) -> None:
        self.kind = (self.bundle.folder, self.previews, drawn_together(self.request))

    @property
    def batch(self) -> int:
        """How many pictures a call of the bundle's engines draws."""
        return self.bundle.manifest.pipeline.shape.batch


@dataclass(eq=False)
class Group:
    """Pictures that a worker draws in one call of the engines."""

    number: int
    pictures: list[Picture]
    is_first: bool = False  # whether it is drawn, or waits behind another
    is_cancelled: bool = False


class Dispatcher:
    """Gives the pictures that wait to workers, in the order in which they came.

    Pictures that engines can draw in one call are drawn together, if they come within `batch_wait` seconds.
    When a worker dies, what it was drawing is drawn once more, before all others. All methods are called in
    the thread of the event loop.
    """

    def __init__(self, most: int, batch_wait: float) -> None:
        self._most = most
        self._batch_wait = batch_wait
        self._waiting: deque[Picture] = deque()
        self._groups: dict[Link, list[Group]] = {}
        self._numbers = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._failure: LcmCompileError | None = None  # why nobody will draw
        self._seconds = 1.0  # of a picture, as a moving mean
        # Called with the pictures of each call of the engines.
        self.watch: Callable[[Sequence[Picture]], None] = lambda pictures: None

    def add(self, worker: Link) -> None:
        """Takes a worker, which may not be ready yet."""
        self._groups[worker] = []

    @property
    def waiting(self) -> int:
        """The number of pictures that no worker has."""
        return len(self._waiting)

    @property
    def drawing(self) -> int:
        """The number of pictures that workers have."""
        return sum(len(group.pictures) for groups in self._groups.values() for group in groups)

    @property
    def is_busy(self) -> bool:
        """Whether any picture waits or is drawn."""
        return self.waiting + self.drawing > 0

    def put(self, pictures: Sequence[Picture]) -> None:
        """Puts all of these into the queue. Raises QueueFull if there is no room, or what `fail` was told."""
        if self._failure is not None:
            raise LcmCompileError(self._failure.message, self._failure.hint)
        if pictures and len(self._waiting) + len(pictures) > self._most:
            workers = max(1, sum(worker.ready for worker in self._groups))
            raise QueueFull(len(self._waiting), max(1.0, len(self._waiting) * self._seconds / workers))
        self._waiting.extend(pictures)
        self._give()

    def fail(self, error: LcmCompileError) -> None:
        """Gives up what waits, and what is put from now on: nobody will draw it."""
        self._failure = error
        for picture in self._waiting:
            picture.future.set_exception(LcmCompileError(error.message, error.hint))
        self._waiting.clear()

    def cancel(self, pictures: Sequence[Picture]) -> None:
        """Takes those that are not drawn out of the queue, and stops workers that draw for nobody."""
        if all(picture.future.done() and not picture.future.cancelled() for picture in pictures):
            return
        for picture in pictures:
            picture.future.cancel()  # it may be so already, by who waited for it
        self._waiting = deque(picture for picture in self._waiting if not picture.future.done())
        for worker, groups in self._groups.items():
            for group in groups:
                if not group.is_cancelled and all(picture.future.done() for picture in group.pictures):
                    group.is_cancelled = True
                    worker.send(Cancel(group.number))
                    if group.is_first:
                        loop = asyncio.get_running_loop()
                        loop.call_later(PATIENCE, self._kill_if_it_hangs, worker, group)

    def _kill_if_it_hangs(self, worker: Link, group: Group) -> None:
        if group in self._groups[worker]:
            worker.kill()

    def _give(self) -> None:
        """Gives pictures to workers that have room."""
        for depth in range(GROUPS):
            for worker, groups in self._groups.items():
                while worker.ready and len(groups) <= depth and (some := self._next(alone=not groups)):
                    group = Group(next(self._numbers), some)
                    groups.append(group)
                    self._begin(groups)
                    first = some[0]
                    requests = tuple(picture.request for picture in some)
                    worker.send(Draw(group.number, first.bundle.folder, requests, first.previews))

    def _begin(self, groups: list[Group]) -> None:
        """Marks the first group as the one that is drawn."""
        if groups and not groups[0].is_first:
            groups[0].is_first = True
            now = time.monotonic()
            for picture in groups[0].pictures:
                picture.waited = now - picture.put

    def _next(self, alone: bool) -> list[Picture]:
        """Takes the next pictures for one call of the engines out of the queue, or none if more may come.

        A worker that has nothing to draw waits for the first picture's time to pass; one that draws takes
        only what fills the engines.
        """
        if not self._waiting:
            return []
        first = self._waiting[0]
        some = list(itertools.islice((p for p in self._waiting if p.kind == first.kind), first.batch))
        if len(some) < first.batch:
            if not alone:
                return []
            left = first.put + self._batch_wait - time.monotonic()
            if left > 0:
                self._give_in(left)
                return []
        taken = set(some)
        self._waiting = deque(picture for picture in self._waiting if picture not in taken)
        return some

    def _give_in(self, seconds: float) -> None:
        if self._timer is None or self._timer.cancelled():

            def give() -> None:
                self._timer = None
                self._give()

            self._timer = asyncio.get_running_loop().call_later(seconds, give)

    def take(self, worker: Link, message: object) -> None:
        """Takes a message of a worker."""
        groups = self._groups[worker]
        if isinstance(message, Ready):
            self._give()
        elif isinstance(message, Progress | Preview | Drawn | Failed | Stopped):
            group = next((one for one in groups if one.number == message.number), None)
            if group is None:
                return
            if isinstance(message, Progress):
                for picture in group.pictures:
                    picture.share = message.done / message.total
                return
            if isinstance(message, Preview):
                for picture, pixels in zip(group.pictures, message.pictures, strict=True):
                    if not picture.future.done():
                        picture.show(message.step, pixels)
                return
            groups.remove(group)
            self._begin(groups)
            self._give()  # before anything else, because the worker waits
            self._end(group, message)

    def _end(self, group: Group, message: Drawn | Failed | Stopped) -> None:
        """Gives a group's pictures their result."""
        if isinstance(message, Stopped):
            return  # all of them were cancelled
        for i, picture in enumerate(group.pictures):
            if picture.future.done():
                continue
            if isinstance(message, Drawn):
                picture.share = 1.0
                seconds = float(message.ms["total"]) / 1000 / len(group.pictures)
                self._seconds += 0.1 * (seconds - self._seconds)
                picture.future.set_result((message.pictures[i], {**message.ms}))
            else:
                kind = UsageError if message.asked_wrong else LcmCompileError
                picture.future.set_exception(kind(message.message, message.hint))
        drawn = [picture for picture in group.pictures if not picture.future.cancelled()]
        if isinstance(message, Drawn) and drawn:
            self.watch(drawn)

    def lose(self, worker: Link, how: str) -> None:
        """Puts what a dead worker had back to the front of the queue, unless it was its second try."""
        groups, self._groups[worker] = self._groups[worker], []
        back: list[Picture] = []
        for group in groups:
            for picture in group.pictures:
                picture.tries += group.is_first
                picture.share = 0.0
                if picture.future.done():
                    continue
                if picture.tries >= TRIES:
                    text = f"the process that drew the picture ended {TRIES} times ({how})"
                    picture.future.set_exception(WorkerDied(text, "lcm-compile doctor; smaller pictures"))
                else:
                    back.append(picture)
        self._waiting.extendleft(reversed(back))
        self._give()
