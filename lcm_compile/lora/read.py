"""Reads LoRA files without ever running code from them, and sorts their tensors into one update per module.

It reads these layouts:

- kohya, also written by webui and LyCORIS: `lora_unet_down_blocks_0_….lora_down.weight`, `lora_up`, `alpha`,
  with `lora_te_`, `lora_te1_` and `lora_te2_` for text encoders.
- diffusers/PEFT: `unet.down_blocks.0.….lora_A.weight`, `lora_B`.
- older diffusers: `….attn1.processor.to_q_lora.down.weight`.
- ComfyUI, and OneTrainer for it: `diffusion_model.input_blocks.4.….lora_up.weight`, with
  `text_encoders.clip_l.transformer.` and `text_encoders.clip_g.transformer.` for text encoders.
- OMI (the open model initiative, OneTrainer): `unet.input_blocks.4.….lora_up.weight`, with `clip_l.` and
  `clip_g.`.

The names of a UNet's modules may be diffusers' or the original Stable Diffusion's (`input_blocks_4_1_…`):
`match.py` finds the module for both. `kinds.py` says how the keys of each kind of update end. A file may also
hold embeddings of words, under `bundle_emb.WORD.…`.
"""

from __future__ import annotations

import glob
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path

import torch

from lcm_compile.checkpoint import weight_files
from lcm_compile.checkpoint.families import lora_bases, names_of_width
from lcm_compile.checkpoint.weight_files import is_pickle, named_tensors, unpickle
from lcm_compile.errors import CheckpointError, LoraError, first_few
from lcm_compile.lora.embeddings import bundled_embeddings, is_skipped, refuse_inversion
from lcm_compile.lora.find import PlannedLora
from lcm_compile.lora.kinds import (
    EXTRAS,
    KIND_NAMES,
    KIND_TABLE,
    KINDS,
    MAY_BE_VECTORS,
    NUMBERS,
    Update,
    settle_factors,
)
from lcm_compile.lora.peft_folder import as_one_file, lora_files_of
from lcm_compile.spec import LoraSpec

