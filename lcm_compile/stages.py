"""A checkpoint's modules as three static graphs: encode, step, decode.

Every float at a stage's edge is float32; whatever precision a stage computes in stays inside it.
What depends on the shape alone (SDXL's size ids) is part of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcm_compile.checkpoints import Checkpoint
from lcm_compile.contracts import COMPONENTS, make_contracts
from lcm_compile.spec import Shape, StageContract


@dataclass
class Stage:
    """A module whose forward takes and returns exactly what its contract names, in that order."""

    contract: StageContract
    module: nn.Module

    @property
    def name(self) -> str:
        return self.contract.name

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Arguments of the contract's shapes, each its own tensor (an exporter would merge shared ones)."""
        return tuple(
            torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in self.contract.inputs
        )


def make_stages(checkpoint: Checkpoint, modules: Mapping[str, nn.Module], shape: Shape) -> list[Stage]:
    """The stages of a base for pictures of one shape, in the order the pipeline runs them."""
    return [make_stage(checkpoint, name, modules, shape) for name in COMPONENTS]


def make_stage(checkpoint: Checkpoint, name: str, modules: Mapping[str, nn.Module], shape: Shape) -> Stage:
    """One stage, of the modules that COMPONENTS names."""
    contract = make_contracts(checkpoint, shape)[name]
    module: nn.Module
    if name == "step":
        module = Step(modules["unet"], shape, [spec.name for spec in contract.inputs])
    elif name == "decode":
        module = Decode(modules["vae"])
    elif "text_encoder_2" in modules:
        module = EncodeTwo(modules["text_encoder"], modules["text_encoder_2"])
    else:
        module = EncodeOne(modules["text_encoder"])
    return Stage(contract, module.eval())


class EncodeOne(nn.Module):
    """SD1.x and SD2.x: the text encoder's last, normalised states."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        # (b, 77) → (b, 77, d)
        return self.text_encoder(input_ids)[0].float()


class EncodeTwo(nn.Module):
    """SDXL: the last but one states of both encoders side by side, and the second's pooled text."""

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        # (b, 77), (b, 77) → (b, 77, d1 + d2), (b, p)
        one = self.text_encoder(input_ids, output_hidden_states=True)
        two = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        hidden = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        return hidden.float(), two.text_embeds.float()


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """The sinusoidal embedding of w = scale − 1 that full LCM UNets take: (b,) → (b, width).

    Luo et al. 2023, section 4.1; the form of VDM (github.com/google-research/vdm) that diffusers uses.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    angles = (guidance * 1000.0)[:, None] * frequencies[None]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class Step(nn.Module):
    """One UNet pass. Text states and the timestep arrive in fp32 and are cast where the UNet needs it."""

    def __init__(self, unet: nn.Module, shape: Shape, inputs: list[str]) -> None:
        super().__init__()
        self.unet = unet
        self.inputs = inputs
        # original size, crop corner, target size: (b, 6)
        ids = [shape.height, shape.width, 0, 0, shape.height, shape.width]
        # A plain tensor, not a buffer: casting the module to half precision leaves it as it is.
        self.time_ids = torch.tensor([ids] * shape.batch, dtype=torch.float32)

    def forward(self, *arrays: Tensor) -> Tensor:
        given = dict(zip(self.inputs, arrays, strict=True))
        config: Any = self.unet.config
        options: dict[str, Any] = {}
        # Pooled text meets fp32 time embeddings in one Concat, which ONNX Runtime and TensorRT refuse
        # when the types differ: it stays fp32 up to there.
        if "pooled" in given:
            options["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": self.time_ids}
        if "guidance" in given:
            embedding = guidance_embedding(given["guidance"], config.time_cond_proj_dim)
            options["timestep_cond"] = embedding.to(self.dtype)
        prediction = self.unet(
            given["latent"].to(self.dtype),
            given["timestep"],
            encoder_hidden_states=given["hidden_states"].to(self.dtype),
            return_dict=False,
            **options,
        )[0]
        return prediction.float()

    @property
    def dtype(self) -> torch.dtype:
        return weight_type(self.unet)


def weight_type(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class Decode(nn.Module):
    """Latents as the loop leaves them → pictures, undoing the scaling that the VAE's config names."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        # The encoder half is no part of the graph.
        parts: Any = vae
        self.post_quant_conv: nn.Module | None = parts.post_quant_conv
        self.decoder: nn.Module = parts.decoder
        config = parts.config
        scale = torch.full((1, config.latent_channels, 1, 1), 1.0 / config.scaling_factor)
        shift = torch.zeros_like(scale)
        if getattr(config, "latents_mean", None) is not None:
            scale = scale * torch.tensor(config.latents_std, dtype=torch.float32).view(scale.shape)
            shift = shift + torch.tensor(config.latents_mean, dtype=torch.float32).view(scale.shape)
        # Plain tensors, not buffers: casting the module to half precision leaves them as they are.
        self.scale, self.shift = scale, shift

    def forward(self, latent: Tensor) -> Tensor:
        # (b, c, h, w) → (b, h·f, w·f, 3)
        z = latent * self.scale + self.shift
        z = z.to(weight_type(self.post_quant_conv or self.decoder))
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        picture = self.decoder(z).float()
        return (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
