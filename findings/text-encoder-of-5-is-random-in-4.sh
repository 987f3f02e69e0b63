#!/bin/sh
# transformers 5.23.0 with transformers 4.57.6: whether version 4 can read a CLIPTextModel that version 5 saved
# depends on where the model came from. Loaded from an old file and saved again, its weights have the names of
# version 4. Made from a config, as after training or a conversion, they have other names: version 4 finds none of
# them, and draws random weights anew at each load. That is a logged warning and no error.
#
# Version 5 took the layer `text_model` out of CLIPTextModel. save_pretrained puts the name back only if
# from_pretrained has taken it off the same model.
#
# Seen:
#   made from a config: saved by 5.23.0 as embeddings.position_embedding.weight, …
#   loaded from an old file: saved by 5.23.0 as text_model.embeddings.position_embedding.weight, …
#   made from a config: 4.57.6 finds 0 of 20 weights, two loads differ: True
#   loaded from an old file: 4.57.6 finds 20 of 20 weights, two loads differ: False
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --no-compile --target "$folder/five" transformers==5.23.0
"$folder/venv/bin/pip" install -q --no-compile --target "$folder/four" transformers==4.57.6
cd "$folder"
PYTHONPATH=five venv/bin/python - <<'PYTHON'
import logging, pathlib
logging.disable(logging.WARNING)
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

ids = dict(vocab_size=10, bos_token_id=8, eos_token_id=9, pad_token_id=9)
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
made = CLIPTextModel(CLIPTextConfig(**sizes, **ids))
made.save_pretrained("made from a config")

made.config.save_pretrained("old")
weights = load_file("made from a config/model.safetensors")
weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
save_file(weights, "old/model.safetensors", metadata={"format": "pt"})
CLIPTextModel.from_pretrained("old").save_pretrained("loaded from an old file")

for folder in ("made from a config", "loaded from an old file"):
    name = min(load_file(pathlib.Path(folder, "model.safetensors")))
    print(f"{folder}: saved by {transformers.__version__} as {name}, …")
    assert name.startswith("text_model.") == (folder == "loaded from an old file")
PYTHON
PYTHONPATH=four venv/bin/python - <<'PYTHON'
import logging
logging.disable(logging.WARNING)
import torch, transformers
from transformers import CLIPTextModel

seen = {}
for folder in ("made from a config", "loaded from an old file"):
    loads = [CLIPTextModel.from_pretrained(folder, output_loading_info=True) for _ in range(2)]
    states = [model.eval()(torch.tensor([[8, 1, 9]])).last_hidden_state for model, _ in loads]
    differ, total = not torch.equal(*states), len(loads[0][0].state_dict())
    found = total - len(loads[0][1]["missing_keys"])
    print(f"{folder}: {transformers.__version__} finds {found} of {total} weights, two loads differ: {differ}")
    seen[folder] = (found, differ)
assert seen == {"made from a config": (0, True), "loaded from an old file": (20, False)}, seen
PYTHON
