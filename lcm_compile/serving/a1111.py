"""The API of A1111's web UI, `/sdapi/v1/…`, as its clients use it.

They send the settings that suit other models, such as 1024×1024, 22 steps and a guidance of 4.5. So what a
model can't take, or draws badly with, becomes what it has, and `info` tells what a picture was drawn with.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from PIL import ImageOps
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.errors import UsageError
from lcm_compile.graphs import DRAW, ENCODE_IMAGE
from lcm_compile.output.picture_settings import SETTINGS, origin_of, parameters, settings_text
from lcm_compile.pipeline.request import LANCZOS, LATENT, MOST_GUIDANCE, UPSCALERS
from lcm_compile.samplers import SAMPLERS
from lcm_compile.serving.answers import json_answer
from lcm_compile.serving.catalog import Model, UnknownModel
from lcm_compile.serving.controlnet_units import SCRIPTS, controlnet_routes, unit_fields, units_of
from lcm_compile.serving.dispatcher import Picture
from lcm_compile.serving.jobs import Asked, Job, checked, draw, while_connected
from lcm_compile.serving.service import Service, without_folders
from lcm_compile.serving.uploads import image_of_base64

LORA_IN_PROMPT = re.compile(r"<lora:([^:<>]+)((?::[^<>]*)?)>")
# Above these a few-step model's own numbers are better: they were meant for 20 to 50 steps.
MOST_FEW_STEPS = 8
MOST_FEW_GUIDANCE = 2.0
KARRAS = "karras"
MOST_NUMBER = 1 << 20  # of pixels or pictures: a number that arithmetic can take


class TextToImage(BaseModel):
    """What txt2img draws. Fields that are not here are ignored."""

    model_config = ConfigDict(allow_inf_nan=False)

    prompt: str | None = ""
    negative_prompt: str | None = ""
    seed: int | None = -1
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = Field(None, le=MOST_NUMBER)
    height: int | None = Field(None, le=MOST_NUMBER)
    batch_size: int | None = Field(1, ge=1, le=MOST_NUMBER)
    n_iter: int | None = Field(1, ge=1, le=MOST_NUMBER)
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    eta: float | None = None
    send_images: bool | None = True
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    denoising_strength: float | None = None
    enable_hr: bool | None = False
    hr_scale: float | None = Field(2.0, gt=0)
    hr_resize_x: int | None = Field(0, ge=0, le=MOST_NUMBER)
    hr_resize_y: int | None = Field(0, ge=0, le=MOST_NUMBER)
    hr_upscaler: str | None = None
    hr_second_pass_steps: int | None = Field(0, ge=0)


class ImageToImage(TextToImage):
    """What img2img draws: from a picture, and where a mask is white."""

    init_images: list[str] | None = None
    mask: str | None = None
    inpainting_mask_invert: int | bool | None = 0
    denoising_strength: float | None = 0.75


class OnePicture(BaseModel):
    """A picture in base64."""

    image: str


@dataclass(eq=False)
class Running:
    """A job of one client that is drawn: `progress` and `interrupt` are about those of its address."""

    job: Job
    pictures: Sequence[Picture]
    began: float
    interrupted: bool = False

    @property
    def share(self) -> float:
        """How much of it is drawn, from 0 to 1."""
        return sum(picture.share for picture in self.pictures) / len(self.pictures)


class Desk:
    """What A1111's API remembers: the model that was chosen, and the jobs of each client."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.chosen = service.catalog.default
        self.running: dict[str, list[Running]] = {}

    def find(self, title: Any) -> Model:
        """Returns the model of a title, as sd-models gives them. Raises UnknownModel if there is none."""
        name = re.sub(r"\[[0-9a-f]*\]$|\.(safetensors|ckpt)$", "", str(title).strip()).rstrip()
        models = self.service.catalog.models
        if name not in models:
            raise UnknownModel(f"there is no model {name[:100]!r} here", f"choose one of {', '.join(models)}")
        return models[name]


