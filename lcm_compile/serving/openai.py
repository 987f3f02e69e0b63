"""OpenAI's images API: `/v1/images/generations`, `/v1/images/edits`, `/v1/models` and kept pictures."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.samplers import SAMPLERS
from lcm_compile.serving.answers import json_answer, status_of, text_of, validation_text
from lcm_compile.serving.catalog import Model, Size, UnknownModel, read_lora
from lcm_compile.serving.dispatcher import Picture
from lcm_compile.serving.guard import error_body
from lcm_compile.serving.jobs import Asked, Job, checked, draw, server_timing, while_connected
from lcm_compile.serving.service import Service
from lcm_compile.serving.uploads import guiding, image_of, image_of_base64, mask_of_alpha
from lcm_compile.spec import own_name

# The fields of which a form may have several.
LISTS = ("control", "control_weight", "control_start", "control_end", "control_detector", "loras")
# Clients expect to find tokens; none are counted here.
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
# Of each preview the number of the picture, the step and the pixels; None after the last.
Shown = asyncio.Queue[tuple[int, int, np.ndarray] | None]


def read_loras(value: Any) -> dict[str, float]:
    """Returns LoRAs by name from the forms that clients write them in.

    These are {name: weight}, ["name:weight", …] and [{"name": …, "weight": …}, …], each also as JSON text,
    with `path`, and `multiplier`, `scale`, `alpha` or `strength` in their places. Raises ValueError for
    others.
    """
    if value in (None, ""):
        return {}
    if isinstance(value, str):
        try:
            return read_loras(json.loads(value))
        except json.JSONDecodeError:
            pass
        except RecursionError:
            raise ValueError("its JSON is nested too deeply") from None
        return dict([read_lora_text(value)])
    if isinstance(value, Mapping):
        return {str(name): read_weight(weight) for name, weight in value.items()}
    if not isinstance(value, list):
        raise ValueError("must be an object of names and weights, or a list")
    found: dict[str, float] = {}
    for one in value:
        if isinstance(one, str):
            name, weight = read_lora_text(one)
        elif isinstance(one, Mapping):
            names = [one[key] for key in ("name", "path") if key in one]
            weights = [one[k] for k in ("weight", "multiplier", "scale", "alpha", "strength") if k in one]
            if not names:
                raise ValueError("a LoRA has no name")
            name, weight = str(names[0]), read_weight(weights[0]) if weights else 1.0
        else:
            raise ValueError("a LoRA must be text or an object")
        found[name] = weight
    return found


def read_weight(value: Any) -> float:
    """Returns the weight of a LoRA. Raises ValueError if it is no number."""
    try:
        return float(value)
    except (TypeError, OverflowError):
        raise ValueError("the weight of a LoRA must be a number") from None


def read_lora_text(text: str) -> tuple[str, float]:
    """Returns a LoRA and its weight. Raises ValueError instead of UsageError."""
    try:
        return read_lora(text)
    except UsageError as error:
        raise ValueError(text_of(error)) from None


def read_size(text: str | None) -> Size | None:
    """Returns the height and width of `WIDTHxHEIGHT`, None for `auto`. Raises UsageError for all else."""
    if text in (None, "", "auto"):
        return None
    if not (found := re.fullmatch(r"([1-9]\d{0,5})[xX*×]([1-9]\d{0,5})", text.strip())):
        raise UsageError("the size must be WIDTHxHEIGHT in pixels, or auto", 'for example "512x512"')
    return int(found[2]), int(found[1])


class Generation(BaseModel):
    """What is drawn. Fields that are not here are ignored, as those that clients send for other models."""

    model_config = ConfigDict(allow_inf_nan=False)

    prompt: str = Field(description="What the pictures show.")
    model: str | None = Field(None, description="NAME, or NAME+LORA:WEIGHT… of /v1/models.")
    n: int | None = Field(None, description="Pictures; each has the seed above that of the one before.")
    size: str | None = Field(None, description="WIDTHxHEIGHT of /v1/models, or auto.")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of JPEG and WebP.")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=50, description="With stream: previews of steps.")
    negative_prompt: str | None = None
    seed: int | None = Field(None, validation_alias=AliasChoices("seed", "rng_seed"))
    steps: int | None = Field(None, validation_alias=AliasChoices("steps", "num_inference_steps"))
    guidance_scale: float | None = Field(
        None, validation_alias=AliasChoices("guidance_scale", "cfg_scale", "guidance")
    )
    sampler: str | None = Field(None, validation_alias=AliasChoices("sampler", "sampler_name"))
    eta: float | None = None
    prompt_syntax: str | None = Field(None, description="plain, or webui, whose brackets weight words.")
    loras: Annotated[dict[str, float], BeforeValidator(read_loras)] = Field(
        default_factory=dict, validation_alias=AliasChoices("loras", "lora"), description="Weights by name."
    )
    control: str | list[str] | None = Field(
        None,
        description="What the model's ControlNets and then its T2I-Adapters read, as base64 or data: URLs.",
    )
    control_weight: float | list[float] | None = Field(None, description="One for all of them, or for each.")
    control_start: float | list[float] | None = Field(None, description="Share of the steps, from 0 to 1.")
    control_end: float | list[float] | None = Field(None, description="Share of the steps, from 0 to 1.")
    control_detector: str | list[str] | None = Field(
        None, description="canny, or canny:LOW,HIGH, makes what is read of a photo; none reads it as it is."
    )
    ip_image: str | None = Field(
        None, description="What the model's IP-Adapter reads, in base64 or as a data: URL."
    )
    ip_weight: float | None = None

    def asked(self, most_pixels: int, **fields: Any) -> Asked:
        """Returns it as what is drawn; `fields` are others of Request. Raises UsageError."""
        fields |= {"negative_prompt": self.negative_prompt or None}
        if self.prompt_syntax is not None:
            fields["prompt_syntax"] = self.prompt_syntax
        if self.control:
            several = [self.control] if isinstance(self.control, str) else self.control
            pictures = [image_of_base64(one, "control picture", most_pixels) for one in several]
            fields["control"] = guiding(pictures, self.control_detector)
            for name in ("control_weight", "control_start", "control_end"):
                fields[name] = getattr(self, name)
        if self.ip_image:
            fields["ip_image"] = image_of_base64(self.ip_image, "ip_image", most_pixels)
            fields["ip_weight"] = self.ip_weight
        return Asked(
            self.prompt,
            self.model,
            1 if self.n is None else self.n,
            read_size(self.size),
            None if self.seed is not None and self.seed < 0 else self.seed,  # −1 is a random one to many
            self.steps,
            self.guidance_scale,
            self.sampler,
            self.eta,
            self.loras,
            fields,
        )


class Edit(Generation):
    """What is drawn from a picture."""

    strength: float | None = Field(
        None,
        validation_alias=AliasChoices("strength", "denoising_strength"),
        description="Share of the steps that are drawn from the picture, from 0 to 1.",
    )


def openai_routes(service: Service) -> APIRouter:
    """Returns the routes of OpenAI's images API."""
    router = APIRouter(tags=["OpenAI"])

    @router.get("/v1/models")
    async def models() -> Response:
        """Lists the models, with what each of them takes."""
        known = [facts_of(model, service) for model in service.catalog.models.values()]
        return json_answer({"object": "list", "data": known})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Tells one model."""
        if name not in service.catalog.models:
            service.catalog.find(name or "?")
            raise UnknownModel(f"there is no model {name!r} here", "GET /v1/models lists them")
        return json_answer(facts_of(service.catalog.models[name], service))

    @router.post("/v1/images/generations")
    async def generations(request: HttpRequest, body: Generation) -> Response:
        """Draws pictures of a prompt."""
        most = service.settings.most_pixels
        has_pictures = body.control or body.ip_image
        asked = await asyncio.to_thread(body.asked, most) if has_pictures else body.asked(most)
        job = await checked(asked, service.catalog, service.settings)
        return await answer(service, request, body, job, "image_generation")

    schema = Edit.model_json_schema(ref_template="#/components/schemas/{model}")
    files = {name: {"type": "string", "format": "binary"} for name in ("image", "mask")}
    schema["properties"] = files | schema["properties"]
    schema["required"] = ["image", "prompt"]
    form = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}

    @router.post("/v1/images/edits", openapi_extra=form)
    async def edits(request: HttpRequest) -> Response:
        """Draws from a picture: all of it, or where the mask, or the picture itself, is transparent."""
        most = service.settings.most_body  # which may be one picture in base64
        async with request.form(max_files=20, max_fields=100, max_part_size=most) as form:
            body, fields, size = await read_edit(form, service)
        asked = await asyncio.to_thread(body.asked, service.settings.most_pixels, **fields)
        bundle = None
        if asked.size is None:
            bundle = service.catalog.find(asked.model)[0].nearest(size)
        job = await checked(asked, service.catalog, service.settings, bundle)
        return await answer(service, request, body, job, "image_edit")

    @router.get("/files/{name}")
    async def kept(name: str) -> Response:
        """Returns a picture that was asked for as a URL."""
        file = service.kept.find(name)
        if file is None:
            return json_answer(error_body("there is no such picture, or no more", 404), 404)
        headers = {"Cache-Control": f"private, max-age={int(service.settings.keep_seconds)}"}
        return Response(file.data, media_type=f"image/{file.form}", headers=headers)

    return router


def facts_of(model: Model, service: Service) -> dict[str, Any]:
    """Returns what `/v1/models` tells of a model: OpenAI's fields, and what the model takes."""
    settings = model.first.manifest.pipeline
    stages = [stage.contract.name for stage in model.first.manifest.stages]
    return {
        "id": model.name,
        "object": "model",
        "created": service.started,
        "owned_by": "lcm-compile",
        "sizes": [f"{width}x{height}" for height, width in model.bundles],
        **settings.drawing(),
        "samplers": [*SAMPLERS],
        "batch": settings.shape.batch,
        "prompt": settings.sample_prompt,
        "loras": {lora.source: lora.weight for lora in settings.loras},
        "slots": model.slots,
        "files": [*service.catalog.lora_files()] if model.slots else [],
        "control": [
            {"kind": guide.kind, "name": own_name(guide.source), "weight": guide.weight}
            for guide in model.first.manifest.spec.guides
        ],
        "ip_weight": settings.ip_weight,
        "images": "encode-image" in stages,
        "previews": "step" in stages,
    }


