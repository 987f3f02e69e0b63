"""Reads a model from a file in the original layout, with diffusers' own conversion of the names.

Tensors are mapped from the file and converted to fp32 one by one, so the file is never in memory at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lcm_compile.checkpoint.checkpoint import Component, is_tiny
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.single_file import CLIP, CLIP_XL
from lcm_compile.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Weights = dict[str, "torch.Tensor"]


def component_in_file(component: Component) -> torch.nn.Module:
    """Returns a component in fp32, from the tensors whose keys begin with its prefix.

    Raises CheckpointError if the file can't be read, or if the tensors do not fit the config.
    """
    import torch

    if is_tiny(component.config):
        raise CheckpointError(
            f"the VAE's config is a tiny autoencoder's, and {component.files[0]} has no weights for one",
            "give --vae a folder with config.json, or a hub id",
        )
    module = empty_module(component)
    weights = as_diffusers(component, module, read_weights(component))
    needed = {name: tensor.shape for name, tensor in module.state_dict().items()}
    wrong = {
        "lacks": sorted(needed.keys() - weights.keys()),
        "has no place for": sorted(weights.keys() - needed.keys()),
        "has another shape of": [
            n for n in sorted(needed.keys() & weights.keys()) if needed[n] != weights[n].shape
        ],
    }
    reasons = [
        f"{what} {len(names)} weights ({', '.join(names[:3])})" for what, names in wrong.items() if names
    ]
    if reasons:
        raise CheckpointError(
            f"the {component.name} of {component.files[0]} does not fit its config: "
            f"it {'; it '.join(reasons)}",
            "download the file again, or give --config DIR, a diffusers folder of its architecture",
        )
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
    module.load_state_dict(copies, assign=True)
    return module


def read_weights(component: Component) -> Weights:
    """Returns a file's tensors for one component, under their full keys. Data is read when it is first used.

    Raises CheckpointError if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = component.files[0]
    try:
        with safe_open(path, framework="pt") as handle:
            keys = [key for key in handle.keys() if key.startswith(component.prefix)]  # noqa: SIM118
            return {key: handle.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}", "download it again") from error


def as_diffusers(component: Component, module: Any, weights: Weights) -> Weights:
    """Returns a component's original weights under the names of its diffusers or transformers module."""
    from diffusers.loaders import single_file_utils as convert

    if component.name == "unet":
        found = convert.convert_ldm_unet_checkpoint(weights, module.config)
    elif component.name == "vae" and any(".mid_block." in key for key in weights):  # diffusers' names already
        found = {key.removeprefix(component.prefix): tensor for key, tensor in weights.items()}
    elif component.name == "vae":
        found = convert.convert_ldm_vae_checkpoint(weights, module.config)
    elif component.prefix in (CLIP, CLIP_XL):
        found = {key.removeprefix(component.prefix): tensor for key, tensor in weights.items()}
    else:
        found = convert.convert_open_clip_checkpoint(module, weights, prefix=component.prefix)
    if not component.name.startswith("text_encoder"):
        return found
    # In old files and in some versions of transformers, a text encoder's names lack `text_model.` in front.
    nested = "text_model." if hasattr(module, "text_model") else ""
    return {
        name if name.startswith("text_projection") else nested + name.removeprefix("text_model."): tensor
        for name, tensor in found.items()
        if not name.endswith("position_ids")
    }
