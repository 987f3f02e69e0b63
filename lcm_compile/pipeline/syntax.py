"""Reads a prompt as pieces of text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt's text, the weight of its tokens, and whether it begins a chunk."""

    text: str
    weight: float = 1.0
    begins_chunk: bool = False


def read_prompt(prompt: str, syntax: str) -> tuple[Piece, ...]:
    """Returns the pieces of a prompt."""
    return (Piece(prompt),)