async def read_edit(form: FormData, service: Service) -> tuple[Edit, dict[str, Any], Size]:
    """Returns the fields of a form, those of a Request that are pictures, and the size of the picture.

    Raises UsageError if there is not exactly one picture, or a field is wrong.
    """
    files = [(name, file) for name, file in form.multi_items() if isinstance(file, UploadFile)]
    images = [file for name, file in files if name in ("image", "image[]")]
    if len(images) != 1:
        raise UsageError(f"an edit begins at one picture, and {len(images)} were sent", "send it as image")
    texts: dict[str, str | list[str]] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, UploadFile) and name in ("control", "ip_image"):
            value = base64.b64encode(await value.read()).decode()
        if isinstance(value, str) and value != "":
            before = texts.get(name, []) if name in LISTS else []
            texts[name] = [*([before] if isinstance(before, str) else before), value] if before else value
    try:
        body = Edit.model_validate(texts)
    except ValidationError as error:
        raise UsageError(validation_text([*error.errors()])) from error
    most = service.settings.most_pixels
    image = await asyncio.to_thread(image_of, await images[0].read(), "image", most)
    fields: dict[str, Any] = {"image": image, "strength": body.strength}
    if masks := [file for name, file in files if name == "mask"]:
        mask = await asyncio.to_thread(image_of, await masks[0].read(), "mask", most)
        fields["mask"] = mask_of_alpha(mask)
    elif image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] == 0:
        fields["mask"] = mask_of_alpha(image)
    return body, fields, (image.height, image.width)


