"""What a server serves: the models by the names that clients give, their sizes and their LoRAs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_compile.bundles.bundle import EngineBundle, open_bundle
from lcm_compile.bundles.sizes import further_sizes
from lcm_compile.errors import UsageError, first_few
from lcm_compile.output.picture_settings import model_name
from lcm_compile.spec import LORA_SUFFIXES, LoraSpec, own_name

# Names that clients of OpenAI's own service send unless they are told another: the first model serves them.
THEIR_OWN = re.compile(r"(dall-e|gpt-image|chatgpt-image)[\w.-]*")
Size = tuple[int, int]  # height and width in pixels


class UnknownModel(UsageError):
    """A client asks for a model or a LoRA that is not served."""


@dataclass(frozen=True)
class Model:
    """A bundle and its further sizes, by the name that clients give. The first of `bundles` is its own."""

    name: str
    bundles: Mapping[Size, EngineBundle]

    @property
    def first(self) -> EngineBundle:
        """The bundle of the model's own size."""
        return next(iter(self.bundles.values()))

    @property
    def sizes(self) -> str:
        """The sizes in words, as WIDTHxHEIGHT, which is what picture servers call them."""
        return ", ".join(f"{width}x{height}" for height, width in self.bundles)

    @property
    def lora_names(self) -> list[str]:
        """The LoRAs whose weight a request may set."""
        return [lora.source for lora in self.first.manifest.pipeline.loras]

    @property
    def slots(self) -> int:
        """How many LoRAs of the folder a request may use at once."""
        slots = self.first.manifest.pipeline.lora_slots
        return slots.count if slots else 0

    def of_size(self, size: Size | None) -> EngineBundle:
        """Returns the bundle that draws a size. Raises UsageError, with those there are, if none does."""
        if size is None:
            return self.first
        if size not in self.bundles:
            raise UsageError(
                f"{self.name} draws no pictures of {size[1]}x{size[0]} pixels (width x height)",
                f"ask for {self.sizes}; build --into makes further sizes",
            )
        return self.bundles[size]

    def nearest(self, size: Size) -> EngineBundle:
        """Returns the bundle whose size has the proportions nearest to these, and then the area."""

        def distance(own: Size) -> tuple[float, float]:
            shape = own[0] * size[1] / (own[1] * size[0])
            area = own[0] * own[1] / (size[0] * size[1])
            return max(shape, 1 / shape), max(area, 1 / area)

        return self.bundles[min(self.bundles, key=distance)]


class Catalog:
    """The models that are served, and the folder of LoRAs for their slots."""

    def __init__(self, models: Sequence[Model], loras: Path | None = None) -> None:
        self.models = {model.name: model for model in models}
        self._loras = loras.resolve() if loras is not None else None

    @property
    def default(self) -> Model:
        """The model of clients that name none."""
        return next(iter(self.models.values()))

    def find(self, name: str | None) -> tuple[Model, dict[str, float]]:
        """Returns the model of `NAME[+LORA[:WEIGHT]…]`, and the weights of the LoRAs.

        Raises UnknownModel if it is not served.
        """
        if not name or name in self.models:
            return self.models[name] if name else self.default, {}
        own, *loras = name.split("+")
        if own not in self.models:
            if not THEIR_OWN.fullmatch(name):
                raise UnknownModel(
                    f"there is no model {name!r} here", f"ask for one of {first_few([*self.models], 20)}"
                )
            return self.default, {}
        return self.models[own], dict(map(read_lora, loras))

    def lora_files(self) -> dict[str, Path]:
        """Returns the files of the LoRA folder by their names, as the folder is now."""
        if self._loras is None:
            return {}
        files = (path for path in sorted(self._loras.iterdir()) if path.name.endswith(LORA_SUFFIXES))
        return {own_name(path.name): path for path in files}

    def without_folders(self, text: str) -> str:
        """Returns a text without the folders of here, which clients are not told."""
        bundles = [bundle.folder for model in self.models.values() for bundle in model.bundles.values()]
        specs = [model.first.manifest.spec for model in self.models.values()]
        built_from = [Path(spec.base).parent for spec in specs]  # commands that build another bundle tell it
        folders = [
            *([self._loras] if self._loras else ()),
            *(folder.parent for folder in bundles),
            *built_from,
        ]
        for folder in folders:
            text = text.replace(f"{folder}/", "") if folder.is_absolute() else text
        return text

    def lora_fields(self, model: Model, loras: Mapping[str, float]) -> dict[str, Any]:
        """Returns the fields `lora_weights` and `loras` of a Request for LoRAs by name.

        A name is one of the model's own LoRAs, or of a file in the folder. No path is made of it. Raises
        UnknownModel if it is neither, and UsageError if the model has no slots for files.
        """
        own = {name: weight for name, weight in loras.items() if name in model.lora_names}
        others = {name: weight for name, weight in loras.items() if name not in own}
        files = self.lora_files() if others else {}
        for name in others:
            if name not in files:
                known = [*model.lora_names, *(files if model.slots else ())]
                raise UnknownModel(
                    f"{model.name} has no LoRA {name!r}",
                    f"it has {first_few(known, 20)}" if known else "it has none that a request may set",
                )
        return {
            "lora_weights": own,
            "loras": tuple(LoraSpec(str(files[name]), weight) for name, weight in others.items()),
        }


def read_lora(text: str) -> tuple[str, float]:
    """Returns the name and the weight of `NAME` or `NAME:WEIGHT`. Raises UsageError if it is neither."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon else (text, 1.0)
    except ValueError:
        raise UsageError(f"{text!r} is no LoRA", "write NAME or NAME:WEIGHT, for example zebra:0.8") from None


def open_catalog(bundles: Sequence[str], loras: Path | None = None) -> Catalog:
    """Returns the catalog of `[NAME=]FOLDER` each, and of a folder of LoRAs.

    A model without a name is called as its base. Raises UsageError if two have one name or the LoRA folder is
    none, and BundleError if a bundle can't be opened.
    """
    if loras is not None and not loras.is_dir():
        raise UsageError(f"--loras {loras} is no folder", "give the folder that the LoRA files are in")
    models: dict[str, Model] = {}
    for text in bundles:
        name, equals, folder = text.partition("=")
        given = Path(folder if equals and "/" not in name else text)
        opened = [open_bundle(one) for one in (given, *further_sizes(given))]
        shapes = [bundle.manifest.pipeline.shape for bundle in opened]
        own = name if equals and "/" not in name else model_name(opened[0].manifest.spec)
        if own in models:
            raise UsageError(
                f"two bundles would be served as {own}", f"name one of them: lcm-compile serve NAME={given}"
            )
        if not own or "+" in own:
            raise UsageError(f"a model can't be called {own!r}: + is before its LoRAs", f"NAME={given}")
        sizes = {(shape.height, shape.width): bundle for shape, bundle in zip(shapes, opened, strict=True)}
        models[own] = Model(own, sizes)
    return Catalog([*models.values()], loras)
