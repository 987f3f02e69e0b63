"""Calls the UNet with chosen weights, and adds and saves the LoRA adapters that are trained in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcm_compile.checkpoint.find import Checkpoint
from lcm_compile.errors import LcmCompileError
from lcm_compile.system.files import replacing_output
from lcm_compile.training.consistency import Conditioning, Predict
from lcm_compile.training.loop import Weights
from lcm_compile.training.spec import Machine, TrainSpec

# Modules, by the ends of their names. ADAPTED are those that latent-consistency/lcm-lora-sdxl adapts.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTED = (
    *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
# The fields of a spec that hold paths.
PATHS = ("base", "data", "prior_data", "lora")


def add_lora(unet: Any, rank: int, modules: Sequence[str], seed: int) -> None:
    """Adds PEFT adapters with α = rank to a frozen UNet, so that only the adapters are trained.

    `modules` are the ends of the adapted modules' names; `seed` fixes the adapters' initial weights.
    """
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules)))


def trained(unet: nn.Module) -> Weights:
    """Returns the parameters that require gradients, by name."""
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


def place(unet: Any, machine: Machine) -> None:
    """Moves a UNet to the machine's device.

    Frozen weights are cast to the precision in which the machine multiplies them; trained weights keep
    theirs.
    """
    if machine.dtype is not None:
        for weight in unet.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(machine.dtype)
    unet.to(machine.device)


def predict_with(
    unet: nn.Module, machine: Machine, weights: Weights | None = None, guidance: Tensor | None = None
) -> Predict:
    """Returns a function that calls the UNet in the machine's precision and returns fp32.

    `weights` replace the UNet's own parameters of the same names. `guidance` (b, d) is the embedding of the
    guidance scale, for a UNet that takes one.
    """

    def predict(latent: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        hidden = cond["encoder_hidden_states"]
        added = {name: value for name, value in cond.items() if name != "encoder_hidden_states"}
        options: dict[str, Any] = {"added_cond_kwargs": added or None, "return_dict": False}
        if guidance is not None:
            options["timestep_cond"] = guidance
        with machine.autocast():
            if weights is None:
                (output,) = unet(latent, timestep, hidden, **options)
            else:
                (output,) = torch.func.functional_call(unet, weights, (latent, timestep, hidden), options)
        return output.float()

    return predict


def predict_without_lora(unet: Any, machine: Machine) -> Predict:
    """Returns a function that calls the UNet with its adapters disabled, as the base."""
    plain = predict_with(unet, machine)

    def predict(latent: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        unet.disable_adapters()
        try:
            return plain(latent, timestep, cond)
        finally:
            unet.enable_adapters()

    return predict


def kohya_tensors(adapters: Weights) -> dict[str, Tensor]:
    """Returns PEFT's weights under the keys of latent-consistency/lcm-lora-sdxl, each module's α its rank."""
    tensors = {}
    for name, weight in adapters.items():
        module, _, side = name.removesuffix(".default.weight").rpartition(".")
        key = "lora_unet_" + module.replace(".", "_")
        if side == "lora_A":
            tensors[f"{key}.lora_down.weight"] = weight
            tensors[f"{key}.alpha"] = torch.tensor(float(len(weight)))
        else:
            tensors[f"{key}.lora_up.weight"] = weight
    return tensors


def peft_tensors(adapters: Weights) -> dict[str, Tensor]:
    """Returns PEFT's weights under diffusers' keys.

    No α is stored: diffusers and this package then both take α to be the rank.
    """
    return {f"unet.{name.replace('.default.weight', '.weight')}": t for name, t in adapters.items()}


def describe(spec: TrainSpec, checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns how a LoRA was made, for the metadata of its file.

    Paths are left out, because they mean nothing on another machine.
    """
    made = {name: value for name, value in vars(spec).items() if name not in PATHS}
    family = checkpoint.family.name if checkpoint.family else None
    return {"architecture": checkpoint.architecture, "family": family, **made}


def save_lora(tensors: Mapping[str, Tensor], out: Path, made: dict[str, Any]) -> None:
    """Writes a LoRA in fp16, completely or not at all, with `made` as its metadata.

    Raises LcmCompileError if a weight is not finite in fp16 or if `out` can't be written.
    """
    from safetensors.torch import save

    halves = {name: tensor.detach().half().cpu().contiguous() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise LcmCompileError("weights of the LoRA exceed half precision", "try a lower --lr")
    # A single metadata entry, because safetensors writes several in no fixed order, and the same seed must
    # give the same file.
    data = save(halves, metadata={"lcm_compile": json.dumps(made)})
    with replacing_output(out) as partial:
        partial.write_bytes(data)
