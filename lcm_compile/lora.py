"""LoRAs: found, matched to a base's modules key by key, and fused exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.errors import LoraError
from lcm_compile.families import LCM_LORA_FILE, Family
from lcm_compile.hub import fetch
from lcm_compile.lora_files import Lora, LoraLayer, read_lora, some
from lcm_compile.lora_kinds import Update
from lcm_compile.lora_names import original_name, original_names
from lcm_compile.spec import LoraSpec, user_path

if TYPE_CHECKING:
    import torch

__all__ = [
    "LoraProvenance",
    "check_loras",
    "find_lcm_lora",
    "find_lora",
    "fuse_loras",
    "match_layers",
    "merge_loras",
    "read_lora",
]


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


def plain_module_name(name: str, flat: bool) -> str:
    """One spelling for a text encoder's modules: some transformers versions nest them in `text_model`."""
    name = name.removeprefix("text_model_" if flat else "text_model.")
    return name.replace(".", "_") if flat else name


def match_layers(
    lora: Lora, modules: Mapping[str, torch.nn.Module]
) -> list[tuple[LoraLayer, torch.nn.Module]]:
    """Each layer with the module it updates. LoraError where any has none, or another shape."""
    index = index_modules(modules)
    matched: list[tuple[LoraLayer, torch.nn.Module]] = []
    owners: dict[torch.nn.Module, LoraLayer] = {}
    unmatched, misshapen = [], []
    for layer in lora.layers:
        name = plain_module_name(layer.module, flat="." not in layer.module)
        module = index.get((layer.component, name))
        if module is None:
            unmatched += layer.keys
            continue
        if module in owners:
            keys = some([owners[module].keys[0], layer.keys[0]])
            raise LoraError(f"{lora.path} updates {layer.module} twice: {keys}", "save the LoRA again")
        owners[module] = layer
        if reason := misfit(layer.update, module):
            misshapen.append(f"{layer.module} ({reason})")
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


def index_modules(modules: Mapping[str, torch.nn.Module]) -> dict[tuple[str, str], torch.nn.Module]:
    """(component, name) → module, under each name that a LoRA may call it by, dotted and flat."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm)
    index: dict[tuple[str, str], torch.nn.Module] = {}
    for component, root in modules.items():
        originals = original_names(root) if component == "unet" else {}
        for name, module in root.named_modules():
            if isinstance(module, kinds):
                names = {plain_module_name(name, flat=False), original_name(name, originals)}
                for dotted in names:
                    index[component, dotted] = index[component, dotted.replace(".", "_")] = module
    return index


def misfit(update: Update, module: torch.nn.Module) -> str | None:
    """Why an update can't be a module's, by shapes alone; None where it can."""
    bias = bias_of(module)
    try:
        update.delta(weight_of(module).to("meta"))
    except ValueError as error:
        return str(error)
    if update.bias is None or (bias is not None and update.bias.shape == bias.shape):
        return None
    return f"bias update {list(update.bias.shape)}, bias {None if bias is None else list(bias.shape)}"


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    import torch

    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def bias_of(module: torch.nn.Module) -> torch.Tensor | None:
    import torch

    bias = module.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    return bias


def check_loras(
    modules: Mapping[str, torch.nn.Module], loras: Sequence[tuple[Lora, LoraSpec]]
) -> list[LoraProvenance]:
    """How each LoRA goes into these modules, which need no weights. LoraError where one can't, or is zero."""
    provenance = []
    for lora, spec in loras:
        pairs = match_layers(lora, modules)
        if not any(changes(layer.update, module) for layer, module in pairs):
            raise LoraError(f"{lora.path} changes nothing: every update in it is zero", "leave it out")
        ranks = sorted({layer.update.rank for layer, _ in pairs if layer.update.rank is not None})
        provenance.append(LoraProvenance(spec.source, spec.weight, lora.layout, len(pairs), tuple(ranks)))
    return provenance


def fuse_loras(
    modules: Mapping[str, torch.nn.Module], loras: Sequence[tuple[Lora, LoraSpec]]
) -> list[LoraProvenance]:
    """Merges LoRAs into a whole base, once every one is known to fit."""
    provenance = check_loras(modules, loras)
    merge_loras(modules, loras)
    return provenance


def merge_loras(modules: Mapping[str, torch.nn.Module], loras: Sequence[tuple[Lora, LoraSpec]]) -> None:
    """Adds Σ λ·ΔW to the weights and biases of these components, in fp32 and in place.

    A LoRA's layers for other components are left out. Each ΔW is computed against the base's own weight W,
    so several LoRAs add up in any order. A DoRA's is W' − W with the W' that it makes of the base alone: the
    others do not change its norms.
    """
    import torch

    work: dict[torch.nn.Module, list[tuple[float, Update]]] = {}
    with torch.no_grad():
        for lora, spec in loras:
            here = [layer for layer in lora.layers if layer.component in modules]
            for layer, module in match_layers(replace(lora, layers=here), modules):
                work.setdefault(module, []).append((spec.weight, layer.update))
        for module, updates in work.items():
            weight = weight_of(module)
            base = weight.clone()
            for strength, update in updates:
                weight += strength * update.delta(base)
                if update.bias is not None:
                    bias = bias_of(module)
                    assert bias is not None  # match_layers saw to it
                    bias += strength * update.bias.float()


def changes(update: Update, module: torch.nn.Module) -> bool:
    import torch

    weight, bias = weight_of(module), update.bias
    if weight.is_meta:
        weight = torch.zeros(weight.shape)
    return bool(update.delta(weight).any()) or (bias is not None and bool(bias.any()))
