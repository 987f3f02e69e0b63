"""Textual inversions: vectors that a word stands for in prompts. They become rows of text encoders' tables.

A word of n vectors becomes n tokens, as in diffusers' `load_textual_inversion`: WORD, WORD_1, WORD_2, and so
on. `pipeline/tokenizer.py` puts them all where a prompt has the word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.checkpoint.checkpoint import Checkpoint, PlannedEmbedding
from lcm_compile.checkpoint.hub import REPOSITORY, fetch
from lcm_compile.checkpoint.weight_files import is_pickle, read_tensors, unpickle
from lcm_compile.errors import CheckpointError, UsageError, first_few
from lcm_compile.spec import EmbeddingSpec
from lcm_compile.system.files import user_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    # The vectors (n, width) of one word by the text encoder that reads them, or by "" if the file names none.
    Vectors = Mapping[str, torch.Tensor]

USUAL_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
# How files name the vectors of a text encoder: ComfyUI and webui, and diffusers' training scripts.
ENCODERS = {
    "clip_l": "text_encoder",
    "clip_h": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
MOST_VECTORS = 77  # of a word: a prompt has no more tokens, and tensors of weights have more rows
NAMELESS = "emb_params"  # webui's safetensors files: the word is the file's name
# In a LoRA's file with the words that were trained with it: webui's and OneTrainer's bundles.
IN_LORA = re.compile(
    r"bundle_emb\.(?P<word>.+)\.(?:string_to_param\.[^.]+|(?P<encoder>clip_[lgh]|text_encoders_[01]))"
)


@dataclass(frozen=True)
class Embedding:
    """A word for prompts, and its vectors (n, width) by the text encoder that reads them."""

    word: str
    vectors: Vectors

    @property
    def count(self) -> int:
        """The number of vectors, which is the number of tokens that the word takes."""
        return len(next(iter(self.vectors.values())))

    @property
    def tokens(self) -> list[str]:
        """The tokens of the word, one for each vector."""
        return [self.word, *(f"{self.word}_{i}" for i in range(1, self.count))]


def find_embedding(spec: EmbeddingSpec) -> PlannedEmbedding:
    """Returns a textual inversion with its file: a path, or `OWNER/NAME[:FILE]` on the hub.

    Raises UsageError if it is neither, and CheckpointError if neither the hub nor its cache has it.
    """
    path = user_path(spec.source)
    if path.is_file():
        return PlannedEmbedding(spec, path)
    repository, _, file = spec.source.partition(":")
    names: Sequence[str] = USUAL_FILES
    if path.is_dir():
        folder = path
    elif not re.fullmatch(REPOSITORY, repository) or user_path(repository).exists():
        raise UsageError(f"--embedding {spec.source} does not exist", "give a file, a folder or a hub id")
    else:
        names = [file] if file else names
        try:
            folder = fetch(repository, names)
        except ConnectionError as error:
            raise CheckpointError(
                f"the textual inversion {spec.source} is neither a path nor in the hub cache, and can't be "
                f"downloaded: {error}",
                "check the path or the hub id, and the network (or HF_HOME, HF_TOKEN)",
            ) from error
    for name in names:
        if (folder / name).is_file():
            return PlannedEmbedding(spec, folder / name)
    raise CheckpointError(
        f"{spec.source} has no {' or '.join(names)}",
        "name the file: --embedding OWNER/NAME:FILE, or its path",
    )


def with_embeddings(checkpoint: Checkpoint, specs: tuple[EmbeddingSpec, ...]) -> Checkpoint:
    """Returns the checkpoint with textual inversions to install. Raises the errors of find_embedding."""
    return (
        replace(checkpoint, embeddings=tuple(find_embedding(spec) for spec in specs)) if specs else checkpoint
    )


def read_embeddings(checkpoint: Checkpoint) -> list[Embedding]:
    """Returns the textual inversions of a checkpoint, in their order, with vectors for each text encoder.

    Raises CheckpointError if a file is no textual inversion, or is made for other text encoders.
    """
    return [fitted(checkpoint, planned) for planned in checkpoint.embeddings]


def fitted(checkpoint: Checkpoint, planned: PlannedEmbedding) -> Embedding:
    """Returns the textual inversion in a file, with vectors for each of the base's text encoders.

    Raises CheckpointError if the file is none, or if it is made for other text encoders.
    """
    import torch

    word, found = read_embedding(planned)
    widths = {
        name: int(checkpoint.components[name].config["hidden_size"]) for name in checkpoint.text_encoders
    }
    if list(found) == [""] and len(widths) == 1:
        found = {next(iter(widths)): found[""]}
    has = [f"{tuple(vectors.shape)} for {name or 'one text encoder'}" for name, vectors in found.items()]
    reads = [f"width {width} for {name}" for name, width in widths.items()]
    counts = {len(vectors) for vectors in found.values()}
    if found.keys() != widths.keys() or any(found[name].shape[-1] != width for name, width in widths.items()):
        raise CheckpointError(
            f"the textual inversion {planned.path} does not fit {checkpoint.base}: it has vectors "
            f"{', '.join(has)}, and the base reads vectors of {', '.join(reads)}",
            "use one that was trained on a base of this architecture; --lora-skip 'bundle_emb.*' leaves out "
            "one in a LoRA's file",
        )
    if len(counts) > 1 or 0 in counts:
        raise CheckpointError(
            f"the textual inversion {planned.path} has {' and '.join(map(str, counts))} vectors for a word",
            "get the file again from where it comes from",
        )
    if not all(bool(torch.isfinite(vectors).all()) for vectors in found.values()):
        raise CheckpointError(
            f"the textual inversion {planned.path} has NaN or infinite values", "use another"
        )
    return Embedding(word, found)


def read_embedding(planned: PlannedEmbedding) -> tuple[str, Vectors]:
    """Returns the word and the fp32 vectors of a textual inversion's file of any layout.

    The layouts are those of diffusers, webui, ComfyUI, and of LoRAs that bring their words along. If the file
    does not name the word, it is the file's own name. Raises CheckpointError if the file is no textual
    inversion.
    """
    path, asked = planned.path, planned.spec.token
    found = words_in(path, unpickle(path) if is_pickle(path) else read_tensors(path)[0])
    if len(found) > 1 and asked not in found:
        raise CheckpointError(
            f"{path} has {len(found)} textual inversions: {', '.join(map(repr, found))}",
            f"choose one: --embedding {planned.spec.source}:{next(iter(found))}",
        )
    own = asked if len(found) > 1 else next(iter(found))
    vectors = {name: tensor.float().reshape(-1, tensor.shape[-1]) for name, tensor in found[str(own)].items()}
    return asked or own or path.stem, vectors


def words_in(path: Path, data: Any) -> Mapping[str, Vectors]:
    """Returns the vectors of each word in a file's content. A word that the file does not name is "".

    Raises CheckpointError if the content is no textual inversion.
    """
    import torch

    if isinstance(data, torch.Tensor):
        data = {NAMELESS: data}
    content = data if isinstance(data, Mapping) else {}
    words: dict[str, dict[str, Any]] = {}
    if "string_to_param" in content:  # webui, and the first scripts of the method's authors
        params = dict(content["string_to_param"].items())
        named = content.get("name")
        words[named if isinstance(named, str) else ""] = {"": next(iter(params.values()), None)}
    elif content and content.keys() <= ENCODERS.keys():
        words[""] = {ENCODERS[key]: tensor for key, tensor in content.items()}
    elif content.keys() & ENCODERS.keys():
        others = first_few([str(key) for key in content if key not in ENCODERS])
        raise CheckpointError(
            f"the textual inversion {path} is for other text encoders: it has vectors for {others}",
            "use one that was trained on Stable Diffusion 1, 2 or XL",
        )
    elif bundled := [match for key in content if (match := IN_LORA.fullmatch(str(key)))]:
        for match in bundled:
            encoder = ENCODERS.get(match["encoder"] or "", "")
            words.setdefault(match["word"], {})[encoder] = content[match[0]]
    elif content.keys() == {NAMELESS}:
        words[""] = {"": content[NAMELESS]}
    else:
        words = {str(key): {"": tensor} for key, tensor in content.items()}
    if not words or not all(
        isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.ndim in (1, 2)
        and (tensor.ndim == 1 or tensor.shape[0] <= MOST_VECTORS)
        for vectors in words.values()
        for tensor in vectors.values()
    ):
        keys = first_few([str(key) for key in content])
        raise CheckpointError(
            f"{path} is no textual inversion: it holds {keys or 'no named tensors'}",
            f"give a LoRA to --lora; lcm-compile inspect {path} tells what it is",
        )
    return words


def add_tokens(tokenizer_json: str, embeddings: list[Embedding]) -> str:
    """Returns a tokenizer's JSON with the tokens of textual inversions added to its vocabulary.

    Raises CheckpointError if prompts could not tell a word from another word or token.
    """
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for embedding in embeddings:
        word = embedding.word
        # The token after the word's last one would be read as one more of its vectors.
        for token in (*embedding.tokens, f"{word}_{embedding.count}"):
            if tokenizer.token_to_id(token) is not None:
                raise clash(word, f"the tokenizer has the token {token!r} already")
        if (before := token_before(word)) in added:
            raise clash(word, f"it would be read as one more vector of a word, after its token {before!r}")
        tokenizer.add_tokens([AddedToken(token, normalized=True) for token in embedding.tokens])
        added.update(embedding.tokens)
    names = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}
    for embedding in embeddings:
        ids = tokenizer.encode(embedding.word, add_special_tokens=False).ids
        read = [names.get(id, str(tokenizer.id_to_token(id))) for id in ids]
        if read != [embedding.word]:
            raise clash(embedding.word, f"prompts with it are read as {first_few([*map(repr, read)])}")
    return tokenizer.to_str()


def token_before(token: str) -> str | None:
    """Returns the token before one in a word of several: WORD of WORD_1, WORD_1 of WORD_2; else None."""
    found = re.fullmatch(r"(.+)_([1-9]\d*)", token, re.DOTALL)
    if found is None:
        return None
    number = int(found[2])
    return found[1] if number == 1 else f"{found[1]}_{number - 1}"


def clash(word: str, why: str) -> CheckpointError:
    """Returns the error for a word that can't be added to a tokenizer."""
    return CheckpointError(
        f"the textual inversion {word!r}: {why}", "give the word another name: --embedding FILE:NAME"
    )


def add_rows(
    text_encoder: PreTrainedModel, name: str, tokenizer_json: str, embeddings: list[Embedding]
) -> None:
    """Writes the vectors of textual inversions into the table of the text encoder of this name.

    `tokenizer_json` is the tokenizer with their tokens, as add_tokens returns it.
    """
    import torch
    from tokenizers import Tokenizer

    id_of = Tokenizer.from_str(tokenizer_json).get_vocab()
    ids = [[id_of[token] for token in embedding.tokens] for embedding in embeddings]
    size = max(*(id + 1 for own in ids for id in own), text_encoder.get_input_embeddings().weight.shape[0])
    text_encoder.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for own, embedding in zip(ids, embeddings, strict=True):
            text_encoder.get_input_embeddings().weight[own] = embedding.vectors[name]
