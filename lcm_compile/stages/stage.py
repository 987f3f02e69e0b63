"""A checkpoint's modules as static graphs: encode, context, step, decode.

Every float at a stage's edge is float32; whatever precision a stage computes in stays inside it.
What depends on the shape alone (SDXL's size ids) is part of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.graphs import StageContract
from lcm_compile.scheduler import LcmStep
from lcm_compile.spec import Shape
from lcm_compile.stages.contracts import draw_contract, make_contracts
from lcm_compile.stages.rewrites import rewrite_unet, rewrite_vae


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


def rewrite_modules(
    modules: Mapping[str, nn.Module], rewrites: Collection[str], shapes: Sequence[Shape], factor: int
) -> dict[str, nn.Module]:
    """Rewrites modules in place for pictures of these shapes; with them, the `context` that was taken out."""
    shaped = dict(modules)
    if unet := modules.get("unet"):
        latents = [(shape.height // factor, shape.width // factor) for shape in shapes]
        if context := rewrite_unet(unet, rewrites, latents):
            shaped["context"] = context.eval()
    if vae := modules.get("vae"):
        rewrite_vae(vae, rewrites)
    return shaped


def make_stages(
    checkpoint: Checkpoint, modules: Mapping[str, nn.Module], shape: Shape, rewrites: Collection[str] = ()
) -> list[Stage]:
    """The stages of a base whose modules have these rewrites, in the order the pipeline runs them."""
    contracts = make_contracts(checkpoint, shape, rewrites)
    return [make_stage(checkpoint, contract, modules, shape) for contract in contracts.values()]


def make_stage(
    checkpoint: Checkpoint, contract: StageContract, modules: Mapping[str, nn.Module], shape: Shape
) -> Stage:
    """One stage, of modules as rewrite_modules leaves them."""
    names = [spec.name for spec in contract.inputs]
    module: nn.Module
    if contract.name == "context":
        module = ContextStage(modules["context"], shape, names)
    elif contract.name == "step":
        module = Step(modules["unet"], shape, names, checkpoint.scheduler.clip)
    elif contract.name == "decode":
        module = Decode(modules["vae"], rgb8=contract.outputs[0].dtype == "uint8")
    elif "text_encoder_2" in modules:
        module = EncodeTwo(modules["text_encoder"], modules["text_encoder_2"])
    else:
        module = EncodeOne(modules["text_encoder"])
    return Stage(contract, module.eval())


def join_stages(stages: Sequence[Stage]) -> Stage:
    """Stages with the rewrites `context` and `lcm-step` as one that draws a whole picture."""
    contract = draw_contract({stage.name: stage.contract for stage in stages})
    return Stage(contract, Draw(stages, [spec.name for spec in contract.inputs]).eval())


class Draw(nn.Module):
    """Prompt → encode → context → every step → decode. The steps share one module, and so its weights."""

    def __init__(self, stages: Sequence[Stage], inputs: list[str]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({stage.name: stage.module for stage in stages})
        self.contracts = {stage.name: stage.contract for stage in stages}
        self.inputs = inputs

    def forward(self, *arrays: Tensor) -> Tensor:
        given = dict(zip(self.inputs, arrays, strict=True))
        given |= self.call("encode", given)
        given |= self.call("context", given)
        noises = given["noise"]
        latent = noises[0]
        for i, numbers in enumerate(given["coefficients"]):
            # The last step adds none: its coefficient is 0, for any finite noise.
            noise = noises[(i + 1) % len(noises)]
            own = {"latent": latent, "noise": noise, "time": given["times"][i], "coefficients": numbers}
            latent = self.call("step", {**given, **own})["next_latent"]
        return self.call("decode", {"latent": latent})["picture"]

    def call(self, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        contract = self.contracts[name]
        outputs = self.stages[name](*(given[spec.name] for spec in contract.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: array for spec, array in zip(contract.outputs, outputs, strict=True)}


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
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=guidance.device) * (-math.log(10000.0) / (half - 1))
    )
    angles = (guidance * 1000.0)[:, None] * frequencies[None]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def size_ids(shape: Shape) -> Tensor:
    """SDXL's: original size, crop corner, target size, (b, 6)."""
    return torch.tensor([[shape.height, shape.width, 0, 0, shape.height, shape.width]] * shape.batch).float()


