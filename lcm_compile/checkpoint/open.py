"""The base that a spec names, opened with the VAE that it asks for: the front door of this folder."""

from __future__ import annotations

from lcm_compile.checkpoint.find import Checkpoint, open_checkpoint
from lcm_compile.checkpoint.random_weights import open_random
from lcm_compile.checkpoint.vae import download_fixed_vae, with_fixed_vae, with_own_vae, with_vae
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
    """With the VAE that fp16 does not overflow; where it can't be had, with a note that it was not."""
    reason = None if with_fixed_vae(checkpoint) else download_fixed_vae()
    return with_fixed_vae(checkpoint) or with_own_vae(checkpoint, reason or "it is not whole")
