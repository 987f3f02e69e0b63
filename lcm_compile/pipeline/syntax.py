"""Reads prompts: as plain text, or in the syntax of A1111's web UI, which weights words and breaks chunks.

(word)      weight 1.1; ((word)) 1.21, and so on
(word:1.3)  weight 1.3
[word]      weight 1 / 1.1
\\(word\\)    brackets that are text; so are brackets without a partner that would have opened them
BREAK       the words after it begin another chunk
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lcm_compile.errors import UsageError

SYNTAXES = ("plain", "webui")
FACTORS = {"(": 1.1, "[": 1 / 1.1}  # of the weight of what a bracket holds
OPENERS = {")": "(", "]": "["}
MOST_WEIGHT = 1000.0  # a model draws noise from far smaller ones already
TOKEN = re.compile(
    r"""\\(?P<escaped>[()\[\]\\]?)
    | (?P<opens>[(\[])
    | :\s*(?P<weight>[+-]?[.\d]+)\s*\)
    | (?P<closes>[)\]])
    | (?:[^\\()\[\]:]+ | :)""",
    re.VERBOSE,
)
BREAK = re.compile(r"\bBREAK\b")
TAG = re.compile(r"<(?P<kind>lora|lyco|hypernet):(?P<name>[^:<>]+)(?::(?P<rest>[^<>]*))?>")
EDITED = re.compile(r"(?<!\\):\s*[.\d]+\s*$|(?<!\\)\|")  # inside square brackets: [from:to:when] and [a|b]
# What is seldom in a prompt that is meant as plain text.
TYPICAL = re.compile(
    r"\(\([^()]*\)\)|\([^()]*:\s*[+-]?[.\d]+\s*\)|\\[()\[\]]|\bBREAK\b|<(?:lora|lyco|hypernet):"
)
PLAIN = "leave --prompt-syntax webui out to read the prompt as plain text"


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt's text, the weight of its tokens, and whether it begins a chunk."""

    text: str
    weight: float = 1.0
    begins_chunk: bool = False


def read_prompt(prompt: str, syntax: str) -> tuple[Piece, ...]:
    """Returns the pieces of a prompt in one of SYNTAXES; neighbours in a chunk differ in their weights.

    Raises UsageError if it has what webui would read in a way that a bundle can't, or no sensible weight.
    """
    if syntax == "plain":
        return (Piece(prompt),)
    refuse_others(prompt)
    merged: list[Piece] = []
    for piece in weighted_pieces(prompt):
        if not abs(piece.weight) <= MOST_WEIGHT:
            raise UsageError(
                f"the prompt gives {piece.text.strip()[:60]!r} the weight {piece.weight:g}, and "
                f"{MOST_WEIGHT:g} is the most",
                "weights from 0.5 to 1.5 are usual",
            )
        last = merged[-1] if merged else None
        if last and not piece.begins_chunk and (piece.weight == last.weight or not last.text):
            merged[-1] = replace(last, text=last.text + piece.text, weight=piece.weight)
        elif piece.text or piece.begins_chunk:
            merged.append(piece)
    return tuple(merged)


def weighted_pieces(prompt: str) -> list[Piece]:
    """Returns the pieces of a prompt in webui's syntax. Raises UsageError for what can't be a weight."""
    texts: list[Piece] = []
    weights: list[float] = []
    opened: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}  # the piece and the letter after each

    def close(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop()[0], len(weights)):
            weights[i] *= factor

    for found in TOKEN.finditer(prompt):
        weight, closed = found["weight"], OPENERS.get(found["closes"] or "", "(")
        if found["opens"]:
            opened[found["opens"]].append((len(texts), found.end()))
        elif (weight or found["closes"]) and opened[closed]:
            if closed == "[":
                refuse_edits(prompt[opened["["][-1][1] : found.start()])
            close(closed, FACTORS[closed] if weight is None else number(weight))
        else:
            escaped = found["escaped"]
            own = [Piece(escaped)] if escaped is not None else list(split_at_breaks(found[0]))
            texts += own
            weights += [1.0] * len(own)
    for bracket, factor in FACTORS.items():
        while opened[bracket]:
            close(bracket, factor)
    return [replace(piece, weight=weight) for piece, weight in zip(texts, weights, strict=True)]


def split_at_breaks(text: str) -> Iterator[Piece]:
    """Yields the pieces of a text without brackets. Each after a BREAK begins a chunk."""
    parts = BREAK.split(text)
    for i, part in enumerate(parts):
        begun = part.lstrip() if i > 0 else part
        yield Piece(begun.rstrip() if i < len(parts) - 1 else begun, begins_chunk=i > 0)


def number(text: str) -> float:
    """Returns a weight. Raises UsageError if the text, which has digits, points and a sign, is no number."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"the prompt has the weight {text!r}, which is no number", PLAIN) from None


def refuse_others(prompt: str) -> None:
    """Raises UsageError for what webui does with a prompt besides weighting and breaking it."""
    if tag := TAG.search(prompt):
        if tag["kind"] == "hypernet":
            raise UsageError(f"the prompt has {tag[0]}, and there are no hypernetworks here", "leave it out")
        raise UsageError(
            f"the prompt has {tag[0]}, but LoRAs are part of a bundle: they are fused when it is built",
            f"{fusing(tag)}, and leave {tag[0]} out of the prompt",
        )
    if re.search(r"\bAND\b", prompt):
        raise UsageError(
            "the prompt has AND, for which webui mixes the predictions of several prompts in each step; a "
            "bundle's loop reads one prompt",
            "write one prompt, with a small and",
        )


def refuse_edits(text: str) -> None:
    """Raises UsageError if the text in square brackets changes from step to step."""
    if EDITED.search(text):
        raise UsageError(
            f"the prompt has [{text[:60]}], which in webui changes the prompt between steps; a bundle's loop "
            "reads one prompt for all of them",
            "write the words that all steps are to read",
        )


def fusing(tag: re.Match[str]) -> str:
    """Returns the command that fuses what webui's tag of a LoRA adds, `<lora:NAME:TEXT:UNET>`."""
    weights = [weight for weight in (tag["rest"] or "1").split(":") if re.fullmatch(r"[+-]?[.\d]+", weight)]
    text, unet = weights[0] if weights else "1", weights[1] if len(weights) > 1 else None
    strengths = text if unet is None or unet == text else f"{unet}@text={text}"
    lora = f"{tag['name']}.safetensors:{strengths}"
    return f"lcm-compile build --lora {shlex.quote(lora)}"


def hint_of(prompt: str) -> str:
    """Returns a hint for a prompt that is read as plain text but looks like webui's syntax, or ""."""
    if not TYPICAL.search(prompt):
        return ""
    hint = "the prompt is read as plain text but looks like webui's; --prompt-syntax webui reads weights"
    tag = TAG.search(prompt)
    if tag and tag["kind"] != "hypernet":
        return f"{hint}, and {fusing(tag)} adds the LoRA of {tag[0]}"
    return hint