SAVE_AGAIN = "save the LoRA again, or use another"
# The beginnings of keys in kohya's layout, whose module names are flat (`_` for `.`), with their components.
FLAT_PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
# The beginnings of keys with dotted module names, by component. Keys without any are the UNet's.
COMPONENTS = {
    "unet": r"(?:lora_)?unet|(?:model\.)?diffusion_model",
    "text_encoder_2": r"text_encoder_2|lora_te2|(?:text_encoders\.|lora_)?clip_g(?:\.transformer)?",
    "text_encoder": r"text_encoder|lora_te1?|(?:text_encoders\.|lora_)?clip_[lh](?:\.transformer)?",
}
# What PEFT, torch.compile, DistributedDataParallel, FSDP and checkpointing put into a module's name.
WRAPPERS = re.compile(
    r"(?<![^.])(?:base_model\.model|_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
FLAT_WRAPPERS = re.compile(r"^module_|_orig_mod_")
# How a key ends, by what its tensor is to the update: a factor or an extra, under its name in `kinds.py`.
ENDINGS = EXTRAS | {name: ending for kind in KIND_TABLE for name, ending in kind.endings.items()}
KEY = re.compile(
    rf"(?:(?P<flat>{'|'.join(FLAT_PREFIXES)})"
    rf"|(?:(?:{'|'.join(f'(?P<{name}>{prefix})' for name, prefix in COMPONENTS.items())})\.)?)"
    r"(?P<module>.+?)"
    rf"(?:{'|'.join(f'(?P<{name}>{ending})' for name, ending in ENDINGS.items())})"
)
# How the keys of known kinds end that can't be fused.
NOT_FUSED = {
    r"\.(oft_R|scaled_oft)\b": "an OFT of PEFT or OneTrainer, whose settings are not in the file",
    r"\.boft_(R|s)\b": "a BOFT of PEFT",
    r"\.ia3_l\b": "an (IA)³ of PEFT",
    r"\.oft_diag$": "an OFT of an old version of LyCORIS",
    r"\.lora_embedding_[AB]\b": "a LoRA of an embedding, as PEFT writes it",
    r"\.(lambda_layer|[pq]_layer\.weight)$": "a T-LoRA of LyCORIS, which changes with the timestep",
    r"\.vera_lambda_[bd]\b": "a VeRA of PEFT",
}
# Older diffusers versions call a text encoder's projections by the names that they have in a UNet.
OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class LoraLayer:
    """The update of one module, and the keys of the file's tensors that it was made from."""

    component: str
    module: str
    keys: list[str]
    update: Update


@dataclass(frozen=True)
class Lora:
    """A file's updates, one per layer.

    `layout` is `kohya`, `peft` or `kohya+peft`. `guess` says in words which base the LoRA is for, as far as
    its keys and the width of its text states show that. `metadata` comes from the safetensors file, or from
    the config in a PEFT folder; it is empty for a pickle. `skipped` is the number of keys that were left out,
    by the pattern that they match. `embeddings` are the keys of the words that the file brings along.
    """

    path: Path
    layout: str
    layers: Sequence[LoraLayer]
    guess: str
    metadata: Mapping[str, str]
    skipped: Mapping[str, int] = field(default_factory=dict)
    embeddings: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        """The different ranks of its updates, in ascending order."""
        return sorted({layer.update.rank for layer in self.layers if layer.update.rank is not None})

    @property
    def alphas(self) -> list[float]:
        """The different values of α in the file, in ascending order."""
        return sorted({layer.update.alpha for layer in self.layers if layer.update.alpha is not None})

    @property
    def kinds(self) -> dict[str, int]:
        """The number of updates of each kind, by the kind's name."""
        return dict(Counter(layer.update.name for layer in self.layers))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Returns a file's tensors by key, and its metadata.

    Raises LoraError if the file is neither a safetensors file nor a pickle of named weights.
    """
    try:
        if not is_pickle(path):
            return weight_files.read_tensors(path)
        content = unpickle(path)
        if isinstance(content, dict) and "string_to_param" in content:
            refuse_inversion(path, content)
        return named_tensors(path, content), {}
    except CheckpointError as error:
        raise LoraError(error.message, error.hint) from error


def read_loras(planned: Iterable[PlannedLora], skip: Sequence[str] = ()) -> list[tuple[Lora, LoraSpec]]:
    """Returns the LoRAs of a build, each with the strengths it is fused with.

    Raises LoraError as read_lora does, or if a pattern of `skip` matches no key.
    """
    loras = [(read_lora(lora.path, skip), lora.spec) for lora in planned]
    check_patterns([lora for lora, _ in loras], skip)
    return loras


def check_patterns(loras: Sequence[Lora], skip: Sequence[str]) -> None:
    """Raises LoraError if a pattern matches no key of any of these LoRAs."""
    useless = [pattern for pattern in skip if not any(pattern in lora.skipped for lora in loras)]
    if useless:
        files = first_few([str(lora.path) for lora in loras])
        raise LoraError(
            f"--lora-skip {shlex.quote(useless[0])} matches no key of {files or 'a LoRA, as there is none'}",
            "mend the pattern, in which * stands for any characters, or drop it",
        )


def read_lora(path: Path, skip: Sequence[str] = ()) -> Lora:
    """Returns the LoRA in a file of any layout and kind, or in a folder that PEFT wrote.

    Keys that match a pattern of `skip` are left out. Raises LoraError if the file can't be read or is no
    LoRA, if weights are NaN or infinite, if keys have no known layout, if an update lacks a factor, mixes
    several kinds or has factors that do not fit each other, or if the file has two updates of one module.
    """
    tensors, metadata = read_tensors(lora_files_of(path)[-1])
    if not tensors:
        raise LoraError(f"{path} holds no tensors", "give the LoRA's own file")
    counts = {pattern: sum(fnmatchcase(key, pattern) for key in tensors) for pattern in skip}
    embeddings = bundled_embeddings(key for key in tensors if not is_skipped(key, skip))
    left_out = {key for keys in embeddings.values() for key in keys}
    tensors = {
        key: tensor for key, tensor in tensors.items() if key not in left_out and not is_skipped(key, skip)
    }
    if not tensors:
        held = (
            "--lora-skip leaves nothing of it"
            if any(counts.values())
            else "it holds embeddings of words only"
        )
        raise LoraError(f"{path} is no LoRA to fuse: {held}", "drop this LoRA")
    if not any(KEY.fullmatch(WRAPPERS.sub("", key)) for key in tensors):
        refuse_inversion(path, tensors)
    if path.is_dir():
        tensors, metadata = as_one_file(path, tensors)
    broken = [key for key, tensor in tensors.items() if tensor.numel() and not is_finite(tensor)]
    if broken:
        raise LoraError(f"{path} has NaN or infinite weights in {first_few(broken)}", SAVE_AGAIN)
    found: dict[tuple[str, str], dict[str, str]] = {}
    layouts, unknown = set(), []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(WRAPPERS.sub("", key))
        if match is None or not is_of_a_lora(match, key, tensors):
            unknown.append(key)
            continue
        layouts.add("kohya" if match["flat"] else "peft")
        name = next(name for name in ENDINGS if match[name])
        keys = found.setdefault(module_named(match), {})
        if name in keys:
            raise LoraError(
                f"{path} updates {match['module']} twice: {first_few([keys[name], key])}",
                "leave one of the two out with --lora-skip PATTERN, which the names of its keys match",
            )
        if not is_possible_shape(name, tensor):
            raise LoraError(
                f"{path}: {key} has the shape {list(tensor.shape)}, which can't be right", SAVE_AGAIN
            )
        keys[name] = key
    guess = base_by_width(tensors)
    if unknown:
        known = next((name for end, name in NOT_FUSED.items() if re.search(end, unknown[0])), None)
        raise LoraError(
            f"{path}: {len(unknown)} of {len(tensors)} keys are of no LoRA layout that can be read "
            f"(kohya or diffusers/PEFT): {first_few(unknown)}"
            + (f", which are those of {known}" if known else "")
            + f". The file seems to be made for {guess}",
            f"get the LoRA as one of the kinds that can be fused: {', '.join(KIND_NAMES)}"
            + skip_advice(unknown, [*tensors]),
        )
    layers = [
        LoraLayer(
            component, module, list(keys.values()), as_update({name: tensors[k] for name, k in keys.items()})
        )
        for (component, module), keys in found.items()
    ]
    check_complete(layers, path)
    check_factors(layers, path)
    apply_metadata(layers, metadata, path)
    for layer in layers:
        layer.update.settle_bias()
    skipped = {pattern: count for pattern, count in counts.items() if count}
    return Lora(path, "+".join(sorted(layouts)), layers, guess, metadata, skipped, embeddings)


def skip_advice(stray: Sequence[str], keys: Collection[str]) -> str:
    """Returns how to leave stray keys out, for a hint; nothing if they are half of a LoRA's keys or more."""
    if 2 * len(stray) >= len(keys):
        return ""
    ends = takewhile(lambda pair: pair[0] == pair[1], zip(min(stray), max(stray), strict=False))
    start = "".join(letter for letter, _ in ends)
    pattern = glob.escape(start) + "*" if sum(key.startswith(start) for key in keys) == len(stray) else None
    return f"; or leave the stray keys out: --lora-skip {shlex.quote(pattern) if pattern else 'PATTERN'}"


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether no value is NaN or infinite.

    The minimum and the maximum show that, because they are NaN if any value is. So no copy of a large file's
    tensors is made.
    """
    wide = tensor if tensor.element_size() > 1 else tensor.float()  # float8 values can't be compared
    return all(math.isfinite(end) for end in wide.aminmax())


def is_of_a_lora(match: re.Match[str], key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether a key that KEY matches belongs to a LoRA: a checkpoint's own keys end in `.weight` too.

    Those of an (IA)³ have an `.on_input` beside them.
    """
    return not match["ia3_weight"] or key.removesuffix("weight") + "on_input" in tensors


def is_possible_shape(name: str, tensor: torch.Tensor) -> bool:
    """Returns whether a factor or extra can have this tensor's shape: it is not empty and has enough axes."""
    if name in NUMBERS:
        return tensor.numel() == 1
    return tensor.numel() > 0 and tensor.ndim >= (1 if name in MAY_BE_VECTORS else 2)


def module_named(match: re.Match[str]) -> tuple[str, str]:
    """Returns the component and the module that a key names, as diffusers spells them today.

    A flat module name stays flat.
    """
    module = match["module"]
    if match["flat"]:
        return FLAT_PREFIXES[match["flat"]], FLAT_WRAPPERS.sub("", module)
    component = next((name for name in COMPONENTS if match[name]), "unet")
    parent, _, last = module.replace(".processor.", ".").rpartition(".")
    if component != "unet":
        last = OLD_TEXT_NAMES.get(last, last)
    elif last == "to_out":
        last = "to_out.0"
    return component, f"{parent}.{last}" if parent else last


def as_update(tensors: dict[str, torch.Tensor]) -> Update:
    """Returns the update that a module's factors and extras make, and removes the extras from `tensors`."""
    alpha, magnitude = tensors.pop("alpha", None), tensors.pop("magnitude", None)
    if magnitude is not None:
        # PEFT's magnitude always runs along the outputs; for a convolution it is stored as (1, out, 1, 1).
        magnitude = magnitude.flatten()
    elif "dora_scale" in tensors:
        magnitude = tensors.pop("dora_scale")
    bias = tensors.pop("diff_b", None)
    settle_factors(tensors)
    return Update(tensors, None if alpha is None else float(alpha), magnitude, bias)


def check_complete(layers: Iterable[LoraLayer], path: Path) -> None:
    """Raises LoraError if a layer lacks a factor of its kind, or mixes the factors of several kinds."""
    incomplete, mixed = [], []
    for layer in layers:
        update, factors = layer.update, frozenset(layer.update.factors)
        if factors in KINDS and (factors or update.bias is not None):
            # A magnitude comes with the factors of a low-rank change: no tool writes one with another kind.
            if update.magnitude is not None and (factors <= {"diff"} or not update.is_additive):
                mixed += layer.keys
        elif any(factors < complete for complete in KINDS):
            incomplete += layer.keys
        else:
            mixed += layer.keys
    if incomplete:
        raise LoraError(f"{path} lacks factors that go with {first_few(incomplete)}", SAVE_AGAIN)
    if mixed:
        raise LoraError(f"{path} mixes the factors of several kinds in {first_few(mixed)}", SAVE_AGAIN)


def check_factors(layers: Iterable[LoraLayer], path: Path) -> None:
    """Raises LoraError if the factors of a layer do not fit each other."""
    reasons = []
    for layer in layers:
        try:
            layer.update.check_factors()
        except ValueError as error:
            reasons.append(f"{layer.module} ({error})")
    if reasons:
        raise LoraError(
            f"{path} can't be used with any base: {len(reasons)} of its updates have factors of the wrong "
            f"shapes: {first_few(reasons)}",
            SAVE_AGAIN,
        )


def apply_metadata(layers: Iterable[LoraLayer], metadata: Mapping[str, str], path: Path) -> None:
    """Sets α where a layer has none, from the adapter settings that diffusers writes into a file's metadata.

    Raises LoraError if the settings are broken, or if they say DoRA and a layer has no magnitude.
    """
    try:
        adapter = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        for layer in layers:
            update, prefix = layer.update, f"{layer.component}."
            settings = {k.removeprefix(prefix): v for k, v in adapter.items() if k.startswith(prefix)}
            if settings.get("use_dora") and update.magnitude is None:
                raise LoraError(
                    f"{path} is a DoRA that lacks the magnitude of {first_few(layer.keys)}",
                    SAVE_AGAIN,
                )
            if update.alpha is not None or "lora_alpha" not in settings:
                continue
            patterns = dict(settings.get("alpha_pattern") or {})
            matched = [a for name, a in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", layer.module)]
            update.alpha = float(matched[0] if matched else settings["lora_alpha"])
            if not math.isfinite(update.alpha):
                raise ValueError(f"alpha is {update.alpha}")
            # Rank-stabilised LoRA (Kalajdzievski 2023) scales by α/√r instead of α/r.
            if settings.get("use_rslora") and update.rank:
                update.alpha *= update.rank**0.5
    except (ValueError, TypeError, re.error) as error:
        raise LoraError(f"{path}: its adapter metadata is broken: {error}", "save the LoRA again") from error


def base_by_width(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns in words which base a LoRA's keys and shapes point to."""
    by_width = re.compile(
        r"attn2[._](processor\.)?to_[kv](_lora\.down|\.(lora_down|lora_A|lora\.down|hada_w1_b|diff))"
    )
    widths = {int(t.shape[1]) for key, t in tensors.items() if t.ndim > 1 and by_width.search(key)}
    if len(widths) == 1:
        width = widths.pop()
        return names_of_width(width) or f"a base whose text states are {width} wide"
    if any(re.search(r"te2[_.]|text_encoder_2|clip_g\.", key) for key in tensors):
        return " or ".join(family.short for family in lora_bases() if "text_encoder_2" in family.models)
    if any(key.startswith("transformer.") or "double_blocks" in key for key in tensors):
        return "a transformer (SD3, Flux, …), not a UNet"
    return "an unknown base"
