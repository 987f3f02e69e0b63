"""Finds embeddings of words (textual inversions): in a LoRA's file, or in a file that holds nothing else.

Pivotal tuning trains a LoRA together with words of its captions, and one file may hold both.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.checkpoint.checkpoint import Checkpoint, PlannedEmbedding
from lcm_compile.checkpoint.embeddings import IN_LORA
from lcm_compile.checkpoint.weight_files import read_header
from lcm_compile.errors import CheckpointError, LoraError
from lcm_compile.lora.find import PlannedLora
from lcm_compile.spec import EmbeddingSpec

if TYPE_CHECKING:
    import torch

# The keys of a textual inversion's file. diffusers' files have the word itself as their only key.
ENCODER_KEYS = {"clip_l", "clip_g", "clip_h", "text_encoders_0", "text_encoders_1"}
MOST_VECTORS = 77  # of a word: a prompt has no more tokens


def bundled_embeddings(keys: Iterable[str]) -> dict[str, list[str]]:
    """Returns the words whose embeddings are among a LoRA's keys, each with its keys."""
    words: dict[str, list[str]] = {}
    for key in keys:
        if found := IN_LORA.fullmatch(key):
            words.setdefault(found["word"], []).append(key)
    return words


def with_bundled_words(
    checkpoint: Checkpoint, loras: Sequence[PlannedLora], skip: Sequence[str]
) -> Checkpoint:
    """Returns the checkpoint with the words that LoRAs bring along as textual inversions, and a note of each.

    Keys that match a pattern of `skip` bring none along. A word that was asked for under another name has
    that name alone.
    """
    words, notes = list(checkpoint.embeddings), list(checkpoint.notes)
    for lora in loras:
        bundled = bundled_embeddings(key for key in keys_of(lora.path) if not is_skipped(key, skip))
        same = [own for own in checkpoint.embeddings if own.path.resolve() == lora.path.resolve()]
        asked = {planned.spec.token for planned in same}
        for word in bundled:
            if word not in asked and not (asked and len(bundled) == 1):
                words.append(PlannedEmbedding(EmbeddingSpec(str(lora.path), word), lora.path))
                notes.append(f"{lora.path} brings the textual inversion {word!r} along: write it in prompts")
    return replace(checkpoint, embeddings=tuple(words), notes=tuple(notes))


def keys_of(path: Path) -> Iterable[str]:
    """Returns the keys of a LoRA's file; none if it is PEFT's folder or can't be read, as read_lora tells."""
    if path.is_dir():
        return ()
    if path.suffix.lower() == ".safetensors":
        try:
            return read_header(path)[0]
        except CheckpointError:
            return ()
    from lcm_compile.lora.read import read_tensors

    try:
        return read_tensors(path)[0]
    except LoraError:
        return ()


def is_skipped(key: str, skip: Sequence[str]) -> bool:
    """Returns whether a key matches one of the patterns."""
    return any(fnmatchcase(key, pattern) for pattern in skip)


def refuse_inversion(path: Path, content: Mapping[Any, Any]) -> None:
    """Raises LoraError if a file's content is a textual inversion. None of its keys may be a LoRA's."""
    import torch

    values = content.get("string_to_param", content)
    vectors = [value for value in dict(values).values() if isinstance(value, torch.Tensor)]
    known = "string_to_param" in content or {*content} <= ENCODER_KEYS or {*content} == {"emb_params"}
    if vectors and (known or (len(vectors) == len(content) and looks_like_words(content))):
        count = 1 if vectors[0].ndim < 2 else vectors[0].shape[0]
        widths = " and ".join(map(str, sorted({vector.shape[-1] for vector in vectors})))
        text = f"{count} vector{'s' if count > 1 else ''} of {widths}"
        raise LoraError(
            f"{path} is a textual inversion ({text}), not a LoRA",
            shlex.join(["--embedding", str(path)]) + " in place of --lora",
        )


def looks_like_words(content: Mapping[str, torch.Tensor]) -> bool:
    """Returns whether all tensors can be the vectors (n, width) of words, which are their keys."""
    return all(
        "." not in key
        and tensor.ndim in (1, 2)
        and tensor.shape[-1] > 1
        and (tensor.ndim == 1 or tensor.shape[0] <= MOST_VECTORS)
        for key, tensor in content.items()
    )
