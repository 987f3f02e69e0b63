"""OpenVINO's own export of a diffusers pipeline: each model as it is; the loop stays diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lcm_compile.spec import Shape

# OpenVINO's names.
PRECISIONS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
Convert = Callable[[nn.Module, Sequence[Tensor]], Callable[..., list[Tensor]]]


def use_openvino(pipe: Any, shape: Shape, precision: str, threads: int) -> None:
    """Puts compiled models of static shapes behind the pipeline's own."""
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
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }

    def convert(module: nn.Module, examples: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
        with torch.inference_mode():
            model = ov.convert_model(module.eval(), example_input=tuple(examples))
        model.reshape({port: list(x.shape) for port, x in zip(model.inputs, examples, strict=True)})
        request = core.compile_model(model, "CPU", settings).create_infer_request()

        def call(*given: Tensor) -> list[Tensor]:
            results = request.infer([x.contiguous().numpy() for x in given], share_inputs=True)
            return [torch.from_numpy(np.array(results[i])) for i in range(len(results))]

        return call

    return convert


class TextStates(nn.Module):
    """What the pipelines read of a text encoder: its first output, and the last but one states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = self.encoder(tokens, output_hidden_states=True)
        return found[0], found.hidden_states[-2]


def replace_text_encoder(encoder: Any, convert: Convert) -> None:
    length = encoder.config.max_position_embeddings
    call = convert(TextStates(encoder), [torch.zeros(1, length, dtype=torch.int64)])

    def forward(tokens: Tensor, *_: Any, **__: Any) -> BaseModelOutputWithPooling:
        first, states = call(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=first, hidden_states=(states, states))

    encoder.forward = forward


class Prediction(nn.Module):
    """The UNet with its arguments in a row."""

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.unet, self.names = unet, names

    def forward(self, latent: Tensor, timestep: Tensor, hidden: Tensor, *more: Tensor) -> Tensor:
        given = dict(zip(self.names, more, strict=True))
        condition = {"timestep_cond": given.pop("timestep_cond")} if "timestep_cond" in given else {}
        return self.unet(
            latent,
            timestep,
            encoder_hidden_states=hidden,
            added_cond_kwargs=given or None,
            return_dict=False,
            **condition,
        )[0]


def replace_unet(pipe: Any, latent: Tensor, convert: Convert) -> None:
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
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent, return_dict=False)[0]


def replace_decoder(vae: Any, latent: Tensor, convert: Convert) -> None:
    call = convert(Picture(vae), [latent])
    vae.decode = lambda latent, *_, **__: call(latent)
