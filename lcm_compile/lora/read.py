"""LoRA files: read without ever running code, and sorted into one update a module.

Layouts: kohya, webui and LyCORIS (`lora_unet_down_blocks_0_….lora_down.weight`, `lora_up`, `alpha`; text
encoders as `lora_te_`, `lora_te1_`, `lora_te2_`), diffusers/PEFT (`unet.down_blocks.0.….lora_A.weight`,
`lora_B`) and diffusers' older one (`….attn1.processor.to_q_lora.down.weight`). A UNet's modules may have
diffusers' names or the original Stable Diffusion's (`input_blocks_4_1_…`): `lora.match_layers` knows both.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lcm_compile.checkpoint.families import TEXT_WIDTHS
from lcm_compile.errors import LoraError
from lcm_compile.lora.kinds import KINDS, Update
from lcm_compile.lora.peft_folder import as_one_file, lora_files_of

PICKLES = (".bin", ".pt", ".pth")
FLAT_PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
KEY = re.compile(
    rf"(?:(?P<flat>{'|'.join(FLAT_PREFIXES)})"
    r"|(?:base_model\.model\.)?(?:(?P<component>unet|text_encoder_2|text_encoder|diffusion_model)\.)?)"
    r"(?P<module>.+?)"
    r"(?:[._]lora(?:_linear_layer)?[._](?P<side>down|up|mid|A|B)(?:\.default)?\.weight"
    r"|\.(?P<part>alpha|dora_scale|diff|diff_b|w_norm|b_norm|hada_w[12]_[ab]|hada_t[12]"
    r"|lokr_w[12](?:_[ab])?|lokr_t2)(?:\.default)?"
    r"|\.lora_magnitude_vector(?:\.default)?(?:\.weight)?)"
)
PARTS = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}  # names of the same thing
OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class LoraLayer:
    """The update of one module, and the keys that make it."""

    component: str
    module: str
    keys: list[str]
    update: Update


@dataclass(frozen=True)
class Lora:
    """A file's updates. `guess` tells the base that it is for by its text states' width alone."""

    path: Path
    layout: str
    layers: Sequence[LoraLayer]
    guess: str
    metadata: Mapping[str, str]

    @property
    def ranks(self) -> list[int]:
        return sorted({layer.update.rank for layer in self.layers if layer.update.rank is not None})

    @property
    def alphas(self) -> list[float]:
        return sorted({layer.update.alpha for layer in self.layers if layer.update.alpha is not None})

    @property
    def kinds(self) -> dict[str, int]:
        """How many modules are updated in each way."""
        return dict(Counter(layer.update.name for layer in self.layers))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors and metadata. LoraError for anything else.

    A pickle is opened under a pickle's name alone, and by torch's unpickler for weights, which runs no code.
    """
    from safetensors import SafetensorError, safe_open

    if path.stat().st_size == 0:
        raise LoraError(f"{path} is empty", "download it again")
    if path.suffix.lower() in PICKLES:
        return read_pickle(path), {}
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            return tensors, handle.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        # Asked only now: the length that a safetensors file begins with may look like a pickle too.
        if looks_like_pickle(path):
            raise LoraError(
                f"{path} is a pickle, which is never opened under this name",
                "get the LoRA as .safetensors, or name the file .bin if that is what it is",
            ) from error
        raise LoraError(f"{path} is no whole safetensors file: {error}", "download it again") from error


def looks_like_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(2)
    return head == b"PK" or head[:1] == b"\x80"


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes torch's unpickler raise has no common base
        reason = str(error).partition("\n")[0].split(". ")[0]
        raise LoraError(
            f"{path} is no pickle of weights alone, and nothing else is opened: {reason}",
            "get the LoRA as .safetensors",
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in loaded.items()
    ):
        raise LoraError(f"{path} is a pickle, but of no named tensors", "get the LoRA as .safetensors")
    return loaded


def read_lora(path: Path) -> Lora:
    """Reads a LoRA of any layout and kind: a file, or a folder of PEFT's.

    LoraError: a file that can't be read, NaN or infinite weights, keys of no known layout, or half a factor.
    """
    tensors, metadata = read_tensors(lora_files_of(path)[-1])
    if path.is_dir():
        tensors, metadata = as_one_file(path, tensors)
    if not tensors:
        raise LoraError(f"{path} holds no tensors", "download it again")
    broken = [key for key, tensor in tensors.items() if tensor.numel() and not is_finite(tensor)]
    if broken:
        raise LoraError(f"{path} has NaN or infinite weights in {some(broken)}", "download it again")
    found: dict[tuple[str, str], dict[str, str]] = {}
    layouts, unknown = set(), []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        layouts.add("kohya" if match["flat"] else "peft")
        part = match["side"] or match["part"] or "magnitude"
        part = PARTS.get(part, part)
        keys = found.setdefault(module_named(match), {})
        if part in keys:
            raise LoraError(
                f"{path} updates {match['module']} twice: {some([keys[part], key])}", "save the LoRA again"
            )
        if tensor.numel() == 0 or (tensor.numel() > 1 if part == "alpha" else tensor.ndim < axes(part)):
            raise LoraError(f"{path}: {key} has the shape {list(tensor.shape)}", "download it again")
        keys[part] = key
    guess = guess_base(tensors)
    if unknown:
        raise LoraError(
            f"{path}: {len(unknown)} of {len(tensors)} keys are of no LoRA layout known here "
            f"(kohya or diffusers/PEFT): {some(unknown)}. The file seems made for {guess}",
            "LoRA, LoCon, LoHa, LoKr, DoRA and full differences can be fused; get the LoRA as one of these",
        )
    layers = [
        LoraLayer(component, module, list(keys.values()), as_update({p: tensors[k] for p, k in keys.items()}))
        for (component, module), keys in found.items()
    ]
    check_complete(layers, path)
    apply_metadata(layers, metadata, path)
    return Lora(path, "+".join(sorted(layouts)), layers, guess, metadata)


