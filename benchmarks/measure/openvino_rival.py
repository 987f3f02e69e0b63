"""A rival: a diffusers pipeline whose models OpenVINO has converted unchanged. The loop stays diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lcm_compile.engines.import_openvino import HINTS, import_openvino
from lcm_compile.spec import Shape

# Compiles a module for the shapes of its example inputs, and returns a function on tensors.
Convert = Callable[[nn.Module, Sequence[Tensor]], Callable[..., list[Tensor]]]


def use_openvino(pipe: Any, shape: Shape, precision: str, threads: int) -> None:
    """Makes the pipeline's text encoders, UNet and VAE decoder call models compiled for this static shape."""
    convert = converter(precision, threads)
    factor = pipe.vae_scale_factor
    latent = torch.zeros(
        shape.batch, pipe.unet.config.in_channels, shape.height // factor, shape.width // factor
    )
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            replace_text_encoder(getattr(pipe, name), convert)
    replace_unet(pipe, latent, convert)
    replace_decoder(pipe.vae, latent, convert)


def converter(precision: str, threads: int) -> Convert:
    """Returns a function that compiles modules for the processor, in this precision."""
    ov = import_openvino()
    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }

    def convert(module: nn.Module, examples: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
        with torch.inference_mode():
            model = ov.convert_model(module.eval(), example_input=tuple(examples))
        model.reshape({port: list(x.shape) for port, x in zip(model.inputs, examples, strict=True)})
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def call(*inputs: Tensor) -> list[Tensor]:
            results = request.infer([x.contiguous().numpy() for x in inputs], share_inputs=True)
            return [torch.from_numpy(np.array(results[i])) for i in range(len(results))]

        return call

    return convert


class TextStates(nn.Module):
    """A text encoder with the two outputs that pipelines read: its first, and the penultimate states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both outputs for tokens of shape (1, length)."""
        outputs = self.encoder(tokens, output_hidden_states=True)
        return outputs[0], outputs.hidden_states[-2]


def replace_text_encoder(encoder: Any, convert: Convert) -> None:
    """Makes the text encoder call its compiled model. One prompt at a time: tokens of shape (1, length)."""
    length = encoder.config.max_position_embeddings
    call = convert(TextStates(encoder), [torch.zeros(1, length, dtype=torch.int64)])

    def forward(tokens: Tensor, *_: Any, **__: Any) -> BaseModelOutputWithPooling:
        first, states = call(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=first, hidden_states=(states, states))

    encoder.forward = forward


class Prediction(nn.Module):
    """A UNet that takes all inputs as positional arguments, which the conversion needs.

    `names` are the names of the inputs after the hidden states.
    """

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.unet, self.names = unet, names

    def forward(self, latent: Tensor, timestep: Tensor, hidden: Tensor, *more: Tensor) -> Tensor:
        """Returns the prediction, of the latent's shape. `more` are the inputs called `names`."""
        added = dict(zip(self.names, more, strict=True))
        condition = {"timestep_cond": added.pop("timestep_cond")} if "timestep_cond" in added else {}
        return self.unet(
            latent,
            timestep,
            encoder_hidden_states=hidden,
            added_cond_kwargs=added or None,
            return_dict=False,
            **condition,
        )[0]


def replace_unet(pipe: Any, latent: Tensor, convert: Convert) -> None:
    """Makes the UNet call its compiled model, for latents of the shape of `latent`."""
    unet, batch = pipe.unet, len(latent)
    hidden = torch.zeros(batch, pipe.tokenizer.model_max_length, unet.config.cross_attention_dim)
    more = {}
    if unet.config.addition_embed_type == "text_time":
        more["text_embeds"] = torch.zeros(batch, pipe.text_encoder_2.config.projection_dim)
        more["time_ids"] = torch.zeros(batch, 6)
    if unet.config.time_cond_proj_dim is not None:
        more["timestep_cond"] = torch.zeros(batch, unet.config.time_cond_proj_dim)
    call = convert(Prediction(unet, list(more)), [latent, torch.zeros(()), hidden, *more.values()])

    def forward(
        latent: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any
    ) -> list[Tensor]:
        given = {**(options.get("added_cond_kwargs") or {}), "timestep_cond": options.get("timestep_cond")}
        return call(latent, timestep.float(), encoder_hidden_states, *(given[name].float() for name in more))

    unet.forward = forward


class Picture(nn.Module):
    """A VAE's decoder as a module whose forward pass takes the latent and returns the picture."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor) -> Tensor:
        """Returns the decoded picture of shape (batch, 3, height, width)."""
        return self.vae.decode(latent, return_dict=False)[0]


def replace_decoder(vae: Any, latent: Tensor, convert: Convert) -> None:
    """Makes the VAE decode with its compiled model, for latents of the shape of `latent`."""
    call = convert(Picture(vae), [latent])
    vae.decode = lambda latent, *_, **__: call(latent)