class ContextStage(nn.Module):
    """What a prompt and timesteps settle, in the contract's order: keys and values, then times."""

    def __init__(self, context: nn.Module, shape: Shape, inputs: list[str]) -> None:
        super().__init__()
        self.context = context
        self.inputs = inputs
        # A plain tensor, not a buffer: casting the module to half precision leaves it as it is.
        self.size_ids = size_ids(shape)

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, arrays, strict=True))
        context: Any = self.context
        dtype = weight_type(context)
        added = guidance = None
        if "pooled" in given:
            embedded = context.add_time_proj(self.size_ids.flatten()).reshape(len(self.size_ids), -1)
            added = torch.cat([given["pooled"], embedded], dim=-1).to(dtype)
        if "guidance" in given:
            guidance = guidance_embedding(given["guidance"], context.time_cond_width).to(dtype)
        keys_values, times = context(given["hidden_states"].to(dtype), given["timesteps"], added, guidance)
        return tuple(array.float() for array in (*keys_values, times))


class Step(nn.Module):
    """One UNet pass and the LCM step after it. Floats arrive in fp32 and are cast where the UNet needs it."""

    def __init__(self, unet: nn.Module, shape: Shape, inputs: list[str], clip: float | None) -> None:
        super().__init__()
        self.unet = unet
        self.inputs = inputs
        self.clip = clip
        self.size_ids = size_ids(shape)

    def forward(self, *arrays: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        given = dict(zip(self.inputs, arrays, strict=True))
        latent = given["latent"]
        conditions = self.hoisted(given) if "time" in given else self.conditions(given)
        prediction = self.unet(latent.to(self.dtype), **conditions, return_dict=False)[0].float()
        if "coefficients" not in given:
            return prediction
        numbers: list[Any] = [0, *given["coefficients"].unbind(), self.clip]
        step = LcmStep(*numbers)
        return prediction, step(latent, prediction, given["noise"])

    def hoisted(self, given: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a UNet takes whose context was taken out of it."""
        keys_values = {k: v.to(self.dtype) for k, v in given.items() if k.startswith("keys_values")}
        return {"timestep": given["time"].to(self.dtype), "encoder_hidden_states": keys_values}

    def conditions(self, given: Mapping[str, Tensor]) -> dict[str, Any]:
        config: Any = self.unet.config
        options: dict[str, Any] = {}
        # Pooled text meets fp32 time embeddings in one Concat, which ONNX Runtime and TensorRT refuse
        # when the types differ: it stays fp32 up to there.
        if "pooled" in given:
            options["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": self.size_ids}
        if "guidance" in given:
            embedding = guidance_embedding(given["guidance"], config.time_cond_proj_dim)
            options["timestep_cond"] = embedding.to(self.dtype)
        states = given["hidden_states"].to(self.dtype)
        return {"timestep": given["timestep"], "encoder_hidden_states": states, **options}

    @property
    def dtype(self) -> torch.dtype:
        return weight_type(self.unet)


def weight_type(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class Decode(nn.Module):
    """Latents as the loop leaves them → pictures, undoing the scaling that the VAE's config names."""

    def __init__(self, vae: nn.Module, rgb8: bool = False) -> None:
        super().__init__()
        self.rgb8 = rgb8
        # The encoder half is no part of the graph.
        parts: Any = vae
        self.post_quant_conv: nn.Module | None = getattr(parts, "post_quant_conv", None)
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
        picture = (self.decoder(z).float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (picture * 255).round().to(torch.uint8) if self.rgb8 else picture