async def answer(service: Service, request: HttpRequest, body: Generation, job: Job, kind: str) -> Response:
    """Draws a job, and returns its pictures as JSON, or as a stream of events."""
    form = body.output_format or "png"
    created = int(time.time())
    if body.stream:
        previews = previews_of(job, body.partial_images or 0)
        shown: Shown = asyncio.Queue()
        drawing = asyncio.ensure_future(
            draw(
                job,
                service.dispatcher,
                service.settings.timeout,
                previews,
                lambda *one: shown.put_nowait(one),
            )
        )
        drawing.add_done_callback(lambda _: shown.put_nowait(None))
        await asyncio.sleep(0)
        if drawing.done():  # there is no room for it
            drawing.result()
        facts = {"created_at": created, **facts_of_answer(job, form)}
        events = stream(service, job, drawing, shown, previews, kind, form, body.output_compression, facts)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return DrawingStream(drawing, events, media_type="text/event-stream", headers=headers)
    pictures = await while_connected(request, draw(job, service.dispatcher, service.settings.timeout))
    files = await service.files(job, pictures, form, body.output_compression)
    data: list[dict[str, Any]] = []
    for file, picture in zip(files, pictures, strict=True):
        own: dict[str, Any] = {"seed": picture.request.seed}
        if body.response_format == "url":
            own["url"] = str(request.base_url) + f"files/{service.kept.keep(file, form)}"
        else:
            own["b64_json"] = base64.b64encode(file).decode()
        data.append(own)
    facts = facts_of_answer(job, form)
    answer = {"created": created, "data": data, **facts, "usage": USAGE}
    return json_answer(answer, headers=server_timing(pictures))


