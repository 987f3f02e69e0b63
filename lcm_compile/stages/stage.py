"""Turns the modules of a checkpoint into stages (encode, context, step, decode, …), as static graphs.

All float inputs and outputs of a stage are float32; inside, a stage computes in its own precision.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.checkpoint.ip_adapter import IP_ENCODER, IP_PROJECTION, reads_hidden_states
from lcm_compile.graphs import (
    CONTROLS,
    ENCODE_IMAGE,
    IP_IMAGE,
    IP_TOKENS,
    IP_WEIGHT,
    MASKED,
    T2I_ADAPTERS,
    StageContract,
    is_lora_input,
)
from lcm_compile.samplers.step import COEFFICIENTS
from lcm_compile.samplers.step import Step as SamplerStep
from lcm_compile.spec import Shape
from lcm_compile.stages.contracts import draw_contract, make_contracts
from lcm_compile.stages.lora_branches import WithLoras
from lcm_compile.stages.rewrites import TextAndPicture, rewrite_unet, rewrite_vae

LOG_VARIANCE = (-30.0, 20.0)  # what diffusers clamps the log of the latent's variance to


@dataclass
class Stage:
    """A module whose forward has exactly the inputs and outputs of its contract, in that order."""

    contract: StageContract
    module: nn.Module

    @property
    def name(self) -> str:
        """The name of the stage in its contract."""
        return self.contract.name

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Returns zeros for each input. Each is its own tensor, because an exporter merges shared ones."""
        return tuple(
            torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in self.contract.inputs
        )


