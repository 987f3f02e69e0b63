"""The work of one picture, counted on the architecture alone: FLOP, and bytes of weights that are read.

Modules are run on torch's meta device, where arrays have shapes and no memory; torch's FlopCounterMode counts
matrix products, convolutions and attention, a multiply-add as 2. It is the plain model that is counted, as
diffusers runs it: an engine that does with less comes out nearer to its limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.spec import Shape


@dataclass(frozen=True)
class Work:
    """One pass through a stage's models: FLOP, and how many weights it reads."""

    flop: float
    weights: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.weights + other.weights)


def count_work(checkpoint: Checkpoint, shape: Shape) -> dict[str, Work]:
    """By stage: a prompt through the text encoders, one pass of the UNet, one of the VAE's decoder.

    CheckpointError for a config that makes no model.
    """
    from lcm_compile.checkpoint.empty_modules import empty_module
    from lcm_compile.checkpoint.load import quiet_libraries

    with quiet_libraries():
        modules = {
            name: empty_module(component).to("meta").eval()
            for name, component in checkpoint.components.items()
        }
    text = [count_text(modules[name], checkpoint, name, shape) for name in checkpoint.text_encoders]
    return {
        "encode": sum(text[1:], text[0]),
        "step": count_unet(modules["unet"], checkpoint, shape),
        "decode": count_decoder(modules["vae"], checkpoint, shape),
    }


def count(module: Any, call: Callable[[], Any]) -> Work:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return Work(float(counter.get_total_flops()), sum(p.numel() for p in module.parameters()))


def empty(*shape: int) -> Any:
    import torch

    return torch.empty(shape, device="meta")


def count_text(module: Any, checkpoint: Checkpoint, name: str, shape: Shape) -> Work:
    import torch

    tokens = empty(shape.batch, checkpoint.text_length(name)).to(torch.int64)
    return count(module, lambda: module(tokens))


def count_unet(unet: Any, checkpoint: Checkpoint, shape: Shape) -> Work:
    config, batch = checkpoint.unet, shape.batch
    height, width = (side // checkpoint.vae_factor for side in (shape.height, shape.width))
    length = checkpoint.text_length(checkpoint.text_encoders[0])
    options: dict[str, Any] = {}
    if "text_encoder_2" in checkpoint.components:
        pooled = checkpoint.components["text_encoder_2"].config["projection_dim"]
        options["added_cond_kwargs"] = {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, 6)}
    if checkpoint.has_guidance_embedding:
        options["timestep_cond"] = empty(batch, config["time_cond_proj_dim"])
    latent = empty(batch, config["in_channels"], height, width)
    hidden = empty(batch, length, config["cross_attention_dim"])
    return count(unet, lambda: unet(latent, empty(batch), encoder_hidden_states=hidden, **options))


def count_decoder(vae: Any, checkpoint: Checkpoint, shape: Shape) -> Work:
    height, width = (side // checkpoint.vae_factor for side in (shape.height, shape.width))
    latent = empty(shape.batch, checkpoint.vae["latent_channels"], height, width)
    return count(vae.decoder, lambda: vae.decode(latent))
