"""What each stage of a base takes and gives, from its configs alone."""

from __future__ import annotations

from lcm_compile.checkpoints import Checkpoint
from lcm_compile.spec import Shape, StageContract, TensorSpec

# The components that each stage is made of, in the order the pipeline runs the stages.
COMPONENTS = {"encode": ("text_encoder", "text_encoder_2"), "step": ("unet",), "decode": ("vae",)}


def make_contracts(checkpoint: Checkpoint, shape: Shape) -> dict[str, StageContract]:
    """The stages' contracts for pictures of one shape."""
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
    width = checkpoint.unet["cross_attention_dim"]
    hidden = TensorSpec(
        "hidden_states", (shape.batch, tokens[0].shape[1], width), "float32", "text states, one a token"
    )
    conditioning: tuple[TensorSpec, ...] = (hidden,)
    if "text_encoder_2" in checkpoint.components:
        pooled = checkpoint.components["text_encoder_2"].config["projection_dim"]
        conditioning += (TensorSpec("pooled", (shape.batch, pooled), "float32", "one text state a prompt"),)
    step_inputs = (
        TensorSpec("latent", latent, "float32", "noisy latent"),
        TensorSpec("timestep", (1,), "float32", "training timestep, 0 to 999"),
        *conditioning,
    )
    if checkpoint.has_guidance_embedding:
        step_inputs += (TensorSpec("guidance", (1,), "float32", "guidance scale minus 1"),)
    prediction = TensorSpec(
        "prediction", latent, "float32", f"the UNet's {checkpoint.scheduler.prediction_type}"
    )
    clean = TensorSpec("latent", latent, "float32", "clean latent, as the loop leaves it")
    picture = TensorSpec("picture", (shape.batch, shape.height, shape.width, 3), "float32", "RGB, 0 to 1")
    return {
        "encode": StageContract("encode", tokens, conditioning),
        "step": StageContract("step", step_inputs, (prediction,)),
        "decode": StageContract("decode", (clean,), (picture,)),
    }
