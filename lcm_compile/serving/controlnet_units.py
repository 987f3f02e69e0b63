"""The units of the ControlNet extension of A1111's web UI, and the routes that its clients ask.

In the web UI a unit names a model and a module, which makes the picture that the model reads of another one.
Here the models are those that a bundle was built with, and they are there for every picture: one without a
unit gets the weight 0, which draws without its effect, as there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from PIL import Image
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.responses import Response

from lcm_compile.errors import UsageError, first_few
from lcm_compile.pipeline.detect import CANNY, NONE, THRESHOLDS
from lcm_compile.serving.answers import json_answer, validation_text
from lcm_compile.serving.catalog import Model
from lcm_compile.serving.uploads import guiding, image_of_base64
from lcm_compile.spec import own_name

SCRIPT = "controlnet"
# The extension's two scripts. webuiapi looks for the second, and else sends the units of the last call again.
SCRIPTS = (SCRIPT, "controlnet m2m")
API_VERSION = 3  # of the extension, which clients ask for
IP_ADAPTER = "ip-adapter"  # with which its modules' names for IP-Adapters begin
MOST_THRESHOLD = 255


class Unit(BaseModel):
    """A unit. Fields that are not here are ignored, and None stands for the default."""

    model_config = ConfigDict(allow_inf_nan=False)

    enabled: bool = True
    image: str | None = Field(None, validation_alias=AliasChoices("image", "input_image"))
    module: str = NONE
    model: str = "None"
    weight: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = Field(1.0, validation_alias=AliasChoices("guidance_end", "guidance"))
    threshold_a: float = -1.0
    threshold_b: float = -1.0

    @field_validator("image", mode="before")
    @classmethod
    def first_image(cls, value: Any) -> Any:
        """Returns the picture of the forms that it has: itself, with its mask, or the first of several."""
        if isinstance(value, list):
            value = value[0] if value else None
        return value.get("image") if isinstance(value, Mapping) else value

    @property
    def wanted(self) -> str:
        """The name of its model without the hash that the web UI writes after it; "" is any."""
        name = (self.model.rpartition(" [")[0] or self.model).strip()
        return "" if name.lower() == "none" else name

    @property
    def detector(self) -> str:
        """What makes the picture that is read, as `control_detector` names it.

        Thresholds that the extension would not take are the usual ones. Raises UsageError for modules that
        are not here.
        """
        module = self.module.strip().lower() or NONE
        if module not in modules():
            raise UsageError(
                f"the module {self.module[:100]!r} of a ControlNet unit is not here",
                f"send the picture that it makes, with the module {NONE}; there are {', '.join(modules())}",
            )
        if module != CANNY:
            return NONE
        given = (self.threshold_a, self.threshold_b)
        each = zip(given, THRESHOLDS, strict=True)
        own = (round(one) if 1 <= one <= MOST_THRESHOLD else usual for one, usual in each)
        return f"{CANNY}:{','.join(map(str, own))}"


def modules() -> list[str]:
    """Returns the modules that can run here, but for those of IP-Adapters."""
    return [NONE, *([CANNY] if importlib.util.find_spec("cv2") else [])]


def units_of(scripts: Mapping[str, Any] | None) -> list[Unit]:
    """Returns the units that are enabled of `alwayson_scripts`. Raises UsageError if one can't be read."""
    found = next((own for name, own in (scripts or {}).items() if name.lower() == SCRIPT), None)
    args = found.get("args") if isinstance(found, Mapping) else found
    try:
        units = [Unit.model_validate(without_none(one)) for one in args or ()]
    except TypeError:
        raise UsageError("the args of the script controlnet must be a list of units") from None
    except ValidationError as error:
        raise UsageError(f"a ControlNet unit is wrong: {validation_text([*error.errors()])}") from error
    return [unit for unit in units if unit.enabled]


def without_none(unit: Any) -> Any:
    """Returns a unit without what is None."""
    return {k: v for k, v in unit.items() if v is not None} if isinstance(unit, Mapping) else unit