def a1111_routes(service: Service) -> APIRouter:
    """Returns the routes of A1111's API."""
    router = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    desk = Desk(service)

    @router.post("/txt2img")
    async def txt2img(request: HttpRequest, body: TextToImage) -> Response:
        """Draws pictures of a prompt, guided by the ControlNet extension's units if there are some."""
        return await paint(desk, request, body, {})

    @router.post("/img2img")
    async def img2img(request: HttpRequest, body: ImageToImage) -> Response:
        """Draws from a picture."""
        if not body.init_images:
            raise UsageError("img2img begins at a picture, and init_images has none")
        fields = await asyncio.to_thread(images_of, body, service.settings.most_pixels)
        return await paint(desk, request, body, fields)

    @router.get("/options")
    async def options() -> Response:
        """Tells the settings that clients ask for: the model that is chosen."""
        return json_answer(
            {
                "sd_model_checkpoint": title_of(desk.chosen),
                "sd_checkpoint_hash": desk.chosen.first.digest,
                "sd_vae": "Automatic",
                "samples_format": "png",
                "CLIP_stop_at_last_layers": 1,
            }
        )

    @router.post("/options")
    async def set_options(body: dict[str, Any]) -> Response:
        """Chooses the model of requests that name none. Other settings are ignored."""
        if body.get("sd_model_checkpoint"):
            desk.chosen = desk.find(body["sd_model_checkpoint"])
        return json_answer(None)

    @router.get("/sd-models")
    async def sd_models() -> Response:
        """Lists the models."""
        return json_answer(
            [
                {
                    "title": title_of(model),
                    "model_name": model.name,
                    "hash": model.first.digest[:10],
                    "sha256": model.first.digest,
                    "filename": model.name,
                    "config": None,
                }
                for model in service.catalog.models.values()
            ]
        )

    @router.get("/samplers")
    async def samplers() -> Response:
        """Lists the samplers."""
        return json_answer(
            [{"name": own.label, "aliases": [name], "options": {}} for name, own in SAMPLERS.items()]
        )

    @router.get("/schedulers")
    async def schedulers() -> Response:
        """Lists how samplers may space their steps."""
        return json_answer(
            [
                {"name": name, "label": label, "aliases": None, "default_rho": -1, "need_inner_model": False}
                for name, label in (("automatic", "Automatic"), (KARRAS, "Karras"))
            ]
        )

    @router.get("/loras")
    async def loras() -> Response:
        """Lists the LoRAs that a prompt may name as <lora:NAME:WEIGHT>."""
        own = desk.chosen.lora_names
        files = [*service.catalog.lora_files()] if desk.chosen.slots else []
        return json_answer(
            [{"name": name, "alias": name, "path": name, "metadata": {}} for name in (*own, *files)]
        )

    nothing: dict[str, list[dict[str, Any]]] = {
        "upscalers": [upscaler("None", 1), upscaler(UPSCALERS[LANCZOS], 4)],
        "latent-upscale-modes": [{"name": UPSCALERS[LATENT]}],
        "sd-vae": [],
        "hypernetworks": [],
        "face-restorers": [],
        "prompt-styles": [],
    }
    for path, value in nothing.items():
        router.get(f"/{path}", summary=f"Lists the {path}.")(always(value))

    @router.get("/embeddings")
    async def embeddings() -> Response:
        """Lists the embeddings: their words are part of a model here, and need not be loaded."""
        return json_answer({"loaded": {}, "skipped": {}})

    @router.get("/progress")
    async def progress(request: HttpRequest) -> Response:
        """Tells how much of this client's pictures is drawn."""
        return json_answer(progress_of(desk.running.get(address_of(request), [])))

    @router.post("/interrupt")
    async def interrupt(request: HttpRequest) -> Response:
        """Stops what this client draws."""
        for running in desk.running.get(address_of(request), []):
            running.interrupted = True
            service.dispatcher.cancel(running.pictures)
        return json_answer({})

    @router.post("/skip")
    async def skip(request: HttpRequest) -> Response:
        """Does what interrupt does."""
        return await interrupt(request)

    @router.post("/refresh-checkpoints")
    async def refresh() -> Response:
        """Does nothing: models are given when the server starts."""
        return json_answer(None)

    @router.get("/scripts")
    async def scripts() -> Response:
        """Lists the extensions whose arguments are read."""
        return json_answer({"txt2img": [*SCRIPTS], "img2img": [*SCRIPTS]})

    @router.post("/png-info")
    async def png_info(body: OnePicture) -> Response:
        """Tells the settings that a picture was drawn with."""
        image = await asyncio.to_thread(image_of_base64, body.image, "picture", service.settings.most_pixels)
        info = image.info.get("parameters", "")
        items = {"parameters": info} if isinstance(info, str) and info else {}
        with suppress(ValueError):
            if own := settings_text(image):
                items[SETTINGS] = own
        return json_answer({"info": info if items else "", "items": items, "parameters": {}})

    both = APIRouter()
    both.include_router(router)
    both.include_router(controlnet_routes(lambda: desk.chosen))
    return both


