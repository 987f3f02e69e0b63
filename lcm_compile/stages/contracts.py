"""The contract of each stage: what it takes and gives, worked out from the configs of a base."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component, is_tiny
from lcm_compile.checkpoint.controlnet import controls_of
from lcm_compile.checkpoint.ip_adapter import (
    IP_ENCODER,
    IP_LAYERS,
    IP_PROJECTION,
    has_ip_adapter,
    image_size,
    tokens_shape,
)
from lcm_compile.checkpoint.t2i_adapter import adapters_of, feature_sizes, setting
from lcm_compile.graphs import (
    CONTROLS,
    DOWN,
    DRAW,
    ENCODE_IMAGE,
    GUIDES,
    IP_IMAGE,
    IP_TOKENS,
    IP_WEIGHT,
    MASKED,
    STRENGTHS,
    T2I_ADAPTERS,
    UP,
    LoraInputs,
    StageContract,
    TensorSpec,
)
from lcm_compile.samplers.step import COEFFICIENTS
from lcm_compile.spec import BuildSpec, Shape

# Each model, with the stages that are made of it and the components that it consists of. The pipeline runs
# the stages in this order.
MODEL_STAGES = {
    "text": (("encode",), ("text_encoder", "text_encoder_2")),
    "ip-adapter": ((IP_IMAGE,), (IP_ENCODER, IP_PROJECTION)),
    "unet": ((*T2I_ADAPTERS, "context", *CONTROLS, "step"), ("unet", IP_LAYERS, *GUIDES)),
    "vae": (("decode", ENCODE_IMAGE), ("vae",)),
}
# How many timesteps one call of the context stage takes. A picture of more steps calls it again.
CONTEXT_STEPS = 4
SIZES = "height and width of the original, top and left of the crop, and height and width aimed at, in pixels"
NUMBERS = f"{', '.join(COEFFICIENTS[:-1])} and {COEFFICIENTS[-1]}"


def main_stage(model: str) -> str:
    """Returns the stage of a model that draws: its last one but for ENCODE_IMAGE, which is not rewritten."""
    return next(name for name in reversed(MODEL_STAGES[model][0]) if name != ENCODE_IMAGE)


def models_in(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns the models of MODEL_STAGES that a checkpoint has: all, or those but for the IP-Adapter's."""
    return tuple(m for m, (_, components) in MODEL_STAGES.items() if components[0] in checkpoint.components)