def rewrite_modules(
    modules: Mapping[str, nn.Module], rewrites: Collection[str], shapes: Sequence[Shape], factor: int
) -> dict[str, nn.Module]:
    """Rewrites modules in place for pictures of these shapes, and returns them.

    With the rewrite `context` the result also has the `context` that was moved out of the UNet. `factor` is
    the VAE's: the side of a picture divided by that of its latent. Raises CheckpointError as rewrite_unet.
    """
    rewritten = dict(modules)
    if unet := modules.get("unet"):
        latents = [(shape.height // factor, shape.width // factor) for shape in shapes]
        if context := rewrite_unet(unet, rewrites, latents):
            rewritten["context"] = context.eval()
    if vae := modules.get("vae"):
        rewrite_vae(vae, rewrites)
    return rewritten


def make_stages(
    checkpoint: Checkpoint,
    modules: Mapping[str, nn.Module],
    shape: Shape,
    rewrites: Collection[str] = (),
    image: bool = False,
) -> list[Stage]:
    """Returns the stages of a base, in the order the pipeline runs them. `modules` have these rewrites."""
    contracts = make_contracts(checkpoint, shape, rewrites, image)
    return [make_stage(checkpoint, contract, modules) for contract in contracts.values()]


def make_stage(checkpoint: Checkpoint, contract: StageContract, modules: Mapping[str, nn.Module]) -> Stage:
    """Returns the stage of a contract, made of modules that rewrite_modules returned."""
    every = [spec.name for spec in contract.inputs]
    names = [name for name in every if not is_lora_input(name)]
    module: nn.Module
    if contract.name == "context":
        module = ContextStage(modules["context"], names)
    elif contract.name == "step":
        scheduler = checkpoint.scheduler
        ratio = scheduler.dynamic_thresholding_ratio if scheduler.thresholding else None
        module = Step(modules["unet"], names, ratio)
    elif contract.name in CONTROLS:
        module = Control(modules[contract.name], names)
    elif contract.name in T2I_ADAPTERS:
        module = Adapter(modules[contract.name])
    elif contract.name == IP_IMAGE:
        hidden = reads_hidden_states(checkpoint)
        module = IpImage(modules[IP_ENCODER], modules[IP_PROJECTION], hidden)
    elif contract.name == "decode":
        module = Decode(modules["vae"], rgb8=contract.outputs[0].dtype == "uint8")
    elif contract.name == ENCODE_IMAGE:
        module = EncodeImage(modules["vae"], sampled=len(contract.outputs) > 1)
    elif "text_encoder_2" in modules:
        encoders = modules["text_encoder"], modules["text_encoder_2"]
        module = EncodeTwo(*encoders, checkpoint.prompt_chunks, checkpoint.clip_skip)
    else:
        module = EncodeOne(modules["text_encoder"], checkpoint.prompt_chunks, checkpoint.clip_skip)
    if any(map(is_lora_input, every)):
        module = WithLoras(module, every)
    return Stage(contract, module.eval())


def join_stages(stages: Sequence[Stage]) -> Stage:
    """Returns one stage that draws a complete picture.

    The given stages must have the rewrites `context` and `lcm-step`.
    """
    contract = draw_contract({stage.name: stage.contract for stage in stages})
    return Stage(contract, Draw(stages, [spec.name for spec in contract.inputs]).eval())


class Draw(nn.Module):
    """Runs encode, context, every step and decode. The steps share one module, and so its weights."""

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
        latent = x0 = noises[0]
        for i, numbers in enumerate(given["coefficients"]):
            # The last step adds no noise: the coefficient of its noise is 0, so any finite noise will do.
            noise = noises[(i + 1) % len(noises)]
            own = {"latent": latent, "noise": noise, "previous_x0": x0}
            own |= {"time": given["times"][i], "coefficients": numbers}
            after = self.call("step", {**given, **own})
            latent, x0 = after["next_latent"], after["x0"]
        return self.call("decode", {"latent": latent})["picture"]

    def call(self, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the outputs of a stage by name; `given` has at least its inputs."""
        contract = self.contracts[name]
        outputs = self.stages[name](*(given[spec.name] for spec in contract.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: array for spec, array in zip(contract.outputs, outputs, strict=True)}


class EncodeOne(nn.Module):
    """Returns the last, normalised hidden states of the text encoder, for SD1.x and SD2.x.

    With a `clip_skip` they are those of so many layers before, normalised all the same.
    """

    def __init__(self, text_encoder: nn.Module, chunks: int = 1, clip_skip: int = 0) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.chunks = chunks
        self.clip_skip = clip_skip

    def forward(self, input_ids: Tensor) -> Tensor:
        # (b, chunks·77) → (b, chunks·77, d)
        encoder: Any = self.text_encoder
        text = encoder(split_chunks(input_ids, self.chunks), output_hidden_states=self.clip_skip > 0)
        states = text.last_hidden_state
        if self.clip_skip:
            states = encoder.final_layer_norm(text.hidden_states[-1 - self.clip_skip])
        return join_chunks(states, self.chunks).float()


class EncodeTwo(nn.Module):
    """Returns the next-to-last hidden states of both encoders side by side, and the second's pooled text.

    SDXL conditions on these. The pooled text is the first chunk's. With a `clip_skip` the hidden states are
    those of so many layers before.
    """

    def __init__(
        self, text_encoder: nn.Module, text_encoder_2: nn.Module, chunks: int = 1, clip_skip: int = 0
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.chunks = chunks
        self.layer = -2 - clip_skip

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        # (b, chunks·77), (b, chunks·77) → (b, chunks·77, d1 + d2), (b, p)
        one = self.text_encoder(split_chunks(input_ids, self.chunks), output_hidden_states=True)
        two = self.text_encoder_2(split_chunks(input_ids_2, self.chunks), output_hidden_states=True)
        hidden = torch.cat([one.hidden_states[self.layer], two.hidden_states[self.layer]], dim=-1)
        pooled = two.text_embeds.unflatten(0, (-1, self.chunks))[:, 0]
        return join_chunks(hidden, self.chunks).float(), pooled.float()


def split_chunks(input_ids: Tensor, chunks: int) -> Tensor:
    """Returns the chunks of prompts (b, chunks·77) as rows of their own (b·chunks, 77)."""
    return input_ids.unflatten(1, (chunks, -1)).flatten(0, 1)


def join_chunks(states: Tensor, chunks: int) -> Tensor:
    """Returns the states of chunks (b·chunks, 77, d) as those of prompts (b, chunks·77, d)."""
    return states.unflatten(0, (-1, chunks)).flatten(1, 2)


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Returns the sinusoidal embedding (b, width) of w = scale − 1, given as (b,), which full LCM UNets take.

    The source is Luo et al. 2023, section 4.1, in the form of VDM (github.com/google-research/vdm) that
    diffusers uses.
    """
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=guidance.device) * (-math.log(10000.0) / (half - 1))
    )
    angles = (guidance * 1000.0)[:, None] * frequencies[None]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class ContextStage(nn.Module):
    """Computes the context of a prompt and timesteps: keys and values, then times, as in its contract."""

    def __init__(self, context: nn.Module, inputs: list[str]) -> None:
        super().__init__()
        self.context = context
        self.inputs = inputs

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, arrays, strict=True))
        context: Any = self.context
        dtype = weight_type(context)
        added = guidance = None
        if "pooled" in given:
            embedded = context.add_time_proj(given["time_ids"].flatten()).unflatten(0, (-1, 6)).flatten(1)
            added = torch.cat([given["pooled"], embedded], dim=-1).to(dtype)
        if "guidance" in given:
            guidance = guidance_embedding(given["guidance"], context.time_cond_width).to(dtype)
        states = with_picture(given["hidden_states"].to(dtype), given)
        keys_values, times = context(states, given["timesteps"], added, guidance)
        return tuple(array.float() for array in (*keys_values, times))


