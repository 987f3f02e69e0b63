"""A family's architecture with random weights: no download, no picture worth seeing, the real work.

For benchmarks, CI, and to find out whether a target takes a model before its weights are fetched. The random
weights stand for the base with its LCM-LoRA fused in, or for a full LCM.
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

NOISE = 0.02


def open_random(base: str, seed: int) -> Checkpoint:
    """The checkpoint of a family as its configs say; UsageError for a base that is none of theirs."""
    known = {name: family for name, family in FAMILIES.items() if family.models}
    if base not in known:
        raise unknown_name("family for random weights", base, known, "give one of them to --base")
    family = known[base]
    try:
        folder = fetch(family.others or family.base, TOKENIZER_FILES)
    except ConnectionError:
        folder = Path(f"{base}-random")  # stand-in tokenizers, see below
    components = {name: Component(name, config) for name, config in family.models.items()}
    return Checkpoint(
        base, folder, family, components, family.scheduler, "text_encoder_2" in components, random_seed=seed
    )


def random_component(checkpoint: Checkpoint, name: str) -> torch.nn.Module:
    """The module with weights of variance 1 / fan-in, in fp32; each depends on the seed and its name alone.

    Signals then neither vanish nor overflow on their way through a hundred layers, in half precision too.
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
    """CLIP's tokenizer without its merges, for where those can't be had: every byte is a token.

    As one `tokenizers` JSON; the last two ids are CLIP's ends. Texts differ by it, which is all that random
    weights can tell apart.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    ids |= {"<|startoftext|>": vocabulary - 2, "<|endoftext|>": vocabulary - 1}
    return str(CLIPTokenizer(vocab=ids, merges=[]).backend_tokenizer.to_str())
