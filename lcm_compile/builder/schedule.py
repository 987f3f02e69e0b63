"""Calls the functions of a build: a large model's in processes of their own, and some beside others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

from lcm_compile.system.child_process import ForkServer
from lcm_compile.system.limits import available_memory
from lcm_compile.system.memory import SharedMemory

Result = TypeVar("Result")
Task = AbstractContextManager[Any]  # entered while a call runs, which may wait before


class Schedule:
    """Calls the functions of a build.

    For a large model, `call` runs them in processes of their own, whose memory is free again when they end.
    What is done `beside` runs meanwhile, each line in its own order. Without a `server` everything runs at
    once, in this process. `memory` bytes are what the calls may take together.
    """

    def __init__(self, server: ForkServer | None, memory: int) -> None:
        self._server = server
        self._memory = SharedMemory(memory)
        self._lines: dict[str, ThreadPoolExecutor] = {}
        self._results: list[Future[Any]] = []

    def call(self, size: int, task: Task, function: Callable[..., Result], *args: Any) -> Result:
        """Returns `function(*args)`, which takes about `size` bytes, within the context `task`.

        What is called beside waits for it. Raises what the function raises, and at once what was raised
        beside it so far.
        """
        for result in self._results:
            if result.done():
                result.result()
        return self._call(True, size, task, function, *args)

    def call_beside(self, size: int, task: Task, function: Callable[..., Result], *args: Any) -> Result:
        """Returns `function(*args)` as `call` does, for what is done beside."""
        return self._call(False, size, task, function, *args)

    def _call(
        self, first: bool, size: int, task: Task, function: Callable[..., Result], *args: Any
    ) -> Result:
        if self._server is None:
            with task:
                return function(*args)
        with self._memory.part(size, first), task:
            return self._server.call(function, *args)

    def beside(self, line: str, function: Callable[..., Result], *args: Any) -> Future[Result]:
        """Begins `function(*args)` after what was begun before it in the same line, and returns its future.

        In this process it is complete at once, or its error is raised.
        """
        if self._server is None:
            result: Future[Result] = Future()
            result.set_result(function(*args))
            return result
        if line not in self._lines:
            self._lines[line] = ThreadPoolExecutor(1)
        self._results.append(result := self._lines[line].submit(function, *args))
        return result

    def drop(self) -> None:
        """Drops what has not begun beside."""
        for line in self._lines.values():
            line.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Waits for what has begun beside."""
        for line in self._lines.values():
            line.shutdown()


@contextmanager
def scheduling(large: bool, memory: int, modules: Sequence[str]) -> Iterator[Schedule]:
    """Yields what calls the functions of a build of a large or small model.

    `memory` is the bytes that the largest of them takes. Together they take no more, or half of what is
    available. The processes have imported these modules. After an error, those that still run are killed.
    """
    if not large:
        yield Schedule(None, memory)
        return
    with ExitStack() as stack:
        server = ForkServer(modules)
        schedule = Schedule(server, max(memory, (available_memory() or 0) // 2))
        stack.callback(schedule.join)
        stack.enter_context(server)
        stack.callback(schedule.drop)
        yield schedule
