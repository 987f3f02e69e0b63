#!/bin/sh
# diffusers 0.42.1 with transformers 5.23.0 and peft 0.21.2: a text encoder's LoRA in kohya's layout loses all that
# it has for q_proj, k_proj and v_proj if it has nothing for out_proj; only the part for the MLP is loaded. If it
# has no MLP part either, loading ends with "Could not automatically infer state dict type". The same weights under
# the names of peft are all loaded.
#
# diffusers first gives the attention the names of its own first layout, and later knows that layout by the word
# to_out_lora alone. Names that stay as they are fit nothing in the encoder. transformers logs them as unexpected.
#
# Seen, the layers that have a LoRA once it is loaded, of 1 encoder layer:
#   kohya, q_proj, out_proj and fc1: fc1, out_proj, q_proj
#   kohya, q_proj and fc1: fc1
#   kohya, q_proj: ValueError: Could not automatically infer state dict type
#   peft, q_proj and fc1: fc1, q_proj
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 \
    accelerate numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
logging.disable(logging.WARNING)
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from transformers import CLIPTextConfig, CLIPTextModel

KOHYA = "lora_te_text_model_encoder_layers_0_{}", ".lora_down.weight", ".lora_up.weight"
PEFT = "text_encoder.text_model.encoder.layers.0.{}", ".lora_A.weight", ".lora_B.weight"
Q, OUT, FC1 = "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"
ids = dict(vocab_size=10, bos_token_id=8, eos_token_id=9, pad_token_id=9)
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)


def loaded(layout, layers):
    encoder, weights = CLIPTextModel(CLIPTextConfig(**sizes, **ids)), {}
    path, down, up = layout
    for layer in layers:
        name = path.format(layer.replace(".", "_") if layout is KOHYA else layer)
        weights |= {name + down: torch.randn(2, 8), name + up: torch.randn(8, 2)}
        if layout is KOHYA:
            weights[name + ".alpha"] = torch.tensor(2.0)
    weights, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(weights)
    try:
        StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(weights, alphas, encoder)
    except ValueError as error:
        return f"ValueError: {error}"
    paths = [name.split(".lora_A.")[0] for name in encoder.state_dict() if ".lora_A." in name]
    return ", ".join(sorted(path.split(".")[-1] for path in paths))


seen = []
for title, layout, layers in (
    ("kohya, q_proj, out_proj and fc1", KOHYA, (Q, OUT, FC1)), ("kohya, q_proj and fc1", KOHYA, (Q, FC1)),
    ("kohya, q_proj", KOHYA, (Q,)), ("peft, q_proj and fc1", PEFT, (Q, FC1)),
):  # fmt: skip
    seen.append(loaded(layout, layers))
    print(f"{title}: {seen[-1]}")
error = "ValueError: Could not automatically infer state dict type"
assert seen == ["fc1, out_proj, q_proj", "fc1", error, "fc1, q_proj"], seen
PYTHON
