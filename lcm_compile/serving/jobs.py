"""A client's request in this project's own terms, as it is checked and drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from starlette.requests import HTTPConnection

from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.pipeline.check import check_request
from lcm_compile.pipeline.control import check_control, guide_stages
from lcm_compile.pipeline.ip_image import check_ip_image
from lcm_compile.pipeline.request import Request, draw_seed
from lcm_compile.serving.catalog import Catalog, Model, Size
from lcm_compile.serving.dispatcher import Dispatcher, Picture
from lcm_compile.serving.settings import ServerSettings

T = TypeVar("T")
SEEDS = 1 << 64
MODELS = "GET /v1/models tells what each model reads"
SHORT = 2000  # characters of a prompt that is checked at once
# Called with the number of a picture in its job, a step, and the pixels that are foreseen after it.
ShowStep = Callable[[int, int, np.ndarray], None]


class TooLate(LcmCompileError):
    """A request took longer than the server allows."""


class ClientGone(Exception):
    """The client closed its connection before its pictures were drawn."""


@dataclass(frozen=True)
class Asked:
    """What a client asks for. None stands for what the model is made for.

    `size` is the height and width in pixels. `fields` are other fields of Request.
    """

    prompt: str
    model: str | None = None
    count: int = 1
    size: Size | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    eta: float | None = None
    loras: Mapping[str, float] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Pictures of one request, each a Request of its own, and the bundle that draws them."""

    model: Model
    bundle: EngineBundle
    requests: tuple[Request, ...]

    @property
    def size(self) -> Size:
        """The height and width of the pictures in pixels."""
        shape = self.bundle.manifest.pipeline.shape
        return shape.height, shape.width


def job_of(
    asked: Asked, catalog: Catalog, settings: ServerSettings, bundle: EngineBundle | None = None
) -> Job:
    """Returns the job of what a client asks for; `bundle` is what draws it, if that is settled.

    Each of several pictures has a seed of its own, one above the last one's, and is the one that its seed
    draws alone. Raises UsageError if something can't be drawn, before anything waits.
    """
    model, loras = catalog.find(asked.model)
    most = min(settings.most_images, settings.queue)
    if not 1 <= asked.count <= most:
        raise UsageError(f"the number of pictures must be from 1 to {most}, not {asked.count}")
    for name in ("negative_prompt", "prompt_2", "negative_prompt_2"):
        check_length(asked.fields.get(name), name, settings)
    check_length(asked.prompt, "prompt", settings)
    bundle = bundle or model.of_size(asked.size)
    own = bundle.manifest.pipeline.drawing(asked.sampler, asked.steps, asked.guidance_scale, asked.eta)
    seed = draw_seed() if asked.seed is None else asked.seed
    first = Request(
        asked.prompt, seed, **own, **asked.fields, **catalog.lora_fields(model, {**loras, **asked.loras})
    )
    check_pictures(bundle, first)
    check_request(bundle, first)
    return Job(model, bundle, tuple(replace(first, seed=(seed + i) % SEEDS) for i in range(asked.count)))


def check_pictures(bundle: EngineBundle, request: Request) -> None:
    """Raises UsageError unless a request has the pictures that a bundle's added models read.

    `check_request` does so too, with the options of `lcm-compile` that give them.
    """
    stages = guide_stages(stage.contract.name for stage in bundle.manifest.stages)
    several = f"a list of {len(stages)}, each" if len(stages) > 1 else "it"
    give = f"send {several} in base64, as the field control; control_weight 0 draws without an effect"
    check_control(request.control, stages, MODELS, give)
    check_ip_image(request, bundle.manifest.pipeline.ip_weight is not None, MODELS)


async def checked(
    asked: Asked, catalog: Catalog, settings: ServerSettings, bundle: EngineBundle | None = None
) -> Job:
    """Returns `job_of` these, without holding up other clients: large pictures and prompts take a while."""
    if len(asked.prompt) < SHORT and all(
        value is None or value == "plain" for value in asked.fields.values()
    ):
        return job_of(asked, catalog, settings, bundle)  # quicker than to hand it to a thread
    return await asyncio.to_thread(job_of, asked, catalog, settings, bundle)


def check_length(text: str | None, name: str, settings: ServerSettings) -> None:
    """Raises UsageError if a prompt is too long."""
    if text is not None and len(text) > settings.most_prompt:
        raise UsageError(f"the {name} has {len(text)} characters, and may have {settings.most_prompt}")


async def draw(
    job: Job,
    dispatcher: Dispatcher,
    timeout: float,
    previews: Sequence[int] = (),
    show: ShowStep = lambda picture, step, pixels: None,
    began: Callable[[Sequence[Picture]], None] = lambda pictures: None,
) -> list[Picture]:
    """Draws a job, and returns its pictures, whose futures are done.

    `began` is called with them when they are in the queue. If this is cancelled, so are they. Raises
    QueueFull if there is no room, TooLate after `timeout` seconds, and what the workers' errors are.
    """
    pictures = [
        Picture(job.bundle, request, tuple(previews), partial(show, i))
        for i, request in enumerate(job.requests)
    ]
    dispatcher.put(pictures)
    began(pictures)
    try:
        async with asyncio.timeout(timeout):
            await asyncio.gather(*(picture.future for picture in pictures))
    except TimeoutError:
        raise TooLate(
            f"the pictures were not drawn within {timeout:g} s", "ask for fewer, or later"
        ) from None
    finally:
        dispatcher.cancel(pictures)
    return pictures


def server_timing(pictures: Sequence[Picture]) -> dict[str, str]:
    """Returns the header Server-Timing: the milliseconds that a request's pictures waited, and were drawn."""
    waited = max(picture.waited for picture in pictures) * 1000
    ms = [picture.future.result()[1] for picture in pictures]
    stages = {"queue": waited}
    for name in ms[0]:
        if name != "load":
            stages[name] = sum(sum(v) if isinstance(v := one[name], list) else v for one in ms)
    return {"Server-Timing": ", ".join(f"{name};dur={value:.2f}" for name, value in stages.items())}


async def while_connected(connection: HTTPConnection, work: Coroutine[Any, Any, T]) -> T:
    """Returns what the work does. If the client goes before, it is cancelled, and ClientGone is raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(connection))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()


async def disconnected(connection: HTTPConnection) -> None:
    """Returns when the client has gone. Its request must have been read before."""
    while (await connection.receive())["type"] != "http.disconnect":  # type: ignore[attr-defined]
        pass
