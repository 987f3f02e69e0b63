"""Finds embeddings of words (textual inversions): in a LoRA's file, or in a file that holds nothing else.

Pivotal tuning trains a LoRA together with words of its captions, and one file may hold both.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.checkpoint.embeddings import ENCODERS, IN_LORA, MOST_VECTORS, NAMELESS
from lcm_compile.errors import LoraError

if TYPE_CHECKING:
    import torch


def bundled_embeddings(keys: Iterable[str]) -> dict[str, list[str]]:
    """Returns the words whose embeddings are among a LoRA's keys, each with its keys."""
    words: dict[str, list[str]] = {}
    for key in keys:
        if found := IN_LORA.fullmatch(key):
            words.setdefault(found["word"], []).append(key)
    return words


def is_skipped(key: str, skip: Sequence[str]) -> bool:
    """Returns whether a key matches one of the patterns."""
    return any(fnmatchcase(key, pattern) for pattern in skip)


def refuse_inversion(path: Path, content: Mapping[Any, Any]) -> None:
    """Raises LoraError if a file's content is a textual inversion. None of its keys may be a LoRA's."""
    import torch

    values = content.get("string_to_param", content)
    vectors = [value for value in dict(values).values() if isinstance(value, torch.Tensor)]
    known = "string_to_param" in content or {*content} <= {*ENCODERS, NAMELESS}
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
