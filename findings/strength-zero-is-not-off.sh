#!/bin/sh
# peft 0.21.2 and lycoris-lora 4.1.3: an adapter at strength 0 still changes the model if it is a DoRA (peft) or an
# OFT with rescale (lycoris-lora). In both the learned lengths of the weight's rows replace the model's own at every
# strength; the strength scales only the direction in which the rows are moved.
#
# Seen, the weight at strength 0 divided by the model's own, with row lengths learned to be twice the model's:
#   peft, LoRA: 1.0 in every row
#   peft, DoRA: 2.0 in every row
#   lycoris-lora, OFT: 1.0 in every row
#   lycoris-lora, OFT with rescale: 2.0 in every row
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 peft==0.21.2 transformers==5.23.0 lycoris-lora==4.1.3
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
logging.disable(logging.WARNING)
import torch
from lycoris.modules.diag_oft import DiagOFTModule
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
layer = torch.nn.Linear(4, 4, bias=False)
own = layer.weight.detach().clone()
ratios = {}
for name, dora in (("LoRA", False), ("DoRA", True)):
    config = LoraConfig(r=2, target_modules=["0"], use_dora=dora, init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(layer), config)
    adapted = model.base_model.model[0]
    if dora:
        adapted.lora_magnitude_vector["default"].weight.data = 2 * own.norm(dim=1)
    adapted.set_scale("default", 0.0)
    ratios[f"peft, {name}"] = model(torch.eye(4)).T / own
for name, rescaled in (("OFT", False), ("OFT with rescale", True)):
    adapter = DiagOFTModule("adapter", torch.nn.Linear(4, 4, bias=False), lora_dim=2, rescaled=rescaled)
    adapter.org_module[0].weight.data = own.clone()
    adapter.oft_blocks.data.normal_()
    if rescaled:
        adapter.rescale.data.fill_(2)
    ratios[f"lycoris-lora, {name}"] = adapter.get_merged_weight(0.0)[0] / own
seen = {}
for name, ratio in ratios.items():
    seen[name] = round(ratio.mean().item(), 4)
    assert torch.allclose(ratio, ratio.mean(), rtol=1e-4), ratio
    print(f"{name}: {seen[name]} in every row")
assert list(seen.values()) == [1, 2, 1, 2], seen
PYTHON
