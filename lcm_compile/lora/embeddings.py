"""Finds embeddings of words (textual inversions): in a LoRA's file, or in a file that holds nothing else.

Pivotal tuning trains a LoRA together with words of its captions. webui's and OneTrainer's bundles hold both:
`bundle_emb.WORD.string_to_param.*`, or `bundle_emb.WORD.clip_l` and `bundle_emb.WORD.clip_g`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.errors import LoraError, first_few

if TYPE_CHECKING:
    import torch

BUNDLED = re.compile(r"bundle_emb\.(?P<word>.+?)\.(?:string_to_param\.[^.]+|[^.]+)")
# The keys of a textual inversion's file. diffusers' files have the word itself as their only key.
ENCODER_KEYS = {"clip_l", "clip_g", "clip_h", "text_encoders_0", "text_encoders_1"}
MOST_VECTORS = 77  # of a word: a prompt has no more tokens


def bundled_embeddings(keys: Iterable[str]) -> dict[str, list[str]]:
    """Returns the words whose embeddings are among a LoRA's keys, each with its keys."""
    words: dict[str, list[str]] = {}
    for key in keys:
        if found := BUNDLED.fullmatch(key):
            words.setdefault(found["word"], []).append(key)
    return words


def check_embeddings(
    path: Path, words: Collection[str], used: Collection[tuple[Path, str | None]] = ()
) -> None:
    """Raises LoraError if a LoRA's file has embeddings that nothing uses.

    `used` are the textual inversions of a build: each with its file, and the word that was given for it, if
    there was one.
    """
    here = {word for file, word in used if file == path}
    left = [] if len(words) == 1 and here else [word for word in words if word not in here]
    if left:
        raise LoraError(
            f"{path} contains embeddings besides a LoRA, for {len(left)} "
            f"word{'s' if len(left) > 1 else ''}: {first_few(left)}",
            f"use one with --embedding {shlex.quote(f'{path}:{left[0]}')}, or leave all out with "
            "--lora-skip 'bundle_emb.*'",
        )


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
