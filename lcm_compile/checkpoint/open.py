"""Opens the base that a spec names, with the VAE that it asks for. Other folders open bases through this."""

from __future__ import annotations

from dataclasses import replace

from lcm_compile.checkpoint.controlnet import with_controlnets
from lcm_compile.checkpoint.embeddings import with_embeddings
from lcm_compile.checkpoint.find import Checkpoint, open_checkpoint
from lcm_compile.checkpoint.ip_adapter import with_ip_adapter
from lcm_compile.checkpoint.random_weights import open_random
from lcm_compile.checkpoint.t2i_adapter import with_t2i_adapters
from lcm_compile.checkpoint.vae import download_vae, fp16_vae, with_fp16_vae, with_own_vae, with_vae
from lcm_compile.errors import UsageError
from lcm_compile.spec import CHUNK_TOKENS, BuildSpec


def open_base(spec: BuildSpec, half: bool) -> Checkpoint:
    """Returns the base that a spec names, with what the spec asks for besides LoRAs. Loads no weights.

    With `half`, fp16 weights are preferred on the hub. Raises UsageError if no base, VAE, textual inversion,
    ControlNet, T2I-Adapter or IP-Adapter has this name, or if there are too few layers to skip, and
    CheckpointError if one can't be downloaded or read, or if it does not fit the base.
    """
    seed = spec.random_seed
    if seed is None:
        checkpoint = open_checkpoint(spec.base, spec.config, half, own_vae=not spec.vae)
    else:
        checkpoint = open_random(spec.base, seed)
    checkpoint = with_embeddings(checkpoint, spec.embeddings)
    checkpoint = with_prompts(checkpoint, spec.prompt_tokens // CHUNK_TOKENS, spec.clip_skip or 0)
    if spec.vae:
        checkpoint = with_vae(checkpoint, spec.vae, half)
    checkpoint = with_controlnets(checkpoint, [net.source for net in spec.controlnets], half)
    checkpoint = with_t2i_adapters(checkpoint, [adapter.source for adapter in spec.t2i_adapters], half)
    if spec.ip_adapter:
        checkpoint = with_ip_adapter(checkpoint, spec.ip_adapter.source, spec.ip_encoder, half)
    return checkpoint


def with_prompts(checkpoint: Checkpoint, chunks: int, clip_skip: int) -> Checkpoint:
    """Returns the checkpoint with another way of encoding prompts.

    Raises UsageError if a text encoder has fewer layers than would be skipped.
    """
    names = checkpoint.text_encoders
    layers = {name: int(checkpoint.components[name].config.get("num_hidden_layers", 12)) for name in names}
    fewest = min(names, key=layers.__getitem__)
    most = layers[fewest] - (len(names) - 1)  # SDXL never reads the last layer
    if clip_skip > most:
        raise UsageError(
            f"--clip-skip {clip_skip} is too many: {most} layers of the {fewest} of {checkpoint.base} can be "
            "skipped",
            "--clip-skip 1 skips as many as webui's Clip skip 2",
        )
    return replace(checkpoint, prompt_chunks=chunks, clip_skip=clip_skip)


def with_safe_vae(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with its family's VAE for fp16, or with a note that says why it has its own.

    Only for a checkpoint whose VAE `overflows`.
    """
    reason = None if with_fp16_vae(checkpoint) else download_vae(fp16_vae(checkpoint))
    return with_fp16_vae(checkpoint) or with_own_vae(checkpoint, reason or "its files are incomplete")