def is_finite(tensor: torch.Tensor) -> bool:
    """By its ends alone, which are NaN where anything is: no copy of a large file's tensors is made."""
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # float8 has no order
    return all(math.isfinite(end) for end in wide.aminmax())


def axes(part: str) -> int:
    """The fewest that a part may have: vectors are magnitudes, biases and the weights of norms."""
    return 1 if part in ("dora_scale", "magnitude", "diff", "diff_b") else 2


def module_named(match: re.Match[str]) -> tuple[str, str]:
    """The component and the module that a key names, in today's spelling."""
    module = match["module"]
    if match["flat"]:
        return FLAT_PREFIXES[match["flat"]], module
    component = (match["component"] or "unet").replace("diffusion_model", "unet")
    parent, _, last = module.replace(".processor.", ".").rpartition(".")
    if component != "unet":
        last = OLD_TEXT_NAMES.get(last, last)
    elif last == "to_out":
        last = "to_out.0"
    return component, f"{parent}.{last}" if parent else last


def as_update(parts: dict[str, torch.Tensor]) -> Update:
    alpha, magnitude = parts.pop("alpha", None), parts.pop("magnitude", None)
    if magnitude is not None:
        # PEFT's runs along the outputs always; it keeps a convolution's as (1, out, 1, 1).
        magnitude = magnitude.flatten()
    elif "dora_scale" in parts:
        magnitude = parts.pop("dora_scale")
    bias = parts.pop("diff_b", None)
    return Update(parts, None if alpha is None else float(alpha), magnitude, bias)


def check_complete(layers: Iterable[LoraLayer], path: Path) -> None:
    halves, mixed = [], []
    for layer in layers:
        update, factors = layer.update, frozenset(layer.update.factors)
        if factors in KINDS and (factors or update.bias is not None):
            # Magnitudes come with factors; no tool writes them with a full difference.
            if update.magnitude is not None and factors <= {"diff"}:
                mixed += layer.keys
        elif any(factors < whole for whole in KINDS):
            halves += layer.keys
        else:
            mixed += layer.keys
    if halves:
        raise LoraError(f"{path} lacks the other half of {some(halves)}", "download it again")
    if mixed:
        raise LoraError(f"{path} mixes the parts of several kinds in {some(mixed)}", "save the LoRA again")


def apply_metadata(layers: Iterable[LoraLayer], metadata: Mapping[str, str], path: Path) -> None:
    """Takes α from the adapter settings that diffusers writes into a PEFT file's metadata."""
    try:
        adapter = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        for layer in layers:
            update, prefix = layer.update, f"{layer.component}."
            settings = {k.removeprefix(prefix): v for k, v in adapter.items() if k.startswith(prefix)}
            if settings.get("use_dora") and update.magnitude is None:
                raise LoraError(
                    f"{path} is a DoRA that lacks the magnitude of {some(layer.keys)}", "download it again"
                )
            if update.alpha is not None or "lora_alpha" not in settings:
                continue
            patterns = dict(settings.get("alpha_pattern") or {})
            matched = [a for name, a in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", layer.module)]
            update.alpha = float(matched[0] if matched else settings["lora_alpha"])
            if not math.isfinite(update.alpha):
                raise ValueError(f"alpha is {update.alpha}")
            if settings.get("use_rslora") and update.rank:  # Kalajdzievski 2023: α/√r in place of α/r
                update.alpha *= update.rank**0.5
    except (ValueError, TypeError, re.error) as error:
        raise LoraError(f"{path}: its adapter metadata is broken: {error}", "save the LoRA again") from error


def guess_base(tensors: Mapping[str, torch.Tensor]) -> str:
    """What base a LoRA's keys and shapes point to, for people to read."""
    by_width = re.compile(
        r"attn2[._](processor\.)?to_[kv](_lora\.down|\.(lora_down|lora_A|lora\.down|hada_w1_b|diff))"
    )
    widths = {int(t.shape[1]) for key, t in tensors.items() if t.ndim > 1 and by_width.search(key)}
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
