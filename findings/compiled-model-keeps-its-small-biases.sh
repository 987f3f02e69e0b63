#!/bin/sh
# torch 2.13.0: a model that torch.export and AOTInductor compile for a CPU keeps biases of up to 8 numbers as they
# were, although its package is made without weights (aot_inductor.package_constants_in_so=False) and gets them
# afterwards. Such are the last biases of Stable Diffusion's UNet (4 numbers) and decoder (3): they are numbers in the
# code. get_constant_fqns() does not name them. So load_constants() refuses the state dict of a module with just these
# layers, and given only what is named it computes the new weights' products plus the old bias. One channel more, and
# all is loaded. The setting always_keep_tensor_constants=True keeps small ones out of the code too. It needs g++.
#
# Seen:
#   8 channels: named ['weight']; the state dict: RuntimeError; what is named: the old bias
#   9 channels: named ['bias', 'weight']; the state dict: loaded; what is named: the new bias
#   8 channels, kept: named ['bias', 'weight']; the state dict: loaded; what is named: the new bias
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy setuptools
cd "$folder"
TMPDIR="$folder" "$folder/venv/bin/python" - <<'PYTHON'
import logging
import warnings

import torch
from torch.nn.functional import conv2d

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
seen = {}
for channels, kept in ((8, False), (9, False), (8, True)):
    torch.manual_seed(0)
    old, new = (torch.nn.Conv2d(16, channels, 1).eval().requires_grad_(False) for _ in range(2))
    x = torch.randn(1, 16, 8, 8)
    settings = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": kept}
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(old, (x,)), package_path=f"{channels}-{kept}.pt2", inductor_configs=settings
    )
    model = torch._inductor.aoti_load_package(path)
    named, state = sorted(model.get_constant_fqns()), dict(new.state_dict())
    try:
        model.load_constants(state, check_full_update=True)
        whole = "loaded"
    except RuntimeError:
        whole = "RuntimeError"
        model.load_constants({name: state[name] for name in named}, check_full_update=True)
    near = [bias for bias, of in (("old", old), ("new", new))
            if torch.allclose(model(x), conv2d(x, new.weight, of.bias), atol=1e-5)]
    name = f"{channels} channels" + (", kept" if kept else "")
    print(f"{name}: named {named}; the state dict: {whole}; what is named: the {near[0]} bias")
    seen[name] = (named, whole, near)
both = ["bias", "weight"]
assert seen == {
    "8 channels": (["weight"], "RuntimeError", ["old"]),
    "9 channels": (both, "loaded", ["new"]),
    "8 channels, kept": (both, "loaded", ["new"]),
}, seen
PYTHON
