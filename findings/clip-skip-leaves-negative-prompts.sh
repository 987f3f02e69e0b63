#!/bin/sh
# diffusers 0.42.1: SDXL's encode_prompt skips text layers for the prompt, but not for the negative prompt. With clip_skip
# one text as both has two embeddings, and guidance away from it does something. Without clip_skip they are equal. And a
# prompt_2 of "" is not an empty prompt for the second text encoder: it is read as the first prompt.
#
# Seen, the largest difference between the embeddings of "a red star" as prompt and as negative prompt:
#   clip_skip=None: 0.000
#   clip_skip=1: 29.917
# and between the embeddings of "a red star" without a prompt_2 and with one:
#   prompt_2='': 0.000
#   prompt_2=' ', which has no token either: 58.597
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import string

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

letters = string.ascii_lowercase
words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
with open("vocab.json", "w") as file:
    json.dump({word: i for i, word in enumerate(words)}, file)
with open("merges.txt", "w") as file:
    file.write("#version: 0.2\n")
tokenizer = CLIPTokenizer("vocab.json", "merges.txt", model_max_length=77)
config = CLIPTextConfig(
    vocab_size=len(words),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    projection_dim=32,
    bos_token_id=len(words) - 2,
    eos_token_id=len(words) - 1,
    initializer_factor=5.0,
)
torch.manual_seed(0)
pipe = StableDiffusionXLPipeline(
    vae=None,
    text_encoder=CLIPTextModel(config).eval(),
    text_encoder_2=CLIPTextModelWithProjection(config).eval(),
    tokenizer=tokenizer,
    tokenizer_2=tokenizer,
    unet=None,
    scheduler=None,
)


def encode(**options):
    with torch.no_grad():
        return pipe.encode_prompt("a red star", do_classifier_free_guidance=True, **options)


for skip in (None, 1):
    positive, negative, _, _ = encode(negative_prompt="a red star", clip_skip=skip)
    difference = (positive - negative).abs().max().item()
    print(f"clip_skip={skip}: {difference:.3f}")
    assert (difference > 0.1) == (skip is not None), difference
plain = encode()[0]
for second in ("", " "):
    difference = (encode(prompt_2=second)[0] - plain).abs().max().item()
    print(f"prompt_2={second!r}: {difference:.3f}")
    assert (difference > 0.1) == (second == " "), difference
PYTHON