def models_of(spec: BuildSpec, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns what is in memory at a time: one model after another, or all of them for a single graph."""
    return (DRAW,) if spec.whole_loop else models_in(checkpoint)


def graph_contracts(checkpoint: Checkpoint, shape: Shape, spec: BuildSpec) -> dict[str, StageContract]:
    """Returns the contracts of a spec's graphs: one for each stage, or one for a single graph of all."""
    contracts = make_contracts(checkpoint, shape, spec.rewrites, spec.image)
    return {DRAW: draw_contract(contracts)} if spec.whole_loop else contracts


def draw_contract(contracts: Mapping[str, StageContract]) -> StageContract:
    """Returns the contract of one graph that runs all stages for a picture of CONTEXT_STEPS steps."""
    inputs = {name: {spec.name: spec for spec in contract.inputs} for name, contract in contracts.items()}
    given = ("timesteps", "guidance", "time_ids")
    conditions = [inputs["context"][name] for name in given if name in inputs["context"]]
    latent, coefficients = inputs["step"]["latent"], inputs["step"]["coefficients"]
    noise = TensorSpec(
        "noise",
        (CONTEXT_STEPS, *latent.shape),
        latent.dtype,
        "the first latent, and then the noise that each step but the last adds",
    )
    each = replace(
        coefficients, shape=(CONTEXT_STEPS, *coefficients.shape), meaning=f"for each step: {NUMBERS}"
    )
    everything = (*contracts["encode"].inputs, *conditions, noise, each)
    return StageContract(DRAW, everything, contracts["decode"].outputs)


def make_contracts(
    checkpoint: Checkpoint, shape: Shape, rewrites: Collection[str] = (), image: bool = False
) -> dict[str, StageContract]:
    """Returns the contract of every stage for pictures of one shape, in the order the pipeline runs them.

    With `image` there is also the one that encodes a picture. Raises CheckpointError if the UNet's config
    makes no model.
    """
    tokens = token_specs(checkpoint, shape)
    text = text_specs(checkpoint, shape, tokens[0].shape[1])
    contracts = {"encode": StageContract("encode", tokens, text)}
    contracts |= {name: adapter_contract(checkpoint, name, shape) for name in adapters_of(checkpoint)}
    conditions = (TensorSpec("timestep", (1,), "float32", "training timestep, 0 to 999"), *text)
    if checkpoint.has_guidance_embedding:
        conditions += (TensorSpec("guidance", (1,), "float32", "guidance scale minus 1"),)
    if len(text) > 1:
        conditions += (TensorSpec("time_ids", (shape.batch, 6), "float32", SIZES),)
    plain = conditions  # what ControlNets read
    if has_ip_adapter(checkpoint):
        contracts[IP_IMAGE] = ip_image_contract(checkpoint)
        weight = TensorSpec(IP_WEIGHT, (1,), "float32", "how strongly the picture's tokens count")
        conditions += (*contracts[IP_IMAGE].outputs, weight)
    if "context" in rewrites:
        timesteps = TensorSpec("timesteps", (CONTEXT_STEPS,), "float32", "training timesteps, 0 to 999")
        keys_values, times = context_specs(checkpoint, shape, tokens[0].shape[1])
        contracts["context"] = StageContract("context", (timesteps, *conditions[1:]), (*keys_values, times))
        time = TensorSpec("time", times.shape[1:], "float32", "one row of the context's times")
        conditions = (time, *keys_values)
    latent = latent_shape(checkpoint, shape)
    if controls := controls_of(checkpoint):
        residuals = residual_specs(checkpoint.unet, latent)
        inputs = control_inputs(plain, latent, shape)
        contracts |= {name: StageContract(name, inputs, residuals) for name in controls}
        conditions += residuals
    for name in adapters_of(checkpoint)[:1]:  # the features of several have the same sizes, and are added up
        conditions += contracts[name].outputs
    if checkpoint.is_inpainting:
        conditions = (masked_spec(latent), *conditions)
    contracts["step"] = step_contract(checkpoint, latent, conditions, "lcm-step" in rewrites)
    clean = TensorSpec("latent", latent, "float32", "clean latent, the result of the last step")
    contracts["decode"] = StageContract("decode", (clean,), (picture_spec(shape, "rgb8" in rewrites),))
    if checkpoint.loras:
        for name, specs in lora_specs(checkpoint, "context" in rewrites).items():
            contracts[name] = replace(contracts[name], inputs=(*contracts[name].inputs, *specs))
    if image:
        contracts[ENCODE_IMAGE] = image_contract(checkpoint, shape, latent)
    return contracts


def lora_specs(checkpoint: Checkpoint, has_context: bool) -> dict[str, tuple[TensorSpec, ...]]:
    """Returns for each stage with LoRA inputs what these are: see LoraInputs."""
    loras, meaning = checkpoint.loras, "weight of each LoRA in each part of the model"
    strengths = TensorSpec(STRENGTHS, (len(loras.names), len(loras.parts)), "float32", meaning)
    shared = (strengths,) if loras.names else ()
    stages = ["encode", *(["context"] if has_context else []), "step"]
    specs: dict[str, tuple[TensorSpec, ...]] = dict.fromkeys(stages, shared)
    if not loras.slots:
        return specs
    for component, stage, layers in slots_of(checkpoint, has_context):
        named = {f"{component}.{name}": shape for name, shape in layers.items()}
        specs[stage] += slot_specs(loras, named)
    return specs


def slot_specs(loras: LoraInputs, layers: Mapping[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    """Returns the inputs for the factors of LoRAs in slots, of layers by name with their weight's shape."""
    ranks, specs = loras.slots * loras.rank, []
    for name, (out, *ins) in layers.items():
        down = TensorSpec(DOWN + name, (ranks, *ins), "float32", "the A of each LoRA, one below the other")
        specs += [down, TensorSpec(UP + name, (out, ranks), "float32", "λ·s·B of each LoRA, side by side")]
    return tuple(specs)


def slots_of(checkpoint: Checkpoint, has_context: bool) -> list[tuple[str, str, dict[str, tuple[int, ...]]]]:
    """Returns the layers that have slots, with their weights' shapes, by component and stage."""
    from lcm_compile.stages.lora_branches import slot_layers
    from lcm_compile.stages.rewrites import is_of_context

    found = [(name, "encode", slot_layers(checkpoint, name)) for name in checkpoint.text_encoders]
    unet = slot_layers(checkpoint, "unet")
    moved = {name for name in unet if has_context and is_of_context(name)}
    for stage, names in (("context", moved), ("step", unet.keys() - moved)):
        if names:
            found.append(("unet", stage, {name: unet[name] for name in unet if name in names}))
    return found


def masked_spec(latent: tuple[int, int, int, int]) -> TensorSpec:
    """Returns the input of an inpainting model's step: of one channel more than a latent."""
    batch, channels, *size = latent
    meaning = "the mask, 1 where the picture is repainted, and the latent of the picture without that part"
    return TensorSpec(MASKED, (batch, 1 + channels, *size), "float32", meaning)


def image_contract(checkpoint: Checkpoint, shape: Shape, latent: tuple[int, int, int, int]) -> StageContract:
    """Returns the contract of the VAE's encoder, which takes one picture, whatever the batch.

    A tiny autoencoder gives a latent alone, and so has no `std`.
    """
    picture = TensorSpec("image", (1, shape.height, shape.width, 3), "float32", "RGB, 0 to 1")
    one = (1, *latent[1:])
    mean = TensorSpec("mean", one, "float32", "mean of the clean latent, scaled as the step takes it")
    std = TensorSpec("std", one, "float32", "the standard deviation of the latent")
    return StageContract(ENCODE_IMAGE, (picture,), (mean,) if is_tiny(checkpoint.vae) else (mean, std))


def ip_image_contract(checkpoint: Checkpoint) -> StageContract:
    """Returns the contract of an IP-Adapter's image encoder, which takes one picture, whatever the batch."""
    side = image_size(checkpoint)
    pixels = TensorSpec("pixels", (1, 3, side, side), "float32", "the picture as CLIP reads it, normalised")
    shown = TensorSpec("shown", (1,), "float32", "1, or 0 for the tokens of no picture, of a negative prompt")
    tokens = TensorSpec(
        IP_TOKENS, tokens_shape(checkpoint), "float32", "tokens of the picture, as wide as the text states"
    )
    return StageContract(IP_IMAGE, (pixels, shown), (tokens,))


def token_specs(checkpoint: Checkpoint, shape: Shape) -> tuple[TensorSpec, ...]:
    """Returns the inputs of the text encoders."""
    return tuple(
        TensorSpec(
            "input_ids" if i == 0 else f"input_ids_{i + 1}",
            (shape.batch, checkpoint.prompt_chunks * checkpoint.text_length(name)),
            "int64",
            f"tokens of the {'first' if i == 0 else 'second'} tokenizer",
        )
        for i, name in enumerate(checkpoint.text_encoders)
    )


def text_specs(checkpoint: Checkpoint, shape: Shape, length: int) -> tuple[TensorSpec, ...]:
    """Returns the outputs of the text encoders, for prompts of `length` tokens."""
    width = checkpoint.unet["cross_attention_dim"]
    hidden = TensorSpec(
        "hidden_states", (shape.batch, length, width), "float32", "one text state for each token"
    )
    if "text_encoder_2" not in checkpoint.components:
        return (hidden,)
    pooled = checkpoint.components["text_encoder_2"].config["projection_dim"]
    return hidden, TensorSpec(
        "pooled", (shape.batch, pooled), "float32", "one text state for the complete prompt"
    )


def latent_shape(checkpoint: Checkpoint, shape: Shape) -> tuple[int, int, int, int]:
    """Returns the shape of a latent: (batch, channels, height, width)."""
    factor = checkpoint.vae_factor
    return shape.batch, checkpoint.vae["latent_channels"], shape.height // factor, shape.width // factor


def step_contract(
    checkpoint: Checkpoint,
    latent: tuple[int, int, int, int],
    conditions: tuple[TensorSpec, ...],
    with_scheduler: bool,
) -> StageContract:
    """Returns the contract of the UNet. With `with_scheduler` it also computes the next latent."""
    inputs = (TensorSpec("latent", latent, "float32", "noisy latent"), *conditions)
    predicted = f"the UNet's prediction, of type {checkpoint.scheduler.prediction_type}"
    outputs: tuple[TensorSpec, ...] = (TensorSpec("prediction", latent, "float32", predicted),)
    if with_scheduler:
        inputs += (
            TensorSpec("noise", latent, "float32", "the noise that the step adds"),
            TensorSpec(
                "previous_x0", latent, "float32", "the x0 of the step before, for samplers that use it"
            ),
            TensorSpec("coefficients", (len(COEFFICIENTS),), "float32", NUMBERS),
        )
        outputs += (
            TensorSpec("next_latent", latent, "float32", "the latent of the next step"),
            TensorSpec("x0", latent, "float32", "the clean latent that the UNet foresees"),
        )
    return StageContract("step", inputs, outputs)


def control_inputs(
    conditions: tuple[TensorSpec, ...], latent: tuple[int, int, int, int], shape: Shape
) -> tuple[TensorSpec, ...]:
    """Returns the inputs of a ControlNet; `conditions` are those of a UNet that computes its own context."""
    return (
        TensorSpec("latent", latent, "float32", "noisy latent"),
        *(spec for spec in conditions if spec.name != "guidance"),
        TensorSpec(
            "control", (shape.batch, 3, shape.height, shape.width), "float32", "control picture, RGB, 0 to 1"
        ),
        TensorSpec("strength", (1,), "float32", "what the residuals are multiplied by"),
    )


def adapter_contract(checkpoint: Checkpoint, name: str, shape: Shape) -> StageContract:
    """Returns the contract of a T2I-Adapter, which takes one picture, whatever the batch."""
    component = checkpoint.components[name]
    channels = setting(component, "in_channels")
    meaning = f"control picture, {'RGB' if channels == 3 else 'grey'}, 0 to 1"
    size = (1, channels, shape.height, shape.width)
    features = tuple(
        TensorSpec(f"feature_{i}", (1, *one), "float32", f"what a T2I-Adapter adds at the UNet's block {i}")
        for i, one in enumerate(feature_sizes(component, shape.height, shape.width))
    )
    picture = TensorSpec("control", size, "float32", meaning)
    strength = TensorSpec("strength", (1,), "float32", "what the features are multiplied by")
    return StageContract(name, (picture, strength), features)


def residual_specs(unet: Mapping[str, Any], latent: tuple[int, int, int, int]) -> tuple[TensorSpec, ...]:
    """Returns the outputs of a ControlNet, which are inputs of the step: a residual for each skip connection.

    They are those of conv_in, of each layer and downsampler of the down blocks, and of the middle block.
    """
    batch, _, height, width = latent
    channels = unet["block_out_channels"]
    layers = unet.get("layers_per_block", 2)
    each = [layers] * len(channels) if isinstance(layers, int) else layers
    shapes = [(batch, channels[0], height, width)]
    for i, (own, count) in enumerate(zip(channels, each, strict=True)):
        shapes += [(batch, own, height, width)] * count
        if i < len(channels) - 1:
            height, width = -(-height // 2), -(-width // 2)
            shapes.append((batch, own, height, width))
    added = "what a ControlNet adds to the UNet's {}"
    return (
        *(
            TensorSpec(f"residual_{i}", found, "float32", added.format(f"skip connection {i}"))
            for i, found in enumerate(shapes)
        ),
        TensorSpec("residual_mid", shapes[-1], "float32", added.format("middle block")),
    )


def picture_spec(shape: Shape, eight_bits: bool) -> TensorSpec:
    """Returns the output of the decoder."""
    size = (shape.batch, shape.height, shape.width, 3)
    if eight_bits:
        return TensorSpec("picture", size, "uint8", "RGB, 0 to 255")
    return TensorSpec("picture", size, "float32", "RGB, 0 to 1")


def context_specs(
    checkpoint: Checkpoint, shape: Shape, length: int
) -> tuple[tuple[TensorSpec, ...], TensorSpec]:
    """Returns the outputs of the context stage: keys and values, one spec for each form of head; and times.

    `length` is the number of tokens of a prompt.
    """
    forms, width = unet_sizes(checkpoint.components["unet"])
    keys_values = tuple(
        TensorSpec(
            name,
            (layers, shape.batch, heads, length, head_width),
            "float32",
            f"keys and values of cross-attention with {heads} heads of width {head_width}, in turn",
        )
        for name, (layers, heads, head_width) in forms.items()
    )
    if has_ip_adapter(checkpoint):
        keys_values += tuple(
            TensorSpec(
                f"ip_{spec.name}",
                (*spec.shape[:3], tokens_shape(checkpoint)[1], spec.shape[4]),
                spec.dtype,
                f"the same for the tokens of the IP-Adapter's picture; {IP_WEIGHT} is in the values",
            )
            for spec in keys_values
        )
    meaning = "time embeddings of all ResBlocks, side by side"
    return keys_values, TensorSpec("times", (CONTEXT_STEPS, shape.batch, width), "float32", meaning)


def unet_sizes(unet: Component) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Returns what `context_sizes` says of a UNet. Raises CheckpointError if its config makes no model."""
    return sizes_of_config(json.dumps(dict(unet.config), sort_keys=True))


@cache
def sizes_of_config(config: str) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Returns what `context_sizes` says of a UNet with this config, in JSON. Each config is read once."""
    from lcm_compile.checkpoint.empty_modules import empty_module
    from lcm_compile.stages.rewrites import context_sizes

    return context_sizes(empty_module(Component("unet", json.loads(config))))
