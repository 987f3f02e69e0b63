#!/bin/sh
# transformers 5.23.0 with peft 0.21.2: loading a sound and complete LoRA with load_adapter(adapter_state_dict=…),
# as diffusers does for text encoders, logs a table that calls every weight of the model but the embeddings missing
# and newly initialized, and advises to train the model. None has changed, and all of the LoRA is loaded.
#
# Seen:
#   weights reported as newly initialized: 18 of the model's 20
#   weights of the model that have changed: 0
#   weights of the LoRA loaded as they are in the file: 2 of 2
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import torch
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel

messages, listener = [], logging.Handler(logging.WARNING)
listener.emit = lambda record: messages.append(record.getMessage())

ids = dict(vocab_size=10, bos_token_id=8, eos_token_id=9, pad_token_id=9)
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = CLIPTextModel(CLIPTextConfig(**sizes, **ids))
own = {name: weight.clone() for name, weight in model.state_dict().items()}
layer = "encoder.layers.0.self_attn.q_proj"
lora = {f"{layer}.lora_A.weight": torch.randn(2, 8), f"{layer}.lora_B.weight": torch.randn(8, 2)}
logging.getLogger("transformers").addHandler(listener)
model.load_adapter(adapter_state_dict=lora, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a")

table = "\n".join(messages)
reported = [line for line in table.splitlines() if "| MISSING" in line]
after = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
changed = [name for name in own if not torch.equal(own[name], after[name])]
loaded = [name for name in lora if torch.equal(lora[name], after[name.replace(".weight", ".a.weight")])]
print(f"weights reported as newly initialized: {len(reported)} of the model's {len(own)}")
print("weights of the model that have changed:", len(changed))
print(f"weights of the LoRA loaded as they are in the file: {len(loaded)} of {len(lora)}")
assert "newly initialized because missing" in table, table
assert len(reported) >= 10 and not changed and len(loaded) == len(lora)
PYTHON
