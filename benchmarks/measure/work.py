"""Counts the work of a picture from the architecture alone: FLOP, and the weights that are read.

The modules run on torch's meta device, where tensors have shapes but no memory. torch's FlopCounterMode
counts matrix products, convolutions and attention, a multiply-add as 2. What is counted is the original
model, as diffusers runs it, so that an engine that needs less work comes closer to its limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lcm_compile.checkpoint.controlnet import controls_of
from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.spec import Shape


@dataclass(frozen=True)
class Work:
    """The work of one pass through a stage's models: FLOP, and the number of weights that it reads."""

    flop: float
    weights: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.weights + other.weights)


def count_work(checkpoint: Checkpoint, shape: Shape) -> dict[str, Work]:
    """Returns the work of one pass by stage, for all pictures of a batch.

    "encode" is the prompt through all text encoders, "step" one pass of the UNet and the ControlNets, and
    "decode" one pass of the VAE's decoder. Raises CheckpointError if a config describes no valid model.
    """
    from lcm_compile.checkpoint.empty_modules import empty_module
    from lcm_compile.checkpoint.load import quiet_libraries

    with quiet_libraries():
        modules = {
            name: empty_module(component).to("meta").eval()
            for name, component in checkpoint.components.items()
        }
    text = [count_text(modules[name], checkpoint, name, shape) for name in checkpoint.text_encoders]
    step = [count_unet(modules[name], checkpoint, shape) for name in ("unet", *controls_of(checkpoint))]
    return {
        "encode": sum(text[1:], text[0]),
        "step": sum(step[1:], step[0]),
        "decode": count_decoder(modules["vae"], checkpoint, shape),
    }


def count(module: Any, call: Callable[[], Any]) -> Work:
    """Runs `call`, and returns its FLOP and the number of all parameters of `module`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    return Work(float(counter.get_total_flops()), sum(p.numel() for p in module.parameters()))


def empty(*shape: int) -> Any:
    """Returns a float32 tensor of this shape on the meta device."""
    import torch

    return torch.empty(shape, device="meta")


def count_text(module: Any, checkpoint: Checkpoint, name: str, shape: Shape) -> Work:
    """Returns the work of one text encoder on tokens of shape (batch · chunks, length)."""
    import torch

    chunks = shape.batch * checkpoint.prompt_chunks
    tokens = empty(chunks, checkpoint.text_length(name)).to(torch.int64)
    return count(module, lambda: module(tokens))


def count_unet(unet: Any, checkpoint: Checkpoint, shape: Shape) -> Work:
    """Returns the work of one pass of the UNet, or a ControlNet, on latents (batch, channels, h, w)."""
    config, batch = checkpoint.unet, shape.batch
    height, width = (side // checkpoint.vae_factor for side in (shape.height, shape.width))
    length = checkpoint.prompt_chunks * checkpoint.text_length(checkpoint.text_encoders[0])
    options: dict[str, Any] = {}
    if "text_encoder_2" in checkpoint.components:
        pooled = checkpoint.components["text_encoder_2"].config["projection_dim"]
        options["added_cond_kwargs"] = {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, 6)}
    if hasattr(unet, "controlnet_cond_embedding"):
        options["controlnet_cond"] = empty(batch, 3, shape.height, shape.width)
    elif checkpoint.has_guidance_embedding:
        options["timestep_cond"] = empty(batch, config["time_cond_proj_dim"])
    latent = empty(batch, config["in_channels"], height, width)
    hidden = empty(batch, length, config["cross_attention_dim"])
    return count(unet, lambda: unet(latent, empty(batch), encoder_hidden_states=hidden, **options))


def count_decoder(vae: Any, checkpoint: Checkpoint, shape: Shape) -> Work:
    """Returns the work of decoding latents of shape (batch, channels, height, width)."""
    height, width = (side // checkpoint.vae_factor for side in (shape.height, shape.width))
    latent = empty(shape.batch, checkpoint.vae["latent_channels"], height, width)
    return count(vae.decoder, lambda: vae.decode(latent))
