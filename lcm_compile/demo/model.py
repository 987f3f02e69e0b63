"""Makes the untrained demo model in SDXL's layout: tokenizers, text encoders, UNet, VAE and scheduler."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_compile.demo.world import WORDS

TOKENS = 77  # in a padded prompt
START = "<|startoftext|>"
END = "<|endoftext|>"
WIDTH = 64  # hidden size of each text encoder


def _alphabet() -> list[str]:
    """Returns the printable characters that represent the 256 bytes, in CLIP's order ("!" is token 0)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def _merges() -> list[tuple[str, str]]:
    """Returns byte-pair merges, most frequent first, that make each of the world's words one token."""
    words = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(WORDS)]
    merges = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        pair = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(pair)
        for word in words:
            for at in range(len(word) - 2, -1, -1):
                if tuple(word[at : at + 2]) == pair:
                    word[at : at + 2] = ["".join(pair)]
    return merges


def vocabulary() -> dict[str, int]:
    """Returns the id of every token. Any text can be spelt; the last two tokens are the start and the end."""
    letters, merges = _alphabet(), _merges()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    return {token: index for index, token in enumerate(tokens)}


def save_tokenizer(folder: Path, pad: str) -> None:
    """Writes the files of a CLIP tokenizer that pads prompts with the token `pad`."""
    folder.mkdir(parents=True, exist_ok=True)
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    config |= {"add_prefix_space": False, "errors": "replace"}
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in _merges())]) + "\n"
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | specials, indent=2) + "\n")


def make_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Returns both tokenizers. As in SDXL, the first pads with the end token, the second with "!"."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "first", Path(folder) / "second"]
        for path, pad in zip(paths, (END, "!"), strict=True):
            save_tokenizer(path, pad)
        first, second = (CLIPTokenizer.from_pretrained(path) for path in paths)
    return first, second


def tokenize(captions: list[str]) -> Tensor:
    """Returns the padded token ids of captions for both text encoders. Shape (n, 2, 77)."""
    rows = [
        tokenizer(
            captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        for tokenizer in make_tokenizers()
    ]
    return torch.stack(rows, 1)


class TextEncoders(nn.Module):
    """Both CLIP text encoders, with the outputs that SDXL's pipeline uses."""

    def __init__(self) -> None:
        super().__init__()
        words = vocabulary()
        common: dict[str, Any] = {
            "vocab_size": len(words),
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
        }
        common |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": TOKENS}
        common |= {"projection_dim": WIDTH, "bos_token_id": words[START], "eos_token_id": words[END]}
        self.first = CLIPTextModel(CLIPTextConfig(**common, hidden_act="quick_gelu", pad_token_id=words[END]))
        self.second = CLIPTextModelWithProjection(
            CLIPTextConfig(**common, hidden_act="gelu", pad_token_id=words["!"])
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes token ids (b, 2, 77).

        Returns both encoders' penultimate hidden states (b, 77, 2 * WIDTH) and the second encoder's pooled
        state (b, WIDTH).
        """
        first = self.first(tokens[:, 0], output_hidden_states=True).hidden_states[-2]
        second = self.second(tokens[:, 1], output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds


def make_unet() -> UNet2DConditionModel:
    """Returns a UNet that predicts the noise in 16×16 latents.

    It has attention at 8×8, where a complete shape is in view.
    """
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 112),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,  # in this class it is the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + WIDTH,
    )


def make_vae() -> AutoencoderKL:
    """Returns a VAE whose latents have a quarter of the picture's side.

    It has no attention, because the world's pictures are flat and their details local.
    """
    return AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def make_scheduler() -> EulerDiscreteScheduler:
    """Returns a scheduler with SDXL's own noise schedule."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        interpolation_type="linear",
        use_karras_sigmas=False,
        timestep_spacing="leading",
        steps_offset=1,
    )