def unit_fields(
    units: Sequence[Unit], model: Model, begins_at: Image.Image | None, most_pixels: int
) -> dict[str, Any]:
    """Returns units as fields of a Request.

    A unit without a picture reads `begins_at`, the one of img2img. Raises UsageError for a unit that the
    model has nothing for, or whose picture can't be read.
    """
    fields: dict[str, Any] = {}
    guides = names_of(model)
    by_guide: dict[int, Unit] = {}
    for unit in sorted(units, key=lambda unit: not unit.wanted):  # those that name a model come first
        picture = begins_at
        if unit.image:
            picture = image_of_base64(unit.image, "picture of a ControlNet unit", most_pixels)
        if picture is None:
            raise UsageError("a ControlNet unit is enabled and has no image", "send it in base64")
        if unit.module.strip().lower().startswith(IP_ADAPTER):
            fields |= ip_fields(unit, model, picture, "ip_image" in fields)
            continue
        place = place_of(unit, model, guides, by_guide)
        by_guide[place] = unit
        fields.setdefault("pictures", {})[place] = picture
    if not guides:
        return fields
    pictures: dict[int, Image.Image] = fields.pop("pictures", {})
    blank = Image.new("RGB", (8, 8))
    each = [by_guide.get(i) for i in range(len(guides))]
    given = guiding(
        [pictures.get(i, blank) for i in range(len(guides))],
        [unit.detector if unit else NONE for unit in each],
    )
    return fields | {
        "control": given,
        "control_weight": [unit.weight if unit else 0.0 for unit in each],
        "control_start": [unit.guidance_start if unit else 0.0 for unit in each],
        "control_end": [unit.guidance_end if unit else 1.0 for unit in each],
    }


def place_of(unit: Unit, model: Model, guides: Sequence[str], taken: Mapping[int, Unit]) -> int:
    """Returns the place of what a unit is for among a model's guides: the one it names, or the next.

    Raises UsageError if there is none.
    """
    wanted = unit.wanted
    if not guides:
        raise UsageError(
            f"a ControlNet unit is enabled, and {model.name} has no ControlNet and no T2I-Adapter",
            "choose a model that was built with one; GET /controlnet/model_list lists the chosen model's",
        )
    fitting = [i for i, name in enumerate(guides) if not wanted or name.lower() == wanted.lower()]
    if not fitting:
        raise UsageError(
            f"{model.name} has no ControlNet {wanted[:100]!r}", f"it has {first_few(guides, 20)}"
        )
    free = [i for i in fitting if i not in taken]
    if not free:
        what = f"than one for {wanted}" if wanted else f"than {model.name} has ControlNets: {len(guides)}"
        raise UsageError(f"there are more ControlNet units {what}", "enable one for each")
    return free[0]


def ip_fields(unit: Unit, model: Model, picture: Image.Image, is_second: bool) -> dict[str, Any]:
    """Returns a unit for an IP-Adapter as fields of a Request. Raises UsageError if it can't be one."""
    if model.first.manifest.pipeline.ip_weight is None:
        raise UsageError(
            f"a unit for an IP-Adapter is enabled, and {model.name} has none",
            "choose a model that was built with one",
        )
    if is_second:
        raise UsageError(f"there are two units for the IP-Adapter of {model.name}", "enable one")
    if (unit.guidance_start, unit.guidance_end) != (0.0, 1.0):
        raise UsageError("an IP-Adapter counts in every step", "send guidance_start 0 and guidance_end 1")
    return {"ip_image": picture, "ip_weight": unit.weight}


def names_of(model: Model) -> list[str]:
    """Returns the names of a model's ControlNets, and then of its T2I-Adapters."""
    return [own_name(guide.source) for guide in model.first.manifest.spec.guides]


def controlnet_routes(chosen: Callable[[], Model]) -> APIRouter:
    """Returns the routes of the extension. They are about the model that is chosen when they are asked."""
    router = APIRouter(prefix="/controlnet", tags=["A1111"])

    def models() -> list[str]:
        ip_adapter = chosen().first.manifest.spec.ip_adapter
        return [*names_of(chosen()), *([own_name(ip_adapter.source)] if ip_adapter else [])]

    def all_modules() -> list[str]:
        has_ip_adapter = chosen().first.manifest.pipeline.ip_weight is not None
        return [*modules(), *([f"{IP_ADAPTER}-auto"] if has_ip_adapter else [])]

    @router.get("/version")
    async def version() -> Response:
        """Tells the version of this API."""
        return json_answer({"version": API_VERSION})

    @router.get("/model_list")
    async def model_list() -> Response:
        """Lists the ControlNets, T2I-Adapters and the IP-Adapter of the model that is chosen."""
        return json_answer({"model_list": models()})

    @router.get("/module_list")
    async def module_list() -> Response:
        """Lists what makes the picture that a ControlNet reads."""
        return json_answer({"module_list": all_modules(), "module_detail": {}})

    @router.get("/control_types")
    async def control_types() -> Response:
        """Lists both as one type."""
        default = next(iter(names_of(chosen())), "None")
        both = {"module_list": all_modules(), "model_list": ["None", *models()]}
        kind = {**both, "default_option": NONE, "default_model": default}
        return json_answer({"control_types": {"All": kind}})

    @router.get("/settings")
    async def settings() -> Response:
        """Tells how many units there may be."""
        return json_answer({"control_net_unit_count": len(models())})

    return router
