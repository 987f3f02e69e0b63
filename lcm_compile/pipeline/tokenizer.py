"""Turns prompts into token ids: chunks, each as CLIP's tokenizer with `padding="max_length"` gives them.

A chunk is what a text encoder reads at once: 77 tokens, of which the first and one after the words are marks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from lcm_compile.pipeline.syntax import read_prompt

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """A prompt's token ids (n,) in int64 and their weights (n,) in float32.

    `cut` is the end of the prompt that did not fit, or "".
    """

    ids: np.ndarray
    weights: np.ndarray
    cut: str


class PromptTokenizer:
    """A tokenizer of the tokenizers library with CLIP's padding.

    A prompt gets `chunks` times `max_length` tokens.
    """

    def __init__(self, json: str, max_length: int, pad_token_id: int, chunks: int = 1) -> None:
        """Takes the tokenizer as its library's JSON. Raises ValueError if that can't be read."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(str(error)) from error
        self.length = max_length * chunks
        self._chunks = chunks
        self._pad = pad_token_id
        self._marks = self._tokenizer.encode("").ids
        self._room = max_length - len(self._marks)
        self._words = {tokens[0]: tokens for tokens in words_of(self._tokenizer)}

    def __call__(self, prompt: str, syntax: str = "plain") -> Tokens:
        """Returns the tokens of a prompt in a syntax. Chunks that it does not fill are an empty prompt's.

        All vectors of a textual inversion are in one chunk, unless a chunk is too small for them, or the last
        one is: it holds those that fit. Raises UsageError as `read_prompt` does.
        """
        # A lone surrogate, from undecodable bytes on a command line, is not valid Unicode text.
        pieces = read_prompt(prompt.encode("utf-8", "replace").decode("utf-8"), syntax)
        rows: list[list[tuple[int, float]]] = [[]]
        for number, piece in enumerate(pieces):
            if piece.begins_chunk:
                rows.append([])
            encoding = self._tokenizer.encode(piece.text, add_special_tokens=False)
            for first, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
                tokens = self._words.get(first, (first,))
                if len(tokens) <= self._room < len(rows[-1]) + len(tokens) and len(rows) < self._chunks:
                    rows.append([])
                for token in tokens:
                    if len(rows[-1]) == self._room:
                        rows.append([])
                    rows[-1].append((token, piece.weight))
                if len(rows) > self._chunks:
                    rest = (piece.text[start:], *(later.text for later in pieces[number + 1 :]))
                    return self._padded(rows, " ".join(filter(None, map(str.strip, rest))))
        return self._padded(rows, "")

    def _padded(self, rows: list[list[tuple[int, float]]], cut: str) -> Tokens:
        """Returns the tokens of the chunks that fit, each between its marks and padded."""
        ids: list[int] = []
        weights: list[float] = []
        for row in (*rows, *[[]] * self._chunks)[: self._chunks]:
            padding = self._room - len(row)
            begin, end = self._marks[:1], self._marks[1:]
            ids += [*begin, *(token for token, _ in row), *end, *[self._pad] * padding]
            weights += [1.0, *(weight for _, weight in row), 1.0, *[1.0] * padding]
        return Tokens(np.asarray(ids, np.int64), np.asarray(weights, np.float32), cut)


def words_of(tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the token ids of each textual inversion of several vectors: the tokens WORD, WORD_1, WORD_2, …

    A prompt has only WORD, which stands for all of them, as in the prompts that diffusers converts.
    """
    ids = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
    words = []
    for word in ids:
        tokens = list(takewhile(ids.__contains__, (word, *(f"{word}_{i}" for i in range(1, len(ids))))))
        if len(tokens) > 1:
            words.append([ids[token] for token in tokens])
    return words
