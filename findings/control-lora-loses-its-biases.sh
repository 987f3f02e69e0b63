#!/bin/sh
# diffusers 0.42.1: `ControlNetModel.load_lora_adapter` reads Stability's control-LoRAs without the biases of the layers
# that they change. The file has them beside the factors, and ComfyUI takes them; here every such layer keeps the bias
# that it had, and nothing is said. The products of the factors, and layers that are complete in the file, are read.
#
# Seen:
#   changed layers, weights as in the file: 5 of 5
#   changed layers, biases as in the file: 0 of 5
#   complete layers, weights as in the file: 12 of 12
#   complete layers, biases as in the file: 12 of 12
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 \
    accelerate numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
import torch
from diffusers import ControlNetModel

logging.disable(logging.WARNING)
torch.manual_seed(0)
net = ControlNetModel(
    block_out_channels=(8, 8, 8, 8), attention_head_dim=2, norm_num_groups=4, cross_attention_dim=8
)
names = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.0": "down_blocks.0.resnets.0.norm1",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.1.0.emb_layers.1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks.1.1.transformer_blocks.0.ff.net.2": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
    "time_embed.0": "time_embedding.linear_1",
    "zero_convs.0.0": "controlnet_down_blocks.0",
    "zero_convs.1.0": "controlnet_down_blocks.1",
    "middle_block_out.0": "controlnet_mid_block",
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
    **{f"input_hint_block.{2 * n + 2}": f"controlnet_cond_embedding.blocks.{n}" for n in range(6)},
}
changed = ("input_blocks.0.0", "in_layers.2", "emb_layers.1", "net.2", "time_embed.0")
file, wanted = {"lora_controlnet": torch.zeros(0)}, {}
for name, module in names.items():
    layer = net.get_submodule(module)
    bias, weight = torch.randn_like(layer.bias), layer.weight.detach()
    file[f"{name}.bias"] = bias
    if name.endswith(changed):
        up = torch.randn(len(weight), 2, *(1 for _ in weight.shape[2:]))
        down = torch.randn(2, *weight.shape[1:])
        file |= {f"{name}.up": up, f"{name}.down": down}
        weight = weight + torch.tensordot(up.flatten(1), down, 1)
    else:
        weight = file[f"{name}.weight"] = torch.randn_like(weight)
    wanted[name] = weight, bias
net.load_lora_adapter(dict(file), prefix=None)

seen = {kind: {"weights": [], "biases": []} for kind in ("changed", "complete")}
for name, module in names.items():
    layer = net.get_submodule(module)
    if hasattr(layer, "base_layer"):
        if name.endswith(changed):
            layer.merge()
        layer = layer.base_layer
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save["default_0"]
    kind = seen["changed" if name.endswith(changed) else "complete"]
    for told, tensor in zip(("weights", "biases"), wanted[name]):
        kind[told].append(torch.allclose(getattr(layer, told[:-1].removesuffix("e")), tensor, atol=1e-4))
for kind, parts in seen.items():
    for told, right in parts.items():
        print(f"{kind} layers, {told} as in the file: {sum(right)} of {len(right)}")
assert not any(seen["changed"]["biases"]), "the biases are read now"
assert all(seen["changed"]["weights"]), "the weights are not read"
PYTHON
