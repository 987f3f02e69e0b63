#!/bin/sh
# diffusers 0.42.1 with transformers 5.23.0: a textual inversion of several vectors whose word has a capital
# letter is drawn with its first vector alone. There is no warning, and the same file under a word of small
# letters has all its vectors.
#
# load_textual_inversion stores the tokens EasyWord, EasyWord_1, … as they are written. The prompt is expanded by
# asking `tokenizer.tokenize` which of them it has, and transformers 5 answers in small letters, so none is found.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json, logging
logging.disable(logging.WARNING)
import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

letters = [chr(c) for c in range(33, 127)]
tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
json.dump({token: i for i, token in enumerate(tokens)}, open("vocab.json", "w"))
open("merges.txt", "w").write("#version: 0.2\n")
tokenizer = CLIPTokenizer("vocab.json", "merges.txt", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **sizes))


class Pipeline(TextualInversionLoaderMixin):
    hf_device_map, components = None, {}


vectors, found = torch.randn(4, 8), {}
for word in ("easyword", "EasyWord"):
    pipeline = Pipeline()
    pipeline.load_textual_inversion({word: vectors}, word, tokenizer, encoder)
    prompt = pipeline.maybe_convert_prompt(f"a {word} here", tokenizer)
    ids = tokenizer(prompt).input_ids
    found[word] = sum(i >= len(tokens) for i in ids)
    print(f"{word}, a word of 4 vectors: the prompt becomes {prompt!r}, with {found[word]} of the vectors")
assert found == {"easyword": 4, "EasyWord": 1}, found
PYTHON
