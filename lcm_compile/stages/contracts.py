"""What each stage of a base takes and gives, from its configs alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lcm_compile.checkpoint.find import Checkpoint, Component
from lcm_compile.graphs import DRAW, StageContract, TensorSpec
from lcm_compile.spec import BuildSpec, Shape

# The stages that come out of each model, in the order the pipeline runs them, and the components that it is.
MODEL_STAGES = {
    "text": (("encode",), ("text_encoder", "text_encoder_2")),
    "unet": (("context", "step"), ("unet",)),
    "vae": (("decode",), ("vae",)),
}
# The timesteps of one call of the context stage; a picture of more steps calls it again.
CONTEXT_STEPS = 4
SIZES: dict[str, Any] = {}  # see unet_sizes


def models_of(spec: BuildSpec) -> tuple[str, ...]:
    """What is prepared at once, and given back before the next: a model, or for one graph all of them."""
    return (DRAW,) if spec.whole_loop else tuple(MODEL_STAGES)


def graph_contracts(checkpoint: Checkpoint, shape: Shape, spec: BuildSpec) -> dict[str, StageContract]:
    """The contracts of a spec's graphs: the stages', or the one of a whole picture."""
    contracts = make_contracts(checkpoint, shape, spec.rewrites)
    return {DRAW: draw_contract(contracts)} if spec.whole_loop else contracts


def draw_contract(contracts: Mapping[str, StageContract]) -> StageContract:
    """What the stages of these contracts take and give as one graph of a picture of CONTEXT_STEPS steps."""
    inputs = {name: {spec.name: spec for spec in contract.inputs} for name, contract in contracts.items()}
    conditions = [inputs["context"][name] for name in ("timesteps", "guidance") if name in inputs["context"]]
    latent, numbers = inputs["step"]["latent"], inputs["step"]["coefficients"]
    noise = TensorSpec(
        "noise",
        (CONTEXT_STEPS, *latent.shape),
        latent.dtype,
        "the first latent, then what each next one is made noisy with",
    )
    coefficients = replace(
        numbers, shape=(CONTEXT_STEPS, *numbers.shape), meaning="each step's numbers, in LcmStep's order"
    )
    given = (*contracts["encode"].inputs, *conditions, noise, coefficients)
    return StageContract(DRAW, given, contracts["decode"].outputs)


def make_contracts(
    checkpoint: Checkpoint, shape: Shape, rewrites: Collection[str] = ()
) -> dict[str, StageContract]:
    """The stages' contracts for pictures of one shape, in the order the pipeline runs them."""
    factor = checkpoint.vae_factor
    latent = (shape.batch, checkpoint.unet["in_channels"], shape.height // factor, shape.width // factor)
    tokens = tuple(
        TensorSpec(
            "input_ids" if i == 0 else f"input_ids_{i + 1}",
            (shape.batch, checkpoint.text_length(name)),
            "int64",
            f"tokens of the {'first' if i == 0 else 'second'} tokenizer",
        )
        for i, name in enumerate(checkpoint.text_encoders)
    )
    text = text_specs(checkpoint, shape, tokens[0].shape[1])
    contracts = {"encode": StageContract("encode", tokens, text)}
    conditioning = (TensorSpec("timestep", (1,), "float32", "training timestep, 0 to 999"), *text)
    if checkpoint.has_guidance_embedding:
        guidance = TensorSpec("guidance", (1,), "float32", "guidance scale minus 1")
        conditioning = (*conditioning, guidance)
    if "context" in rewrites:
        timesteps = TensorSpec("timesteps", (CONTEXT_STEPS,), "float32", "training timesteps, 0 to 999")
        keys_values, times = context_specs(checkpoint, shape, tokens[0].shape[1])
        contracts["context"] = StageContract("context", (timesteps, *conditioning[1:]), (*keys_values, times))
        time = TensorSpec("time", times.shape[1:], "float32", "one of the context's times")
        conditioning = (time, *keys_values)
    noisy = TensorSpec("latent", latent, "float32", "noisy latent")
    prediction = TensorSpec(
        "prediction", latent, "float32", f"the UNet's {checkpoint.scheduler.prediction_type}"
    )
    inputs: tuple[TensorSpec, ...] = (noisy, *conditioning)
    outputs: tuple[TensorSpec, ...] = (prediction,)
    if "lcm-step" in rewrites:
        inputs += (
            TensorSpec("noise", latent, "float32", "what the next latent is made noisy with"),
            TensorSpec("coefficients", (6,), "float32", "the step's numbers, in LcmStep's order"),
        )
        outputs += (TensorSpec("next_latent", latent, "float32", "the latent of the next step"),)
    contracts["step"] = StageContract("step", inputs, outputs)
    clean = TensorSpec("latent", latent, "float32", "clean latent, as the loop leaves it")
    size = (shape.batch, shape.height, shape.width, 3)
    picture = (
        TensorSpec("picture", size, "uint8", "RGB, 0 to 255")
        if "rgb8" in rewrites
        else TensorSpec("picture", size, "float32", "RGB, 0 to 1")
    )
    contracts["decode"] = StageContract("decode", (clean,), (picture,))
    return contracts


def text_specs(checkpoint: Checkpoint, shape: Shape, length: int) -> tuple[TensorSpec, ...]:
    """What the text encoders give."""
    width = checkpoint.unet["cross_attention_dim"]
    hidden = TensorSpec("hidden_states", (shape.batch, length, width), "float32", "text states, one a token")
    if "text_encoder_2" not in checkpoint.components:
        return (hidden,)
    pooled = checkpoint.components["text_encoder_2"].config["projection_dim"]
    return hidden, TensorSpec("pooled", (shape.batch, pooled), "float32", "one text state a prompt")


def context_specs(
    checkpoint: Checkpoint, shape: Shape, length: int
) -> tuple[tuple[TensorSpec, ...], TensorSpec]:
    """What the context stage gives: keys and values by the form of their heads, and the steps' times."""
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
    meaning = "time embeddings as every ResBlock adds them, side by side"
    return keys_values, TensorSpec("times", (CONTEXT_STEPS, shape.batch, width), "float32", meaning)


def unet_sizes(unet: Component) -> Any:
    """context_sizes of a UNet, worked out once for each config. CheckpointError for a senseless one."""
    from lcm_compile.checkpoint.empty_modules import empty_module
    from lcm_compile.stages.rewrites import context_sizes

    config = json.dumps(dict(unet.config), sort_keys=True)
    if config not in SIZES:
        SIZES[config] = context_sizes(empty_module(unet))
    return SIZES[config]
