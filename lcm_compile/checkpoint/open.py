"""The base that a spec names, opened with the VAE that it asks for: the front door of this folder."""

from __future__ import annotations

from lcm_compile.checkpoint.find import Checkpoint, open_checkpoint
from lcm_compile.checkpoint.random_weights import open_random
from lcm_compile.checkpoint.vae import download_vae, fp16_vae, with_fp16_vae, with_own_vae, with_vae
from lcm_compile.spec import BuildSpec


def open_base(spec: BuildSpec, half: bool) -> Checkpoint:
    """The base that a spec names, with its VAE if it names one."""
    seed = spec.random_seed
    if seed is None:
        checkpoint = open_checkpoint(spec.base, spec.config, half)
    else:
        checkpoint = open_random(spec.base, seed)
    return with_vae(checkpoint, spec.vae, half) if spec.vae else checkpoint


def with_safe_vae(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with its family's VAE for fp16, or with a note why that can't be had.

    Only for a checkpoint whose VAE `overflows`.
    """
    reason = None if with_fp16_vae(checkpoint) else download_vae(fp16_vae(checkpoint))
    return with_fp16_vae(checkpoint) or with_own_vae(checkpoint, reason or "it is not whole")
