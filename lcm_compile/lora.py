"""LoRA files: read without ever running code, matched key by key, fused exactly.

Layouts: kohya (`lora_unet_down_blocks_0_….lora_down.weight`, `lora_up`, `alpha`; text encoders as
`lora_te_`, `lora_te1_`, `lora_te2_`) and diffusers/PEFT (`unet.down_blocks.0.….lora_A.weight`, `lora_B`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.errors import LoraError
from lcm_compile.families import LCM_LORA_FILE, TEXT_WIDTHS, Family
from lcm_compile.hub import fetch
from lcm_compile.spec import LoraSpec, user_path

if TYPE_CHECKING:
    import torch

KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
KOHYA_KEY = re.compile(r"(lora_(?:unet|te1|te2|te)_)(.+)\.(lora_down\.weight|lora_up\.weight|alpha)")
PEFT_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:(unet|text_encoder_2|text_encoder)\.)?(.+?)\."
    r"(?:(lora_A|lora\.down|lora_linear_layer\.down|lora_B|lora\.up|lora_linear_layer\.up)"
    r"(?:\.default)?\.weight|(alpha))"
)
DOWN = re.compile(r"lora_A|down")


@dataclass
class LoraLayer:
    """The update of one module. down: (r, in, …), up: (out, r, …); α is r where the file has none."""

    component: str
    module: str
    keys: list[str] = field(default_factory=list)
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: float | None = None

    def scale(self) -> float:
        assert self.down is not None
        rank = self.down.shape[0]
        return (rank if self.alpha is None else self.alpha) / rank

    def delta(self) -> torch.Tensor:
        """(α/r)·B·A in fp32, two-dimensional for linear layers and with its kernel for convolutions."""
        assert self.down is not None and self.up is not None
        down, up = self.down.float(), self.up.float()
        product = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
        return product * self.scale()


@dataclass(frozen=True)
class Lora:
    path: Path
    layout: str
    layers: Sequence[LoraLayer]
    made_for: str


@dataclass(frozen=True)
class LoraProvenance:
    """What a bundle keeps of how a LoRA went into it."""

    source: str
    weight: float
    layout: str
    modules: int
    ranks: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_lora(spec: LoraSpec) -> Path:
    path = user_path(spec.source)
    if path.is_dir() and (path / LCM_LORA_FILE).is_file():
        path = path / LCM_LORA_FILE
    if path.is_dir():
        raise LoraError(
            f"{spec.source} is a folder without {LCM_LORA_FILE}", "give the LoRA's .safetensors file"
        )
    if not path.is_file():
        raise LoraError(f"LoRA {spec.source} does not exist", "check the path given to --lora or --lcm-lora")
    return path


def find_lcm_lora(family: Family | None, base: str) -> Path:
    """The LCM-LoRA that belongs to a family, downloaded when the hub cache lacks it."""
    other = "name one with --lcm-lora FILE, or give --no-lcm if the base is an LCM already"
    if family is None:
        raise LoraError(f"no LCM-LoRA is known for {base}: its UNet is of no known family", other)
    if family.lcm_lora is None:
        raise LoraError(f"no LCM-LoRA is published for {family.description.split(',')[0]}", other)
    path = Path(family.lcm_lora)
    if not path.is_absolute():
        try:
            path = fetch(family.lcm_lora, [LCM_LORA_FILE]) / LCM_LORA_FILE
        except ConnectionError as error:
            raise LoraError(
                f"the LCM-LoRA {family.lcm_lora} is not in the hub cache and can't be downloaded: {error}",
                other,
            ) from error
    if not path.is_file():
        raise LoraError(f"the LCM-LoRA {path} is missing", other)
    return path


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata. LoraError for anything else; a pickle is never opened."""
    from safetensors import SafetensorError, safe_open

    if path.stat().st_size == 0:
        raise LoraError(f"{path} is empty", "download it again")

    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            return tensors, handle.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        # Asked only now: the length that a safetensors file begins with may look like a pickle too.
        if looks_like_pickle(path):
            raise LoraError(
                f"{path} is a pickle, whatever its name; opening one can run any code, so it is never opened",
                "get the LoRA as .safetensors",
            ) from error
        raise LoraError(f"{path} is no whole safetensors file: {error}", "download it again") from error