def facts_of_answer(job: Job, form: str) -> dict[str, Any]:
    """Returns what OpenAI's answers and events tell of the pictures."""
    return {
        "size": f"{job.size[1]}x{job.size[0]}",
        "quality": "auto",
        "background": "opaque",
        "output_format": form,
    }


def previews_of(job: Job, count: int) -> list[int]:
    """Returns the steps whose pictures are shown: `count` of all but the last, evenly."""
    request = job.requests[0]
    last = request.steps - request.first_step - 1
    count = min(count, last)
    return sorted({round((i + 1) * last / count) for i in range(count)}) if count else []


class DrawingStream(StreamingResponse):
    """A stream of events of a drawing, which is cancelled when the stream ends, even before it began."""

    def __init__(self, drawing: asyncio.Future[list[Picture]], *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self._drawing = drawing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._drawing.cancel()


async def stream(
    service: Service,
    job: Job,
    drawing: asyncio.Future[list[Picture]],
    shown: Shown,
    previews: list[int],
    kind: str,
    form: str,
    quality: int | None,
    facts: Mapping[str, Any],
) -> AsyncIterator[bytes]:
    """Yields server-sent events: previews while pictures are drawn, and each picture."""
    try:
        while (seen := await shown.get()) is not None:
            _, step, pixels = seen
            file = await service.preview(pixels, form, quality)
            own = {"b64_json": base64.b64encode(file).decode(), "partial_image_index": previews.index(step)}
            yield event(f"{kind}.partial_image", {**own, **facts})
        pictures = drawing.result()
        for file, picture in zip(await service.files(job, pictures, form, quality), pictures, strict=True):
            own = {"b64_json": base64.b64encode(file).decode(), "seed": picture.request.seed}
            yield event(f"{kind}.completed", {**own, **facts, "usage": USAGE})
    except LcmCompileError as error:
        service.metrics.errors.labels(type(error).__name__).inc()
        text = service.catalog.without_folders(text_of(error))
        yield event("error", error_body(text, *status_of(error)))


def event(kind: str, data: Mapping[str, Any]) -> bytes:
    """Returns a server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()
