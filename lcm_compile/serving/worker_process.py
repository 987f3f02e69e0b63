"""The server's side of a worker: starts its process, talks to it, and starts it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from lcm_compile.serving.messages import End, Ping, Pong, Ready, Start
from lcm_compile.system.child_process import ended, python_command

MOST_PAUSE = 30.0  # seconds before a worker that keeps dying is started again
GRACE = 10.0  # seconds that a worker gets to end
# A worker answers between whatever it computes. One that in so many looks of so many seconds neither answers
# nor uses the processor, as one that loads may not answer, has stopped or hangs. Looks are counted, and not
# the time, because a machine that sleeps stops the server as well.
LOOK_SECONDS = 5.0
MOST_LOOKS = 12


class WorkerProcess:
    """A worker. All methods are called in the thread of the event loop.

    `told` is called with each of its messages, and `died` with how it ended, in words, if it does so by
    itself; it is started again then, at once if it was ready, and else after a pause that doubles. One that
    has stopped or hangs is killed first.
    """

    def __init__(
        self,
        folders: tuple[Path, ...],
        environment: Mapping[str, str],
        told: Callable[[WorkerProcess, object], None],
        died: Callable[[WorkerProcess, str], None],
    ) -> None:
        self._folders = folders
        self._environment = environment
        self._told = told
        self._died = died
        self._pause = 0.0
        self._wanted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._outbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._answered = True
        self._cpu_seconds = 0.0
        self._silent = 0  # the looks since it last answered
        self.ready = False

    @property
    def pid(self) -> int | None:
        """The process, if it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Starts the process, which loads the bundles, and then tells that it is ready."""
        self._wanted = True
        own, other = multiprocessing.Pipe()
        descriptor = other.fileno()
        self._process = subprocess.Popen(
            python_command("lcm_compile.serving.worker", "main", descriptor),
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
            env={**os.environ, **self._environment},
        )
        other.close()
        self._outbox = queue.SimpleQueue()
        self._answered, self._silent = True, 0
        loop = asyncio.get_running_loop()
        sender = threading.Thread(target=send_all, args=(self._outbox, own), daemon=True)
        sender.start()
        receiving = (loop, own, self._process, sender, self._outbox)
        threading.Thread(target=self._receive, args=receiving, daemon=True).start()
        self.send(Start(self._folders))
        loop.call_later(LOOK_SECONDS, self._look, self._process)

    def send(self, message: object) -> None:
        """Sends a message, without waiting for the process to read it, which it may never do.

        If the process has just died, `died` will be called, and nothing is raised.
        """
        self._outbox.put(message)

    def _receive(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Connection[object, object],
        process: subprocess.Popen[bytes],
        sender: threading.Thread,
        outbox: queue.SimpleQueue[object],
    ) -> None:
        """Runs in a thread of its own: hands messages to the event loop until the process ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = connection.recv()
                loop.call_soon_threadsafe(self._take, message)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        outbox.put(None)
        sender.join()
        connection.close()
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(self._ended, process)

    def _look(self, process: subprocess.Popen[bytes]) -> None:
        """Kills the process if it has not answered for too long, and else asks it to answer."""
        if process is not self._process or process.poll() is not None:
            return
        used = cpu_seconds(process.pid)
        self._silent = 0 if self._answered or used != self._cpu_seconds else self._silent + 1
        self._cpu_seconds = used
        if self._silent >= MOST_LOOKS:
            process.kill()
            return
        if self._answered:
            self._answered = False
            self.send(Ping())
        asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look, process)

    def _take(self, message: object) -> None:
        self._answered = True
        if isinstance(message, Pong):
            return
        if isinstance(message, Ready):
            self.ready, self._pause = True, 0.0
        self._told(self, message)

    def _ended(self, process: subprocess.Popen[bytes]) -> None:
        """Tells that the process has ended, and starts another."""
        if process is not self._process or not self._wanted:
            return
        was_ready, self.ready = self.ready, False
        hung = f"it did not answer for {MOST_LOOKS * LOOK_SECONDS:g} s"
        self._died(self, hung if self._silent >= MOST_LOOKS else ended(process.returncode))
        self._pause = 0.0 if was_ready else min(max(2 * self._pause, 1.0), MOST_PAUSE)
        asyncio.get_running_loop().call_later(self._pause, self._start_again)

    def _start_again(self) -> None:
        if self._wanted:
            self.start()

    def kill(self) -> None:
        """Kills the process, as if it had died."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Ends the process, and waits for it."""
        self._wanted = self.ready = False
        if self._process is None:
            return
        # Closing the connection would not do: a thread reads it, which keeps it open for the other end.
        self.send(End())
        deadline = time.monotonic() + GRACE
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def send_all(outbox: queue.SimpleQueue[object], connection: Connection[object, object]) -> None:
    """Runs in a thread of its own: sends messages until there is None, or the process has ended."""
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            connection.send(message)


def cpu_seconds(process: int) -> float:
    """Returns the seconds that a process has used the processor for; 0 without /proc."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