def looks_like_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(2)
    return head == b"PK" or head[:1] == b"\x80"


def read_lora(path: Path) -> Lora:
    """Reads a LoRA of either layout.

    LoraError: not safetensors, NaN or infinite weights, keys of no known layout, or half a pair.
    """
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise LoraError(f"{path} holds no tensors", "download it again")
    broken = [key for key, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise LoraError(f"{path} has NaN or infinite weights in {some(broken)}", "download it again")
    layers: dict[tuple[str, str], LoraLayer] = {}
    layouts, unknown = set(), []
    for key, tensor in tensors.items():
        if match := KOHYA_KEY.fullmatch(key):
            component, module, part = KOHYA_PREFIXES[match[1]], match[2], match[3]
            layouts.add("kohya")
        elif match := PEFT_KEY.fullmatch(key):
            component, module, part = match[1] or "unet", match[2], match[3] or match[4]
            layouts.add("peft")
        else:
            unknown.append(key)
            continue
        layer = layers.setdefault((component, module), LoraLayer(component, module))
        layer.keys.append(key)
        side = "alpha" if part == "alpha" else "down" if DOWN.search(part) else "up"
        if getattr(layer, side) is not None:
            raise LoraError(f"{path} updates {module} twice: {some(layer.keys)}", "save the LoRA again")
        if tensor.numel() == 0 or (tensor.numel() > 1 if side == "alpha" else tensor.ndim < 2):
            raise LoraError(f"{path}: {key} has the shape {list(tensor.shape)}", "download it again")
        setattr(layer, side, float(tensor) if side == "alpha" else tensor)
    made_for = guess_base(tensors)
    if unknown:
        raise LoraError(
            f"{path}: {len(unknown)} of {len(tensors)} keys are of no LoRA layout known here "
            f"(kohya or diffusers/PEFT): {some(unknown)}. The file seems made for {made_for}",
            "LoHa, LoKr, DoRA and full differences can't be fused yet",
        )
    halves = [
        key for layer in layers.values() if layer.down is None or layer.up is None for key in layer.keys
    ]
    if halves:
        raise LoraError(f"{path} lacks the other half of {some(halves)}", "download it again")
    apply_metadata(layers.values(), metadata, path)
    return Lora(path, "+".join(sorted(layouts)), list(layers.values()), made_for)


def apply_metadata(layers: Iterable[LoraLayer], metadata: Mapping[str, str], path: Path) -> None:
    """Takes α from the adapter settings that diffusers writes into a PEFT file's metadata."""
    try:
        adapter = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        for layer in layers:
            prefix = f"{layer.component}."
            settings = {k.removeprefix(prefix): v for k, v in adapter.items() if k.startswith(prefix)}
            if settings.get("use_dora"):
                raise LoraError(f"{path} is a DoRA, which can't be fused yet", "get it as a plain LoRA")
            if layer.alpha is not None or "lora_alpha" not in settings:
                continue
            patterns = dict(settings.get("alpha_pattern") or {})
            matched = [a for name, a in patterns.items() if re.fullmatch(rf"(.*\.)?{name}", layer.module)]
            layer.alpha = float(matched[0] if matched else settings["lora_alpha"])
            if not math.isfinite(layer.alpha):
                raise ValueError(f"alpha is {layer.alpha}")
            if settings.get("use_rslora"):  # Kalajdzievski 2023: α/√r in place of α/r
                assert layer.down is not None
                layer.alpha *= layer.down.shape[0] ** 0.5
    except (ValueError, TypeError, re.error) as error:
        raise LoraError(f"{path}: its adapter metadata is broken: {error}", "save the LoRA again") from error


def guess_base(tensors: Mapping[str, torch.Tensor]) -> str:
    """What base a LoRA's keys and shapes point to, for people to read."""
    widths = {
        int(tensor.shape[1])
        for key, tensor in tensors.items()
        if tensor.ndim > 1 and re.search(r"attn2[._](to_k|to_v)\.(lora_down|lora_A|lora\.down)", key)
    }
    if len(widths) == 1:
        width = widths.pop()
        return TEXT_WIDTHS.get(width, f"a base whose text states are {width} wide")
    if any("te2_" in key or "text_encoder_2" in key for key in tensors):
        return TEXT_WIDTHS[2048]
    if any(key.startswith("transformer.") or "double_blocks" in key for key in tensors):
        return "a transformer (SD3, Flux, …), not a UNet"
    return "an unknown base"


def some(keys: Sequence[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def plain_module_name(name: str, flat: bool) -> str:
    """One spelling for a text encoder's modules: some transformers versions nest them in `text_model`."""
    name = name.removeprefix("text_model_" if flat else "text_model.")
    return name.replace(".", "_") if flat else name


def match_layers(
    lora: Lora, modules: Mapping[str, torch.nn.Module]
) -> list[tuple[LoraLayer, torch.nn.Module]]:
    """Each layer with the module it updates. LoraError where any has none, or has another shape."""
    import torch

    index: dict[tuple[str, str], torch.nn.Module] = {}
    for component, root in modules.items():
        for name, module in root.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                dotted = plain_module_name(name, flat=False)
                index[component, dotted] = index[component, dotted.replace(".", "_")] = module
    matched, unmatched, misshapen = [], [], []
    for layer in lora.layers:
        name = plain_module_name(layer.module, flat="." not in layer.module)
        module = index.get((layer.component, name))
        if module is None:
            unmatched += layer.keys
            continue
        weight = module.weight
        assert isinstance(weight, torch.Tensor) and layer.down is not None and layer.up is not None
        down, up = layer.down, layer.up
        fits = (
            up.flatten(1).shape[1] == down.shape[0]
            and down.flatten(1).shape[1] == weight.flatten(1).shape[1]
            and up.shape[0] == weight.shape[0]
        )
        if not fits:
            rank = down.shape[0]
            misshapen.append(
                f"{layer.module} (update {up.shape[0]}×{down.flatten(1).shape[1]} of rank {rank}, "
                f"weight {weight.shape[0]}×{weight.flatten(1).shape[1]})"
            )
            continue
        matched.append((layer, module))
    if unmatched or misshapen:
        reasons = []
        if unmatched:
            reasons.append(f"{len(unmatched)} keys match no module: {some(unmatched)}")
        if misshapen:
            reasons.append(f"{len(misshapen)} modules have another shape: {some(misshapen)}")
        raise LoraError(
            f"{lora.path} does not fit this base: {'; '.join(reasons)}. It seems made for {lora.made_for}",
            "use a LoRA made for this base, or the base it was made for",
        )
    return matched


def fuse_loras(
    modules: Mapping[str, torch.nn.Module], loras: Sequence[tuple[Lora, LoraSpec]]
) -> list[LoraProvenance]:
    """Adds Σ λ·(α/r)·B·A to the weights, in fp32 and in place, once every LoRA is known to fit."""
    import torch

    matched = [(lora, spec, match_layers(lora, modules)) for lora, spec in loras]
    provenance = []
    with torch.no_grad():
        for lora, spec, pairs in matched:
            largest = 0.0
            for layer, module in pairs:
                weight = module.weight
                assert isinstance(weight, torch.Tensor)
                delta = layer.delta().reshape(weight.shape)
                largest = max(largest, float(delta.abs().max()))
                weight += spec.weight * delta
            if largest == 0.0:
                raise LoraError(f"{lora.path} changes nothing: every update in it is zero", "leave it out")
            ranks = sorted({layer.down.shape[0] for layer, _ in pairs if layer.down is not None})
            provenance.append(LoraProvenance(spec.source, spec.weight, lora.layout, len(pairs), tuple(ranks)))
    return provenance
