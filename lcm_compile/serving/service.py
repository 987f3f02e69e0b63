"""What the routes of one server share: its models, its workers, its queue and its counts."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.output.picture_settings import Origin, origin_of
from lcm_compile.serving.catalog import Catalog
from lcm_compile.serving.dispatcher import Dispatcher, Link, Picture
from lcm_compile.serving.encode import encoded
from lcm_compile.serving.jobs import Job
from lcm_compile.serving.kept_files import KeptFiles
from lcm_compile.serving.messages import Failed, Ready
from lcm_compile.serving.metrics import Metrics
from lcm_compile.serving.settings import ServerSettings
from lcm_compile.serving.worker_process import WorkerProcess
from lcm_compile.system.processor import threads


class Service:
    """The parts of a server. `told` is called with lines for whoever started it."""

    def __init__(
        self, catalog: Catalog, settings: ServerSettings, told: Callable[[str], None] = lambda line: None
    ) -> None:
        self.catalog = catalog
        self.settings = settings
        self.told = told
        self.started = int(time.time())
        self.dispatcher = Dispatcher(settings.queue, settings.batch_wait_ms / 1000)
        self.kept = KeptFiles(settings.keep_seconds)
        self.workers: list[Link] = []
        self.stopping = False
        self.failure: LcmCompileError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.metrics = Metrics(
            lambda: self.dispatcher.waiting,
            lambda: self.dispatcher.drawing,
            lambda: sum(worker.ready for worker in self.workers),
        )
        names = {b.folder: model.name for model in catalog.models.values() for b in model.bundles.values()}
        self.dispatcher.watch = lambda some: self.metrics.count(names[some[0].bundle.folder], some)

    @property
    def is_ready(self) -> bool:
        """Whether a picture would be drawn now."""
        return not self.stopping and any(worker.ready for worker in self.workers)

    def start(self) -> None:
        """Starts the workers, each with a device of its own."""
        folders = tuple(model.first.folder for model in self.catalog.models.values())
        for environment in shares(self.settings.workers, self.catalog.default.first.manifest.target.is_cpu):
            worker = WorkerProcess(folders, environment, self._take, self._lose)
            self.workers.append(worker)
            self.dispatcher.add(worker)
            worker.start()

    def stop(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            worker.stop()

    def _take(self, worker: Any, message: object) -> None:
        if isinstance(message, Ready):
            self.told(f"worker {worker.pid} has loaded the models in {message.seconds:.1f} s")
        elif isinstance(message, Failed) and message.number == 0:
            self.failure = self.failure or LcmCompileError(message.message, message.hint)
            if not any(own.ready for own in self.workers):
                self.dispatcher.fail(self.failure)
            self.on_failure()
        self.dispatcher.take(worker, message)

    def _lose(self, worker: Any, how: str) -> None:
        self.metrics.deaths.inc()
        self.told(f"a worker died ({how}); another is started, and draws what it had")
        self.dispatcher.lose(worker, how)

    async def files(
        self, job: Job, pictures: list[Picture], form: str, quality: int | None = None
    ) -> list[bytes]:
        """Returns the files of pictures that were drawn, which hold their settings."""
        pixels = [picture.future.result()[0] for picture in pictures]

        def encode() -> list[bytes]:
            origins = [without_folders(origin_of(job.bundle, request)) for request in job.requests]
            return [encoded(own, form, origin, quality) for own, origin in zip(pixels, origins, strict=True)]

        return await asyncio.to_thread(encode)

    async def preview(self, pixels: np.ndarray, form: str, quality: int | None = None) -> bytes:
        """Returns the file of a picture that is foreseen, without settings."""
        return await asyncio.to_thread(encoded, pixels, form, None, quality)


def without_folders(origin: Origin) -> Origin:
    """Returns an origin whose LoRAs are told by the names of their files: clients see no folder of here."""
    loras = tuple(replace(lora, source=Path(lora.source).name) for lora in origin.request.loras)
    return replace(origin, request=replace(origin.request, loras=loras))


def shares(workers: int, on_cpu: bool) -> list[dict[str, str]]:
    """Returns the environment of each worker: a GPU of its own, or its share of the processor's cores."""
    if workers == 1:
        return [{}]
    if on_cpu:
        return [{"OMP_NUM_THREADS": str(max(1, threads() // workers))}] * workers
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = given.split(",") if given else [str(i) for i in range(workers)]
    if len(devices) < workers:
        raise UsageError(f"{workers} workers for {len(devices)} devices", f"serve --workers {len(devices)}")
    return [{"CUDA_VISIBLE_DEVICES": device} for device in devices[:workers]]