class Step(nn.Module):
    """Runs the UNet, and then a sampler's step if it has `coefficients`. It casts its inputs for the UNet.

    `ratio` is that of dynamic thresholding, if the base's scheduler asks for it.
    """

    def __init__(self, unet: nn.Module, inputs: list[str], ratio: float | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.inputs = inputs
        self.ratio = ratio

    def forward(self, *arrays: Tensor) -> Tensor | tuple[Tensor, ...]:
        given = dict(zip(self.inputs, arrays, strict=True))
        latent = given["latent"]
        arguments = self.context_arguments(given) if "time" in given else self.arguments(given)
        if "residual_mid" in given:
            *down, mid = [v.to(self.dtype) for k, v in given.items() if k.startswith("residual_")]
            arguments["down_block_additional_residuals"] = down
            arguments["mid_block_additional_residual"] = mid
        if "feature_0" in given:
            features = [v.to(self.dtype) for k, v in given.items() if k.startswith("feature_")]
            arguments["down_intrablock_additional_residuals"] = [
                feature.expand(len(latent), -1, -1, -1) for feature in features
            ]
        seen = torch.cat([latent, given[MASKED]], dim=1) if MASKED in given else latent
        prediction = self.unet(seen.to(self.dtype), **arguments, return_dict=False)[0].float()
        if "coefficients" not in given:
            return prediction
        numbers: dict[str, Any] = dict(zip(COEFFICIENTS, given["coefficients"].unbind(), strict=True))
        step = SamplerStep(timestep=0, **numbers, ratio=self.ratio)
        return prediction, *step(latent, prediction, given["noise"], given["previous_x0"])

    def context_arguments(self, given: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns the UNet's arguments besides the latent, if its context was moved to the context stage."""
        names = [name for name in given if name.removeprefix("ip_").startswith("keys_values")]
        keys_values = {name: given[name].to(self.dtype) for name in names}
        return {"timestep": given["time"].to(self.dtype), "encoder_hidden_states": keys_values}

    def arguments(self, given: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns the UNet's arguments besides the latent, if the UNet computes its context itself."""
        config: Any = self.unet.config
        options: dict[str, Any] = {}
        # Pooled text is joined with fp32 time embeddings in one Concat. ONNX Runtime and TensorRT refuse a
        # Concat of different types, so the text stays in fp32 up to there.
        if "pooled" in given:
            options["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
        if "guidance" in given:
            embedding = guidance_embedding(given["guidance"], config.time_cond_proj_dim)
            options["timestep_cond"] = embedding.to(self.dtype)
        states = with_picture(given["hidden_states"].to(self.dtype), given)
        return {"timestep": given["timestep"], "encoder_hidden_states": states, **options}

    @property
    def dtype(self) -> torch.dtype:
        """The type of the UNet's weights."""
        return weight_type(self.unet)


class Control(nn.Module):
    """Runs a ControlNet, and multiplies its residuals by the strength."""

    def __init__(self, controlnet: nn.Module, inputs: list[str]) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.inputs = inputs

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, arrays, strict=True))
        dtype = weight_type(self.controlnet)
        # As in Step.arguments, the pooled text stays in fp32 until it is joined with the time embeddings.
        sizes = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if "pooled" in given else None
        down, mid = self.controlnet(
            given["latent"].to(dtype),
            given["timestep"],
            given["hidden_states"].to(dtype),
            controlnet_cond=given["control"].to(dtype),
            added_cond_kwargs=sizes,
            return_dict=False,
        )
        return tuple(residual.float() * given["strength"] for residual in (*down, mid))


class Adapter(nn.Module):
    """Runs a T2I-Adapter on a picture, and multiplies its features by the strength."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, control: Tensor, strength: Tensor) -> tuple[Tensor, ...]:
        features = self.adapter(control.to(weight_type(self.adapter)))
        return tuple(feature.float() * strength for feature in features)


def with_picture(states: Tensor, given: Mapping[str, Tensor]) -> Tensor | TextAndPicture:
    """Returns text states with the tokens of an IP-Adapter's picture and their weight, if these are given."""
    if IP_TOKENS not in given:
        return states
    return states, given[IP_TOKENS].to(states.dtype), given[IP_WEIGHT].to(states.dtype)


class IpImage(nn.Module):
    """Encodes a picture to the tokens of an IP-Adapter, which reads the encoder's embedding or hidden states.

    Where nothing is shown, they are those that diffusers gives a negative prompt: of an embedding of zeros,
    or of the hidden states of a picture of zeros.
    """

    def __init__(self, encoder: nn.Module, projection: nn.Module, hidden: bool) -> None:
        super().__init__()
        self.hidden = hidden
        self.encoder = encoder
        self.projection = projection

    def forward(self, pixels: Tensor, shown: Tensor) -> Tensor:
        # (1, 3, h, w), (1,) → (1, n, d)
        dtype = weight_type(self.encoder)
        if self.hidden:
            seen = self.encoder((pixels * shown).to(dtype), output_hidden_states=True).hidden_states[-2]
        else:
            seen = self.encoder(pixels.to(dtype)).image_embeds * shown.to(dtype)
        tokens: Tensor = self.projection(seen)
        return tokens.float()


def weight_type(module: nn.Module) -> torch.dtype:
    """Returns the type of a module's first weight."""
    return next(module.parameters()).dtype


class Decode(nn.Module):
    """Decodes the last latents of the loop to pictures; first it undoes the scaling of the VAE's config."""

    def __init__(self, vae: nn.Module, rgb8: bool = False) -> None:
        super().__init__()
        self.rgb8 = rgb8
        # Only the decoder is used: the VAE's encoder is not part of the graph.
        autoencoder: Any = vae
        self.post_quant_conv: nn.Module | None = getattr(autoencoder, "post_quant_conv", None)
        self.decoder: nn.Module = autoencoder.decoder
        self.scale, self.shift = latent_scaling(autoencoder.config)

    def forward(self, latent: Tensor) -> Tensor:
        # (b, c, h, w) → (b, h·f, w·f, 3)
        z = latent * self.scale + self.shift
        z = z.to(weight_type(self.post_quant_conv or self.decoder))
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        picture = (self.decoder(z).float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (picture * 255).round().to(torch.uint8) if self.rgb8 else picture


class EncodeImage(nn.Module):
    """Encodes a picture to the mean and the standard deviation of its latent, scaled as the UNet takes it.

    One that is not `sampled`, which is a tiny autoencoder's, gives the latent alone.
    """

    def __init__(self, vae: nn.Module, sampled: bool = True) -> None:
        super().__init__()
        autoencoder: Any = vae
        self.encoder: nn.Module = autoencoder.encoder
        self.quant_conv: nn.Module | None = getattr(autoencoder, "quant_conv", None)
        self.sampled = sampled
        self.scale, self.shift = latent_scaling(autoencoder.config)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # (1, h·f, w·f, 3) → (1, c, h, w), twice
        pixels = (2 * image - 1).permute(0, 3, 1, 2)
        encoded = self.encoder(pixels.to(weight_type(self.encoder)))
        if self.quant_conv is not None:
            encoded = self.quant_conv(encoded)
        if not self.sampled:
            return (encoded.float() - self.shift) / self.scale
        mean, log_variance = encoded.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE))
        return (mean - self.shift) / self.scale, std / self.scale


def latent_scaling(config: Any) -> tuple[Tensor, Tensor]:
    """Returns (a, b) of the VAE's own latents a·z + b, for z as the UNet computes them: each (1, c, 1, 1).

    They are to be plain tensors of a module, not buffers, so that casting it to half precision does not
    change them.
    """
    scale = torch.full((1, config.latent_channels, 1, 1), 1.0 / config.scaling_factor)
    shift = torch.zeros_like(scale)
    if getattr(config, "latents_mean", None) is not None:
        scale = scale * torch.tensor(config.latents_std, dtype=torch.float32).view(scale.shape)
        shift = shift + torch.tensor(config.latents_mean, dtype=torch.float32).view(scale.shape)
    return scale, shift
