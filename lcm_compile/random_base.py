"""A family's architecture with random weights: no download, no picture worth seeing, the real work.

For benchmarks, CI, and to find out whether a target takes a model before its weights are fetched. The random
weights stand for the base with its LCM-LoRA fused in.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_compile.architectures import empty_module
from lcm_compile.components import Checkpoint, Component
from lcm_compile.errors import unknown_name
from lcm_compile.families import FAMILIES
from lcm_compile.hub import fetch
from lcm_compile.model_configs import COMPONENTS
from lcm_compile.single_file import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

NOISE = 0.02


def open_random(base: str, seed: int) -> Checkpoint:
    """The checkpoint of a family as its configs say; UsageError for a base that is none of theirs."""
    if base not in COMPONENTS:
        raise unknown_name("family for random weights", base, COMPONENTS, "give one of them to --base")
    family = FAMILIES[base]
    configs = dict(COMPONENTS[base])
    scheduler = configs.pop("scheduler")
    try:
        folder = fetch(family.base, TOKENIZER_FILES)
    except ConnectionError:
        folder = Path(f"{base}-random")  # stand-in tokenizers, see below
    components = {name: Component(name, config) for name, config in configs.items()}
    return Checkpoint(
        base, folder, family, components, scheduler, "text_encoder_2" in components, random_seed=seed
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
    """A tokenizer for where CLIP's can't be had: every byte is a token, and the last two ids are CLIP's ends.

    As one `tokenizers` JSON. Texts differ by it, which is all that random weights can tell apart.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    start, end = "<|startoftext|>", "<|endoftext|>"
    ids = {token: i for i, token in enumerate(alphabet)} | {start: vocabulary - 2, end: vocabulary - 1}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token=end))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), behavior="removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, ids[end]), (start, ids[start]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer.to_str()
