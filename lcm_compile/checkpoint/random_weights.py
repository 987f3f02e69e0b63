"""Gives a family's architecture random weights, which need no download.

The pictures show nothing, but computing them is the same work as with real weights. This is for benchmarks,
for CI, and to find out whether a target can run a model before its weights are downloaded. The random weights
take the place of the base with its LCM-LoRA fused in, or of a full LCM.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.hub import fetch
from lcm_compile.checkpoint.single_file import TOKENIZER_FILES
from lcm_compile.errors import unknown_name

if TYPE_CHECKING:
    import torch

NOISE = 0.02  # the standard deviation of biases, and of the scales of norms around 1


def open_random(base: str, seed: int) -> Checkpoint:
    """Returns the checkpoint of a family with random weights. Raises UsageError if `base` is no such family.

    The tokenizers are the family's if the hub or its cache has them.
    """
    known = {name: family for name, family in FAMILIES.items() if family.models}
    if base not in known:
        raise unknown_name("family for random weights", base, known, "give one of them to --base")
    family = known[base]
    try:
        folder = fetch(family.others or family.base, TOKENIZER_FILES)
    except ConnectionError:
        folder = Path(f"{base}-random")  # does not exist: `stand_in_tokenizer` is used
    components = {name: Component(name, config) for name, config in family.models.items()}
    return Checkpoint(
        base, folder, family, components, family.scheduler, "text_encoder_2" in components, random_seed=seed
    )


def random_component(checkpoint: Checkpoint, name: str) -> torch.nn.Module:
    """Returns a component in fp32 with random weights. Each tensor depends only on the seed and its name.

    Matrices and kernels have the variance 1 / fan-in, so that activations neither vanish nor overflow through
    a hundred layers, even in half precision.
    """
    import torch

    module = empty_module(checkpoint.components[name])
    norms = (torch.nn.LayerNorm, torch.nn.GroupNorm)
    scales = {f"{key}.weight" for key, sub in module.named_modules() if isinstance(sub, norms)}
    weights = {}
    for key, shape in ((key, weight.shape) for key, weight in module.named_parameters()):
        digest = hashlib.sha256(f"{checkpoint.random_seed} {name} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        if len(shape) > 1:
            bound = math.sqrt(3 / shape[1:].numel())
            weights[key] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        else:
            mean = 1.0 if key in scales else 0.0
            weights[key] = torch.empty(shape).normal_(mean, NOISE, generator=generator)
    module.load_state_dict(weights, assign=True)
    return module


def stand_in_tokenizer(vocabulary: int) -> str:
    """Returns CLIP's tokenizer without its merges as the JSON of the `tokenizers` library.

    Every byte is a token, and the last two ids are CLIP's start and end. It is used if the real tokenizer
    can't be downloaded. Different texts get different tokens, and random weights need no more than that.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    ids |= {"<|startoftext|>": vocabulary - 2, "<|endoftext|>": vocabulary - 1}
    return str(CLIPTokenizer(vocab=ids, merges=[]).backend_tokenizer.to_str())
