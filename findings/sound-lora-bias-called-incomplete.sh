#!/bin/sh
# peft 0.21.2: saving a sound adapter that was made with its own option lora_bias=True warns that the adapter is
# incomplete and advises to gather DeepSpeed or FSDP shards, in a process that has neither. The check wants two
# dimensions of everything whose name contains lora_B, and lora_B.bias has one. The file is complete: it loads, and
# gives the same output.
#
# Seen:
#   lora_bias=False: saved with 0 warnings, loaded with the same output: True
#   lora_bias=True: saved with 1 warning, loaded with the same output: True
#   Adapter 'default': 1 LoRA tensor(s) have invalid shape: base_model.model.0.lora_B.bias:(4,). …
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 peft==0.21.2 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model

seen = {}
for bias in (False, True):
    layer, inputs = torch.nn.Linear(4, 4), torch.randn(3, 4)
    own = {name: weight.clone() for name, weight in layer.state_dict().items()}
    config = LoraConfig(r=2, target_modules=["0"], lora_bias=bias, init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(layer), config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained("adapter")
    messages = [str(w.message) for w in caught if "lora_B" in str(w.message)]
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 4))
    fresh[0].load_state_dict(own)
    same = torch.equal(PeftModel.from_pretrained(fresh, "adapter")(inputs), model.eval()(inputs))
    count = f"{len(messages)} warning{'' if len(messages) == 1 else 's'}"
    print(f"lora_bias={bias}: saved with {count}, loaded with the same output: {same}")
    seen[bias] = (len(messages), same)
print(messages[0].split(" A 1-D")[0], "…") if messages else None
assert seen == {False: (0, True), True: (1, True)}, seen
PYTHON
