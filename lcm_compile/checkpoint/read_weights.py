"""Reads a model's weights from files of diffusers' layout or of the original one.

Tensors are mapped from the files and converted to fp32 one by one, so no file is in memory at once.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lcm_compile.checkpoint.checkpoint import Component, is_tiny
from lcm_compile.checkpoint.controlnet import control_lora_weights, controlnet_weights
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.ip_adapter import IP_ENCODER, IP_LAYERS, IP_PROJECTION, ip_weights
from lcm_compile.checkpoint.single_file import LEFT_OVERS, VAE
from lcm_compile.checkpoint.t2i_adapter import todays_names
from lcm_compile.checkpoint.weight_files import read_tensors
from lcm_compile.checkpoint.write_single_file import (
    is_open_clip,
    open_clip_name,
    renamed,
    unet_weights,
    vae_weights,
)
from lcm_compile.errors import CheckpointError, first_few
from lcm_compile.graphs import CONTROLS, GUIDES

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]

# What a VAE's attention is called in old versions of diffusers and in the original, and today's names.
VAE_ATTENTION = {
    r"\.(?:query|q)\.": ".to_q.",
    r"\.(?:key|k)\.": ".to_k.",
    r"\.(?:value|v)\.": ".to_v.",
    r"\.(?:proj_attn|proj_out)\.": ".to_out.0.",
    r"\.norm\.": ".group_norm.",
}
# Keys next to a VAE's weights, or within a text encoder's, that compute nothing in these models.
BESIDE_VAE = re.compile(rf"loss\..*|{LEFT_OVERS.pattern}")
UNUSED_TEXT = re.compile(r"(.*\.)?position_ids|logit_scale|attn_mask|text_projection(\.weight)?")


def stored_component(component: Component, unet: Component) -> torch.nn.Module:
    """Returns a component in fp32 from its files. `unet` is the base's, which a control-LoRA changes.

    Raises CheckpointError if a file can't be read, or if the tensors do not fit the config.
    """
    import torch

    if is_tiny(component.config) and not component.folder:
        raise CheckpointError(
            f"the VAE's config is a tiny autoencoder's, and {component.files[0]} has no weights for one",
            "give --vae a folder with config.json, or a hub id",
        )
    module = empty_module(component)
    weights = tensors_of(component)
    if component.changes_unet:
        own = as_diffusers(unet, empty_module(unet), tensors_of(unet))
        weights = control_lora_weights(module, weights, own)
    else:
        weights = as_diffusers(component, module, weights)
    needed = {name: tensor.shape for name, tensor in module.state_dict().items()}
    wrong = {
        "lacks": sorted(needed.keys() - weights.keys()),
        "has no place for": sorted(weights.keys() - needed.keys()),
        "has another shape of": [
            n for n in sorted(needed.keys() & weights.keys()) if needed[n] != weights[n].shape
        ],
    }
    reasons = [f"{what} {len(names)} weights ({first_few(names)})" for what, names in wrong.items() if names]
    if reasons:
        what = f"the {component.name} of {component.location} does not fit its config"
        raise CheckpointError(
            f"{what}: it {'; it '.join(reasons)}",
            "give a model whose config.json and weights were saved together"
            if component.folder
            else "give a diffusers folder of it, with its config.json"
            if component.name in GUIDES
            else "give the adapter's whole file to --ip-adapter"
            if component.name in (IP_PROJECTION, IP_LAYERS)
            else "give --config DIR, a diffusers folder of its architecture, or another file",
        )
    copies = {
        name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    module.load_state_dict(copies, assign=True)
    return module


def tensors_of(component: Component) -> Weights:
    """Returns the tensors in a component's files. Raises CheckpointError if one can't be read."""
    tensors: Weights = {}
    for path in component.weight_files:
        tensors |= read_tensors(path, component.prefix)[0]
    return tensors


def as_diffusers(component: Component, module: Any, tensors: Weights) -> Weights:
    """Returns a component's tensors under the names of its diffusers or transformers module.

    Tensors that the module has no place for keep the names that they have in the file, except those that are
    known to compute nothing, which are left out.
    """
    if component.name.startswith("text_encoder"):
        return text_encoder_weights(component, module, tensors)
    if component.name in CONTROLS:
        return controlnet_weights(module, tensors, component.prefix)
    if component.name in GUIDES:
        return todays_names(tensors)
    if component.name in (IP_PROJECTION, IP_LAYERS):
        return ip_weights(component, tensors)
    if component.name == IP_ENCODER:
        return {key: tensor for key, tensor in tensors.items() if not key.endswith(".position_ids")}
    own = module.state_dict()
    if component.name == "unet":
        if not component.prefix:
            return tensors
        names = dict(zip((name for name, _ in unet_weights(module)), own, strict=True))
        return {names.get(key, key): tensor for key, tensor in tensors.items()}
    if is_tiny(component.config):
        return tensors
    levels = len(component.config["block_out_channels"])
    originals = (name.removeprefix(VAE) for name, _ in vae_weights(module, levels))
    names = dict(zip(map(todays_attention, originals), own, strict=True)) | {key: key for key in own}
    found = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(component.prefix)
        if name := names.get(todays_attention(bare)):
            # The attention's projections are matrices, which the original holds as 1×1 convolutions.
            matrix = own[name].ndim == 2 and set(tensor.shape[2:]) == {1}
            found[name] = tensor.flatten(1) if matrix else tensor
        elif not BESIDE_VAE.fullmatch(bare):
            found[key] = tensor
    return found


def todays_attention(name: str) -> str:
    """Returns the name of a VAE's weight with today's name of the attention's part."""
    return renamed(name, VAE_ATTENTION) if ".attentions." in name or ".attn_1." in name else name


def text_encoder_weights(component: Component, module: Any, tensors: Weights) -> Weights:
    """Returns a text encoder's tensors under the names of its module, as `as_diffusers` does.

    The file's names may be OpenCLIP's or those of any version of transformers: in some, all but the
    projection's begin with `text_model.`.
    """
    import torch

    own = module.state_dict()
    nested = "text_model." if hasattr(module, "text_model") else ""
    bare = {key.removeprefix(component.prefix).removeprefix("text_model."): key for key in tensors}
    found = {}
    used = set()
    for name in own:
        plain = name.removeprefix(nested)
        original, part = open_clip_name(plain)
        if plain in bare:
            found[name] = tensors[bare[plain]]
            used.add(plain)
        elif original in bare:
            tensor = tensors[bare[original]]
            if part is not None:  # one matrix computes queries, keys and values
                tensor = torch.atleast_1d(tensor).tensor_split(3)[part]
            found[name] = tensor.T if original == "text_projection" else tensor
            used.add(original)
    unused = UNUSED_TEXT.pattern
    if component.name == "text_encoder" and not component.folder and is_open_clip(component.config):
        # SD2 reads the second to last of 24 layers. Its configs leave the last one out, its files may not.
        last = component.config["num_hidden_layers"]
        unused += rf"|(transformer\.resblocks|encoder\.layers)\.{last}\..*"
    extra = [key for name, key in bare.items() if name not in used and not re.fullmatch(unused, name)]
    return found | {key: tensors[key] for key in extra}
