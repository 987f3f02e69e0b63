#!/bin/sh
# lycoris-lora 4.1.3: `diag-oft` and `boft` build the same rotation R from the same stored numbers, but the first
# multiplies the weight by R transposed and the second by R. Blocks copied from one kind of file to the other turn
# the weight the opposite way, and the two on top of each other cancel out.
#
# Seen, how the block [[0, 0.3], [0, 0]] turns the first two rows of the weight:
#   diag-oft: -33.4 degrees
#   boft: 33.4 degrees
#   diag-oft, then boft with the same block: 0.0 degrees
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


def turned(kind, weight):
    layer = torch.nn.Linear(4, 4, bias=False)
    layer.weight.data = weight
    adapter = kind("adapter", layer, lora_dim=2)
    adapter.oft_blocks.data[..., 0, 1] = 0.3
    if kind is ButterflyOFTModule:
        adapter.oft_blocks.data[1:] = 0  # only the stage whose pairs are those of diag-oft
    rotation = adapter.get_r() if kind is DiagOFTModule else adapter.get_r()[0]
    return adapter.get_merged_weight(1.0)[0].detach(), rotation[0].detach()


def degrees(weight):
    return round(float(torch.rad2deg(torch.atan2(weight[0, 1], weight[0, 0]))), 1) + 0.0


start = torch.eye(4)
(oft, first), (boft, second) = turned(DiagOFTModule, start), turned(ButterflyOFTModule, start)
both = turned(ButterflyOFTModule, oft)[0]
assert torch.allclose(first, second)
seen = {"diag-oft": degrees(oft), "boft": degrees(boft), "diag-oft, then boft with the same block": degrees(both)}
for name, angle in seen.items():
    print(f"{name}: {angle} degrees")
assert torch.allclose(oft, boft.T, atol=1e-6) and torch.allclose(both, start, atol=1e-6)
assert list(seen.values()) == [-33.4, 33.4, 0.0], seen
PYTHON
