"""Text states of prompts as A1111's web UI computes them, with the models of a diffusers pipeline.

A prompt is given as chunks: lists of (text, weight). The rules are those that its wiki publishes: a chunk is
75 tokens between a begin and an end mark, padded like an empty prompt; chunks are encoded one by one and set
side by side; each token's state is multiplied by its weight, and then the chunk's mean is restored.
"""

from __future__ import annotations

import torch

from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db

ROOM = 75


def encoders_of(pipe):
    second = [(pipe.tokenizer_2, pipe.text_encoder_2)] if getattr(pipe, "text_encoder_2", None) else []
    return [(pipe.tokenizer, pipe.text_encoder), *second]


def chunk_of(tokenizer, texts):
    """Token ids (1, 77) and weights (1, 77, 1) of one chunk."""
    ids, weights = [], []
    for text, weight in texts:
        own = tokenizer(text, add_special_tokens=False).input_ids
        ids += own
        weights += [weight] * len(own)
    padding = ROOM - len(ids)
    assert padding >= 0
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * padding]
    weights = [1.0, *weights, 1.0, *[1.0] * padding]
    return torch.tensor([ids]), torch.tensor([weights])[..., None]


def encode(pipe, chunks, chunks_2=None, clip_skip=0):
    """Text states (1, 77·k, d) and the pooled text (1, p), or None, of chunks."""
    encoders = encoders_of(pipe)
    skipped = clip_skip + len(encoders)
    given = [chunks, chunks if chunks_2 is None else chunks_2]
    columns, pooled = [], None
    for (tokenizer, encoder), own in zip(encoders, given, strict=False):
        rows = []
        for number, texts in enumerate(own):
            ids, weights = chunk_of(tokenizer, texts)
            with torch.no_grad():
                out = encoder(ids, output_hidden_states=True)
                states = out.hidden_states[-skipped]
                if len(encoders) == 1:
                    states = encoder.final_layer_norm(states)
            weighted = states * weights
            rows.append(weighted * (states.mean() / weighted.mean()))
            if number == 0:
                pooled = getattr(out, "text_embeds", None)
        columns.append(torch.cat(rows, 1))
    return torch.cat(columns, -1), pooled


def picture(pipe, states, negative=None, seed=7, guidance_scale=1.0, size=64, **options):
    """Diffusers' picture of (text states, pooled text), in 8 bits."""
    given = {"prompt_embeds": states[0], "pooled_prompt_embeds": states[1]}
    if negative is not None:
        given |= {"negative_prompt_embeds": negative[0], "negative_pooled_prompt_embeds": negative[1]}
    images = pipe(
        **{name: value for name, value in given.items() if value is not None},
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        height=size,
        width=size,
        output_type="np",
        **options,
    ).images
    return eight_bits(images)[0]


def psnr(pipeline, prompt, theirs, seed=7, **request):
    """The PSNR in dB of our picture of a prompt to theirs."""
    return psnr_db(theirs, pipeline.draw(Request(prompt, seed, **request)).pictures[0])
