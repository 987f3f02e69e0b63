"""Encodes pictures and captions into the latents and text states that a UNet is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.checkpoint.load import load_component, load_tokenizer
from lcm_compile.errors import CheckpointError
from lcm_compile.pipeline.tokenizer import PromptTokenizer
from lcm_compile.stages.stage import EncodeOne, EncodeTwo
from lcm_compile.training.consistency import Conditioning
from lcm_compile.training.data import Data, Folder, Sample

# A folder of at most this many pictures is encoded once and kept in memory, about 1 MB a picture for SDXL.
KEPT = 1000

# Numbers of pictures → their latents (b, c, h, w) and conditioning (b, …)
Encoded = Callable[[Sequence[int]], tuple[Tensor, Conditioning]]


def open_vae(checkpoint: Checkpoint, device: torch.device) -> Any:
    """Returns a base's VAE on `device`. Raises CheckpointError if it is a tiny autoencoder."""
    if checkpoint.lossy:
        raise CheckpointError(
            f"{checkpoint.base} has a tiny autoencoder, whose latents only approximate the VAE's",
            "train on the base with its own VAE",
        )
    vae: Any = load_component(checkpoint, "vae").to(device)
    if device.type == "cuda":
        vae.use_slicing = True  # encodes one picture at a time: for SDXL each takes gigabytes
    return vae


class Encoder:
    """A base's VAE and text encoders.

    Prompts are encoded by the tokenizer and the module that a bundle's encode stage is made of, so that both
    give equal states.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._device = device
        self._vae = open_vae(checkpoint, device)
        one, *two = (load_component(checkpoint, name) for name in checkpoint.text_encoders)
        encode: nn.Module = EncodeTwo(one, two[0]) if two else EncodeOne(one)
        self._encoder = encode.to(device)
        self._tokenizers = []
        for name in checkpoint.tokenizers:
            files = load_tokenizer(checkpoint, name)
            self._tokenizers.append(PromptTokenizer(files.json, files.max_length, files.pad_token_id))
        height, width = checkpoint.default_size
        self._size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device)
        self._zero = checkpoint.zero_negative_prompt

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Returns the conditioning of prompts. SDXL's time_ids are those of uncropped pictures."""
        tokens = [
            torch.from_numpy(np.stack([tokenizer(prompt).ids for prompt in prompts]))
            for tokenizer in self._tokenizers
        ]
        states: Any = self._encoder(*(ids.to(self._device) for ids in tokens))
        if isinstance(states, Tensor):
            return {"encoder_hidden_states": states}
        hidden, pooled = states
        time_ids = self._size.expand(len(prompts), -1)
        return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": time_ids}

    def no_prompt(self) -> Conditioning:
        """Returns the conditioning without a prompt, one row.

        It is what the pipeline uses without a negative prompt: zeros for SDXL, else the empty prompt's
        states.
        """
        empty = self.prompts([""])
        if not self._zero:
            return empty
        return {name: t if name == "time_ids" else torch.zeros_like(t) for name, t in empty.items()}

    @torch.no_grad()
    def latents(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Encodes pictures (b, height, width, 3) into latents (b, c, h, w) in the UNet's scale."""
        config = self._vae.config
        pixels = torch.from_numpy(pictures).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self._vae.encode(pixels).latent_dist.mode()
        if getattr(config, "latents_mean", None) is not None:
            mean, std = latents.new_tensor([config.latents_mean, config.latents_std])[..., None, None]
            latents = (latents - mean) / std
        return latents * config.scaling_factor

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, Conditioning]:
        """Returns the latents and the conditioning of captioned pictures."""
        pictures, captions = zip(*samples, strict=True)
        return self.latents(np.stack(pictures)), self.prompts(captions)


def encoded(data: Data, encoder: Encoder, device: torch.device) -> Encoded:
    """Returns a function that gives the encoded pictures of `data` by number.

    A folder of at most KEPT pictures is encoded now, so that the function does not keep the encoder in
    memory.
    """
    if not isinstance(data, Folder) or len(data.examples) > KEPT:
        return lambda numbers: encoder([data.sample(n) for n in numbers])
    rows = [encoder([data.read(i)]) for i in range(len(data.examples))]
    latents = torch.cat([row[0] for row in rows]).cpu()
    states = {name: torch.cat([row[1][name] for row in rows]).cpu() for name in rows[0][1]}

    def pick(numbers: Sequence[int]) -> tuple[Tensor, Conditioning]:
        index = [data.index(n) for n in numbers]
        return latents[index].to(device), {name: t[index].to(device) for name, t in states.items()}

    return pick


def join(*rows: Conditioning) -> Conditioning:
    """Concatenates conditionings along the batch."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def with_no_prompt(prompts: Conditioning, empty: Conditioning) -> Conditioning:
    """Returns 2b rows: the conditioning of b prompts, then b copies of `empty`, the row without a prompt."""
    none = {name: t.expand(len(prompts[name]), *t.shape[1:]) for name, t in empty.items()}
    return join(prompts, none)
