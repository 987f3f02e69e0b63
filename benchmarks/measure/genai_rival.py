"""A rival: OpenVINO GenAI's Text2ImagePipeline, with its own loop, tokenizers and models.

It reads a folder of OpenVINO models with the names, inputs and outputs that Optimum Intel gives them. They
are written here from a diffusers pipeline, without that package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcm_compile.benchmarks.measure.openvino_rival import Picture, Prediction
from lcm_compile.benchmarks.measure.worker import Draw, Drawn
from lcm_compile.engines.import_openvino import HINTS, import_openvino
from lcm_compile.errors import BackendError
from lcm_compile.spec import Shape

MODEL = "openvino_model.xml"
DYNAMIC = -1  # a size that is known only when the model is compiled


def write_openvino_models(pipe: Any, to: Path, half: bool) -> None:
    """Writes a diffusers pipeline of fp32 modules as a new folder for GenAI.

    With `half` the weights are stored in fp16, as in the folders that are published for GenAI.
    """
    for number in ("", "_2"):
        encoder = getattr(pipe, f"text_encoder{number}", None)
        if encoder is None:
            continue
        length = encoder.config.max_position_embeddings
        tokens = {"input_ids": torch.zeros(1, length, dtype=torch.int64)}
        write_model(
            TextOutputs(encoder), tokens, encoder.config.to_dict(), to / f"text_encoder{number}", half
        )
        write_tokenizer(getattr(pipe, f"tokenizer{number}"), to / f"tokenizer{number}")
    write_unet(pipe, to / "unet", half)
    latent = torch.zeros(1, pipe.vae.config.latent_channels, 8, 8)
    write_model(Picture(pipe.vae), {"latent_sample": latent}, pipe.vae.config, to / "vae_decoder", half)
    pipe.scheduler.save_pretrained(to / "scheduler")
    pipe.save_config(to)


class TextOutputs(nn.Module):
    """A text encoder with all of its outputs: two of its own, then the states of every layer."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs for tokens of shape (batch, length)."""
        outputs = self.encoder(tokens, output_hidden_states=True)
        return outputs[0], outputs[1], *outputs.hidden_states


def write_unet(pipe: Any, to: Path, half: bool) -> None:
    """Writes the UNet. Its inputs are those that diffusers gives it, by diffusers' names."""
    unet, config = pipe.unet, pipe.unet.config
    more = {}
    if config.addition_embed_type == "text_time":
        more["text_embeds"] = torch.zeros(2, pipe.text_encoder_2.config.projection_dim)
        more["time_ids"] = torch.zeros(2, 6)
    if config.time_cond_proj_dim is not None:
        more["timestep_cond"] = torch.zeros(2, config.time_cond_proj_dim)
    examples = {
        "sample": torch.zeros(2, config.in_channels, 16, 16),
        "timestep": torch.zeros(1, dtype=torch.int64),
        "encoder_hidden_states": torch.zeros(2, pipe.tokenizer.model_max_length, config.cross_attention_dim),
        **more,
    }
    write_model(Prediction(unet, list(more)), examples, config, to, half)


def write_model(
    module: nn.Module, examples: Mapping[str, Tensor], config: Mapping[str, Any], to: Path, half: bool
) -> None:
    """Writes a module as an OpenVINO model with its config beside it.

    `examples` are its inputs by name. Batches, heights and widths may be others later.
    """
    ov = import_openvino()
    with torch.inference_mode():
        model = ov.convert_model(module.eval(), example_input=tuple(examples.values()))
    for port, name in zip(model.inputs, examples, strict=True):
        port.get_tensor().set_names({name})
    model.reshape({name: sizes(example) for name, example in examples.items()})
    to.mkdir(parents=True)
    ov.save_model(model, to / MODEL, compress_to_fp16=half)
    (to / "config.json").write_text(json.dumps(dict(config), default=str), encoding="utf-8")


def sizes(example: Tensor) -> Sequence[int]:
    """Returns the sizes of an input like this one, of which batch, height and width are dynamic."""
    if example.ndim == 4:
        return DYNAMIC, example.shape[1], DYNAMIC, DYNAMIC
    return (DYNAMIC, *example.shape[1:]) if example.ndim > 1 else example.shape


def write_tokenizer(tokenizer: Any, to: Path) -> None:
    """Writes a tokenizer as an OpenVINO model."""
    import openvino_tokenizers

    ov = import_openvino()
    to.mkdir(parents=True)
    ov.save_model(openvino_tokenizers.convert_tokenizer(tokenizer), to / "openvino_tokenizer.xml")


def draw_with_openvino_models(
    folder: Path, shape: Shape, precision: str, threads: int, how: Mapping[str, Any]
) -> Draw:
    """Compiles the models of a folder for this static shape, and returns the function that draws with them.

    `how` has the number of steps and the guidance scale. The noise is that of torch's generator. Raises
    BackendError if GenAI refuses the models.
    """
    import openvino_genai

    try:
        pipe = openvino_genai.Text2ImagePipeline(folder)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise BackendError(f"OpenVINO GenAI does not read these models: {reason}") from error
    pipe.reshape(shape.batch, shape.height, shape.width, how["guidance_scale"])
    pipe.compile(
        "CPU",
        INFERENCE_PRECISION_HINT=HINTS[precision],
        INFERENCE_NUM_THREADS=threads,
        NUM_STREAMS=1,
        PERFORMANCE_HINT="LATENCY",
    )

    def draw(prompt: str, seed: int) -> Drawn:
        pictures = pipe.generate(
            prompt,
            num_inference_steps=how["steps"],
            guidance_scale=how["guidance_scale"],
            generator=openvino_genai.TorchGenerator(seed),
        )
        metrics = pipe.get_performance_metrics().raw_metrics
        return Drawn(np.array(pictures.data), {"step": sum(metrics.unet_inference_durations) / 1000})

    return draw
