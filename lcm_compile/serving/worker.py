"""The process that draws: it owns a device, loads the bundles, and draws one group of pictures at a time."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from lcm_compile.errors import LcmCompileError, LoraError, UsageError
from lcm_compile.pipeline.load import load
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.serving.messages import (
    Cancel,
    Draw,
    Drawn,
    End,
    Failed,
    Ping,
    Pong,
    Preview,
    Progress,
    Ready,
    Start,
    Stopped,
)

PROGRESS_SECONDS = 0.1  # at least, between two messages that tell how much is drawn


def main(descriptor: int) -> None:
    """Runs in the worker's process: answers what comes through the connection until its other end is closed.

    Signals that are meant for the server, such as Ctrl-C, don't end it: the server ends what it has first.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection: Connection[object, object] = Connection(descriptor)
    worker = Worker(connection)
    threading.Thread(target=worker.receive, daemon=True).start()
    worker.run()


class Worker:
    """Draws what it is sent. One thread receives, so that a drawing can be cancelled; the main one draws."""

    def __init__(self, connection: Connection[object, object]) -> None:
        self._connection = connection
        self._asked: queue.SimpleQueue[Start | Draw] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._sending = threading.Lock()
        self._done = 0  # the number of the last drawing that ended
        self._pipelines: dict[Path, Pipeline] = {}

    def receive(self) -> None:
        """Takes messages until the connection is closed, and then ends the process."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            if isinstance(message, End):
                os._exit(0)
            if isinstance(message, Ping):
                self.send(Pong())
            elif isinstance(message, Cancel):
                self.cancel(message.number)
            elif isinstance(message, Start | Draw):
                self._asked.put(message)

    def cancel(self, number: int) -> None:
        """Stops a drawing between two passes of an engine, or before it begins."""
        if number > self._done:
            self._cancelled.add(number)

    def run(self) -> None:
        """Answers messages. It does not return."""
        while True:
            message = self._asked.get()
            if isinstance(message, Start):
                self.start(message)
            else:
                self.draw(message)

    def start(self, message: Start) -> None:
        """Loads the bundles."""
        start = time.perf_counter()
        try:
            for folder in message.folders:
                self.pipeline(folder)
        except Exception as error:
            self.send(failure(0, error))
            return
        self.send(Ready(time.perf_counter() - start))

    def pipeline(self, folder: Path) -> Pipeline:
        """Returns the pipeline of a bundle, which is loaded when it is first asked for."""
        if folder not in self._pipelines:
            self._pipelines[folder] = load(folder, open_size=self.pipeline)
        return self._pipelines[folder]

    def draw(self, message: Draw) -> None:
        """Draws pictures, and sends them, or why they could not be drawn."""
        number = message.number
        answer: Drawn | Stopped | Failed
        try:
            answer = self.drawn(message)
        except Exception as error:
            answer = failure(number, error)
        self._done = number
        self._cancelled.discard(number)
        self.send(answer)

    def drawn(self, message: Draw) -> Drawn | Stopped:
        """Returns the pictures, or that they were cancelled: between two passes of an engine."""
        number = message.number
        previews = {step: partial(self.show, number, step) for step in message.previews}
        pipeline = self.pipeline(message.folder)
        told = time.monotonic()
        with closing(pipeline.progress(message.requests, previews=previews)) as progress:
            while number not in self._cancelled:
                try:
                    done = next(progress)
                    if time.monotonic() - told > PROGRESS_SECONDS:
                        told = time.monotonic()
                        self.send(Progress(number, *done))
                except StopIteration as stop:
                    return Drawn(number, stop.value.pictures, stop.value.ms)
        return Stopped(number)

    def show(self, number: int, step: int, pictures: np.ndarray) -> None:
        """Sends a preview."""
        self.send(Preview(number, step, pictures))

    def send(self, message: object) -> None:
        """Sends a message, in either thread. If the server is gone, the process ends."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(0)


def failure(number: int, error: Exception) -> Failed:
    """Returns the message that tells an error."""
    if isinstance(error, LcmCompileError):
        return Failed(number, error.message, error.hint, isinstance(error, UsageError | LoraError))
    traceback.print_exception(error, file=sys.stderr)
    return Failed(number, f"internal error: {type(error).__name__}: {error}", None)