def always(value: Any) -> Callable[[], Awaitable[Response]]:
    """Returns a route that always answers with the same."""

    async def answer() -> Response:
        return json_answer(value)

    return answer


def upscaler(name: str, scale: int) -> dict[str, Any]:
    """Returns an upscaler as A1111 lists them."""
    return {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": scale}


def title_of(model: Model) -> str:
    """Returns a model as A1111's clients show it."""
    return f"{model.name} [{model.first.digest[:10]}]"


def address_of(request: HttpRequest) -> str:
    """Returns where a client is."""
    return request.client.host if request.client else ""


def images_of(body: ImageToImage, most_pixels: int) -> dict[str, Any]:
    """Returns the pictures of img2img as fields of a Request. Raises UsageError if one can't be read."""
    assert body.init_images
    fields: dict[str, Any] = {
        "image": image_of_base64(body.init_images[0], "picture", most_pixels),
        "strength": body.denoising_strength,
    }
    if body.mask:
        mask = image_of_base64(body.mask, "mask", most_pixels).convert("L")
        fields["mask"] = ImageOps.invert(mask) if body.inpainting_mask_invert else mask
    return fields


def asked_of(body: TextToImage, model: Model, fields: Mapping[str, Any]) -> Asked:
    """Returns what a client asks for, with what the model can't take replaced by what it has."""
    settings = model.first.manifest.pipeline
    prompt, loras = without_loras(body.prompt or "")
    sampler = sampler_of(body.sampler_name or body.sampler_index or "", body.scheduler or "", settings)
    steps, guidance = snapped(body.steps, body.cfg_scale, settings)
    eta = body.eta if body.eta and SAMPLERS[sampler].takes_eta and 0 <= body.eta <= 1 else None
    return Asked(
        prompt,
        model.name,
        (body.batch_size or 1) * (body.n_iter or 1),
        None,
        body.seed if body.seed is not None and body.seed >= 0 else None,
        steps,
        guidance,
        sampler,
        eta,
        loras,
        {"negative_prompt": body.negative_prompt or None, "prompt_syntax": "webui", **fields},
    )


def without_loras(prompt: str) -> tuple[str, dict[str, float]]:
    """Returns a prompt without its `<lora:NAME:WEIGHT>`, and the weights by name."""
    loras = {}
    for name, rest in LORA_IN_PROMPT.findall(prompt):
        weight = re.match(r":([-+\d.eE]+)", rest)
        try:
            loras[name] = float(weight[1]) if weight else 1.0
        except ValueError:
            raise UsageError(f"the weight of <lora:{name}> is no number: {rest[1:]}") from None
    return re.sub(r"\s{2,}", " ", LORA_IN_PROMPT.sub("", prompt)).strip() if loras else prompt, loras


def sampler_of(name: str, scheduler: str, settings: PipelineSettings) -> str:
    """Returns the sampler of A1111's name and spacing, or the model's own.

    A few-step model takes only its own, or another of the few-step ones.
    """
    wanted = name.strip().lower()
    if scheduler.strip().lower() == KARRAS and not wanted.endswith(KARRAS):
        wanted = f"{wanted} {KARRAS}"
    found = next(
        (own for own, s in SAMPLERS.items() if wanted in (s.label.lower(), own, own.replace("-", " "))), None
    )
    if found is None or (settings.few_step and found not in ("lcm", "tcd")):
        return settings.sampler
    return found


def snapped(
    steps: int | None, guidance: float | None, settings: PipelineSettings
) -> tuple[int | None, float | None]:
    """Returns the steps and the guidance that the model can take; None is the model's own."""
    most_steps, most_guidance = settings.scheduler.num_train_timesteps, float(MOST_GUIDANCE)
    if settings.few_step:
        most_steps = max(MOST_FEW_STEPS, settings.steps)
        most_guidance = max(MOST_FEW_GUIDANCE, settings.guidance_scale)
    if steps is not None and not 1 <= steps <= most_steps:
        steps = None
    if guidance is not None and not 0 <= guidance <= most_guidance:
        guidance = None
    return steps, guidance


def hires_of(body: TextToImage, model: Model, bundle: EngineBundle) -> dict[str, Any]:
    """Returns the second pass that a client asks for as fields of a Request, or {}.

    Of the model's sizes with the first pass's proportions it is drawn in the larger one that is nearest to
    what is asked for. If there is none, there is no second pass.
    """
    manifest = bundle.manifest
    shape, stages = manifest.pipeline.shape, {stage.contract.name for stage in manifest.stages}
    factors = [
        height / shape.height
        for height, width in model.bundles
        if height > shape.height and height * shape.width == width * shape.height
    ]
    if not body.enable_hr or not factors or DRAW in stages:
        return {}
    wanted = body.hr_scale or 2.0
    for new, old in ((body.hr_resize_x, body.width), (body.hr_resize_y, body.height)):
        wanted = new / old if new and old else wanted
    asks_latent = (body.hr_upscaler or UPSCALERS[LATENT]).startswith(UPSCALERS[LATENT])
    return {
        "hires": min(factors, key=lambda factor: max(factor / wanted, wanted / factor)),
        "hires_upscaler": LATENT if asks_latent or ENCODE_IMAGE not in stages else LANCZOS,
        "hires_strength": body.denoising_strength,
        "hires_steps": snapped(body.hr_second_pass_steps or None, None, manifest.pipeline)[0],
    }


async def paint(desk: Desk, request: HttpRequest, body: TextToImage, fields: Mapping[str, Any]) -> Response:
    """Draws what a client asks for, and answers as A1111 does."""
    service = desk.service
    override = (body.override_settings or {}).get("sd_model_checkpoint")
    model = desk.find(override) if override else desk.chosen
    height, width = next(iter(model.bundles))
    bundle = model.nearest((max(body.height or height, 1), max(body.width or width, 1)))
    most = service.settings.most_pixels
    units = await asyncio.to_thread(
        lambda: unit_fields(units_of(body.alwayson_scripts), model, fields.get("image"), most)
    )
    asked = asked_of(body, model, {**(fields or hires_of(body, model, bundle)), **units})
    job = await checked(asked, service.catalog, service.settings, bundle)
    mine = desk.running.setdefault(address_of(request), [])
    entry: list[Running] = []

    def began(pictures: Sequence[Picture]) -> None:
        entry.append(Running(job, pictures, time.time()))
        mine.extend(entry)

    try:
        pictures = await while_connected(
            request, draw(job, service.dispatcher, service.settings.timeout, began=began)
        )
        files = await service.files(job, pictures, "png")
    except asyncio.CancelledError:
        if not (entry and entry[0].interrupted):
            raise
        files = []
    finally:
        for running in entry:
            mine.remove(running)
        if not mine:
            desk.running.pop(address_of(request), None)
    told = info_of(job, model)
    images = [base64.b64encode(file).decode() for file in files] if body.send_images is not False else []
    echo = body.model_dump(exclude={"init_images", "mask", "alwayson_scripts"})
    return json_answer({"images": images, "parameters": echo, "info": json.dumps(told)})


def info_of(job: Job, model: Model) -> dict[str, Any]:
    """Returns what A1111 tells of pictures that were drawn."""
    first, (height, width) = job.requests[0], job.size
    drawn_height, drawn_width = first.size(job.bundle.manifest.pipeline.shape)
    strength = first.denoising_strength if first.image else first.second_strength if first.hires else None
    origins = [without_folders(origin_of(job.bundle, request)) for request in job.requests]
    seeds = [request.seed for request in job.requests]
    count = len(seeds)
    return {
        "prompt": first.prompt,
        "all_prompts": [first.prompt] * count,
        "negative_prompt": first.negative_prompt or "",
        "all_negative_prompts": [first.negative_prompt or ""] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": SAMPLERS[first.sampler].label,
        "cfg_scale": first.guidance_scale,
        "steps": first.steps,
        "batch_size": count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.name,
        "sd_model_hash": job.bundle.digest[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [parameters(origin, drawn_width, drawn_height) for origin in origins],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": origins[0].software,
    }


def progress_of(running: Sequence[Running]) -> dict[str, Any]:
    """Returns what A1111 tells of jobs that are drawn, of which the first is shown."""
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": len(running),
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    }
    answer = {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    if running:
        first = running[0]
        steps = first.job.requests[0].steps
        seconds = time.time() - first.began
        state["job"] = "txt2img" if first.job.requests[0].image is None else "img2img"
        state["job_timestamp"] = time.strftime("%Y%m%d%H%M%S", time.localtime(first.began))
        state["sampling_step"] = min(steps, int(first.share * steps))
        state["sampling_steps"] = steps
        state["interrupted"] = first.interrupted
        answer["progress"] = first.share
        answer["eta_relative"] = seconds * (1 - first.share) / first.share if first.share else 0.0
    return answer
