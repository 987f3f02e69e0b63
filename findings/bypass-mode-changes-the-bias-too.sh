#!/bin/sh
# lycoris-lora 4.1.3: with `bypass_mode=True` a layer gives other results than with the same network merged, or used
# without bypass, if the layer has a bias and the network is OFT, BOFT or (IA)³: bypass works on the layer's output,
# bias included, and the other ways work on its weight alone. What was trained with bypass, which is switched on by
# itself for quantized layers, is another network once merged. LoRA gives the same both ways.
#
# Seen, the largest difference between the two ways for outputs near 1:
#   LoRA: 0.00 with bias, 0.00 without
#   diag-oft: 0.98 with bias, 0.00 without
#   boft: 1.26 with bias, 0.00 without
#   (IA)³: 0.20 with bias, 0.00 without
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 lycoris-lora==4.1.3 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
logging.disable(logging.WARNING)
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule

kinds = {"LoRA": LoConModule, "diag-oft": DiagOFTModule, "boft": ButterflyOFTModule, "(IA)³": IA3Module}
seen = {}
for name, kind in kinds.items():
    differences = []
    for bias in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4, bias=bias)
        if bias:
            layer.bias.data.fill_(1)
        inputs, outputs = torch.randn(5, 4), []
        for bypass in (True, False):
            torch.manual_seed(1)
            adapter = kind("adapter", layer, lora_dim=2, alpha=2, bypass_mode=bypass)
            for weight in adapter.parameters():
                weight.data = 0.3 * torch.randn_like(weight)
            adapter.apply_to()
            outputs.append(layer(inputs).detach())
            adapter.restore()
        differences.append(float((outputs[0] - outputs[1]).abs().max()))
    print(f"{name}: {differences[0]:.2f} with bias, {differences[1]:.2f} without")
    seen[name] = [difference > 1e-4 for difference in differences]
changed = [True, False]
assert seen == {"LoRA": [False, False], "diag-oft": changed, "boft": changed, "(IA)³": changed}, seen
PYTHON
