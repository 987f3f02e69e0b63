"""Turns prompts into token ids, as CLIP's tokenizer with `padding="max_length", truncation=True` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lcm_compile.bundles.manifest import TokenizerSettings
from lcm_compile.errors import BundleError


class PromptTokenizer:
    """A tokenizer read from a file of the tokenizers library. Raises BundleError if it can't be read."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{path} can't be read: {error}", "build the bundle again") from error
        self.settings = settings

    def __call__(self, prompt: str) -> tuple[np.ndarray, str]:
        """Returns token ids (max_length,) in int64, and the end of the prompt that did not fit, or ""."""
        # A lone surrogate, from undecodable bytes on a command line, is not valid Unicode text.
        prompt = prompt.encode("utf-8", "replace").decode("utf-8")
        encoding = self._tokenizer.encode(prompt)
        ids, length = list(encoding.ids), self.settings.max_length
        cut = ""
        if len(ids) > length:
            start = encoding.offsets[length - 1][0]
            cut = prompt[start:].strip()
            ids = [*ids[: length - 1], ids[-1]]
        ids += [self.settings.pad_token_id] * (length - len(ids))
        return np.asarray(ids, np.int64), cut
