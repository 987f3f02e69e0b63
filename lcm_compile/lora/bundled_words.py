"""Adds the words that a LoRA's file brings along, as textual inversions, to the base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lcm_compile.checkpoint.checkpoint import Checkpoint, PlannedEmbedding
from lcm_compile.checkpoint.weight_files import read_header
from lcm_compile.errors import CheckpointError
from lcm_compile.lora.embeddings import bundled_embeddings, is_skipped
from lcm_compile.lora.find import PlannedLora
from lcm_compile.spec import EmbeddingSpec


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
    try:
        return read_header(path)[0]
    except CheckpointError:
        return ()
