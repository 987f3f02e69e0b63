#!/bin/sh
# lycoris-lora 4.1.3: an (IA)³ network that it made and saved cannot be loaded again by it. The weights that it
# writes for each layer are `weight` and `on_input`, and the constructor that reads them back takes only the first.
# LoRA, LoHa, LoKr, OFT and full networks made and saved in the same lines are loaded.
#
# Seen:
#   lora: 1 module loaded
#   diag-oft: 1 module loaded
#   ia3 saved ['lycoris_0.on_input', 'lycoris_0.weight']: TypeError: … takes 4 positional arguments but 5 were given
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 lycoris-lora==4.1.3 safetensors numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
logging.disable(logging.WARNING)
import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file, save_file

LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": []})
seen = {}
for algorithm in ("lora", "diag-oft", "ia3"):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    made = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, algo=algorithm)
    made.apply_to()
    save_file(made.state_dict(), "network.safetensors")
    saved, fresh = load_file("network.safetensors"), torch.nn.Sequential(torch.nn.Linear(8, 8))
    try:
        loaded, _ = create_lycoris_from_weights(1.0, None, fresh, weights_sd=saved)
        assert len(loaded.loras) == 1
        print(f"{algorithm}: 1 module loaded")
        seen[algorithm] = "loaded"
    except TypeError as error:
        message = str(error).split("() ")[-1]
        print(f"{algorithm} saved {sorted(saved)}: TypeError: … {message}")
        seen[algorithm] = message
message = "takes 4 positional arguments but 5 were given"
assert seen == {"lora": "loaded", "diag-oft": "loaded", "ia3": message}, seen
PYTHON
