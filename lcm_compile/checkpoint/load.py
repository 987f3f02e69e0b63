"""Loads a checkpoint's weights and tokenizers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lcm_compile.checkpoint.checkpoint import Checkpoint
from lcm_compile.checkpoint.embeddings import add_rows, add_tokens, read_embeddings
from lcm_compile.checkpoint.random_weights import random_component, stand_in_tokenizer
from lcm_compile.checkpoint.read_weights import stored_component
from lcm_compile.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch


def load_component(
    checkpoint: Checkpoint, name: str, change: Callable[[torch.nn.Module], None] | None = None
) -> torch.nn.Module:
    """Returns one component in fp32, in eval mode and without gradients.

    `change` is called with the base's own weights, before the rows of textual inversions are added to them.
    Raises CheckpointError if the weights are damaged or do not fit their config.
    """
    component = checkpoint.components[name]
    with quiet_libraries():
        if component.files:
            module = stored_component(component, checkpoint.components["unet"])
        else:
            module = random_component(checkpoint, name)
        if change is not None:
            change(module)
        if checkpoint.embeddings and name in checkpoint.text_encoders:
            tokenizer = load_tokenizer(checkpoint, name.replace("text_encoder", "tokenizer"))
            add_rows(module, name, tokenizer.json, read_embeddings(checkpoint))
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides the progress bars and warnings of diffusers and transformers until the block ends."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    libraries = (diffusers_log, transformers_log)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in libraries]
    for log in libraries:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bars) in zip(libraries, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


@dataclass(frozen=True)
class TokenizerFiles:
    """A CLIP tokenizer as the JSON of the `tokenizers` library, and how prompts are padded.

    `max_length` counts tokens.
    """

    json: str
    max_length: int
    pad_token_id: int


def load_tokenizer(checkpoint: Checkpoint, name: str) -> TokenizerFiles:
    """Returns a tokenizer, with the tokens of the base's textual inversions.

    Raises CheckpointError if it can't be read, or if it has a token of that name already.
    """
    files = base_tokenizer(checkpoint, name)
    if not checkpoint.embeddings:
        return files
    return replace(files, json=add_tokens(files.json, read_embeddings(checkpoint)))


def base_tokenizer(checkpoint: Checkpoint, name: str) -> TokenizerFiles:
    """Returns a base's own tokenizer, from vocab.json and merges.txt (the hub's files) or tokenizer.json.

    Raises CheckpointError if it can't be read.
    """
    config = checkpoint.components[name.replace("tokenizer", "text_encoder")].config
    if checkpoint.random_seed is not None and not (checkpoint.folder / name).is_dir():
        vocabulary = config["vocab_size"]
        return TokenizerFiles(
            stand_in_tokenizer(vocabulary), config["max_position_embeddings"], vocabulary - 1
        )
    with quiet_libraries():
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(checkpoint.folder / name, local_files_only=True)
            backend = tokenizer.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
        except Exception as error:
            raise CheckpointError(
                f"the tokenizer in {checkpoint.folder / name} can't be read: {first_line(error)}",
                "put the files of the base's CLIP tokenizer there, as its author published them",
            ) from error
    encoder = name.replace("tokenizer", "text_encoder")
    length = min(int(tokenizer.model_max_length), checkpoint.text_length(encoder))
    return TokenizerFiles(backend.to_str(), length, tokenizer.pad_token_id)
