#!/bin/sh
# diffusers 0.42.1 with transformers 5.23.0: after load_textual_inversion into a CLIPTextModelWithProjection whose
# config has eos_token_id 2, as the second text encoder of SDXL has on the hub, the pooled embedding of a prompt
# that uses the new word knows nothing of what comes after that word. SDXL conditions on this embedding.
#
# With an eos_token_id of 2 the pooled state is read at the largest id of the prompt, which is the end as long as
# the end has the largest id. A word added to the tokenizer has a larger one, and the mask is causal.
#
# Seen, the largest change of the pooled embedding when a word is replaced by another:
#   eos_token_id 2: after the new word 0.00, before it 0.17
#   eos_token_id 189: after the new word 2.07, before it 3.29
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json, logging
logging.disable(logging.WARNING)
import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

letters = [chr(c) for c in range(33, 127)]
tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
json.dump({token: i for i, token in enumerate(tokens)}, open("vocab.json", "w"))
open("merges.txt", "w").write("#version: 0.2\n")
sizes = dict(hidden_size=8, projection_dim=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)


class Pipeline(TextualInversionLoaderMixin):
    hf_device_map, components = None, {}


found = {}
for end in (2, len(tokens) - 1):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer("vocab.json", "merges.txt", unk_token="<|endoftext|>", pad_token="!")
    config = CLIPTextConfig(vocab_size=len(tokens), eos_token_id=end, bos_token_id=0, pad_token_id=0, **sizes)
    encoder = CLIPTextModelWithProjection(config).eval()
    Pipeline().load_textual_inversion({"<new>": torch.randn(1, 8)}, "<new>", tokenizer, encoder)

    def change(*prompts):
        ids = tokenizer(list(prompts), return_tensors="pt", padding="max_length", max_length=30).input_ids
        first, second = encoder(ids).text_embeds.detach()
        return float((first - second).abs().max())

    after, before = change("a <new> cat", "a <new> dog"), change("a cat <new>", "a dog <new>")
    print(f"eos_token_id {end}: after the new word {after:.2f}, before it {before:.2f}")
    found[end] = (after > 1e-6, before > 1e-6)
assert found == {2: (False, True), len(tokens) - 1: (True, True)}, found
PYTHON
