"""Turns prompts into token ids, as CLIP's tokenizer with `padding="max_length", truncation=True` does."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class PromptTokenizer:
    """A tokenizer of the tokenizers library with CLIP's padding. A prompt gets `max_length` tokens."""

    def __init__(self, json: str, max_length: int, pad_token_id: int) -> None:
        """Takes the tokenizer as its library's JSON. Raises ValueError if that can't be read."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(str(error)) from error
        self.max_length = max_length
        self._pad = pad_token_id
        self._words = {tokens[0]: tokens for tokens in words_of(self._tokenizer)}

    def __call__(self, prompt: str) -> tuple[np.ndarray, str]:
        """Returns token ids (max_length,) in int64, and the end of the prompt that did not fit, or ""."""
        # A lone surrogate, from undecodable bytes on a command line, is not valid Unicode text.
        prompt = prompt.encode("utf-8", "replace").decode("utf-8")
        encoding = self._tokenizer.encode(prompt)
        pieces = list(zip(encoding.ids, encoding.offsets, strict=True))
        pieces = [(token, place) for first, place in pieces for token in self._words.get(first, (first,))]
        ids, length = [token for token, _ in pieces], self.max_length
        cut = ""
        if len(ids) > length:
            start = pieces[length - 1][1][0]
            cut = prompt[start:].strip()
            ids = [*ids[: length - 1], ids[-1]]
        ids += [self._pad] * (length - len(ids))
        return np.asarray(ids, np.int64), cut


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
