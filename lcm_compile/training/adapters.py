"""The UNet as a function of its inputs, with weights of choice, and the adapters that are trained in it."""

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

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The modules that latent-consistency/lcm-lora-sdxl adapts, by the end of their names.
ADAPTED = (
    *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
PATHS = ("base", "data", "prior_data")


def add_lora(unet: Any, rank: int, modules: Sequence[str], seed: int) -> None:
    """Puts PEFT adapters of α = rank into a frozen UNet: nothing else in it is trained."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(modules)))


def trained(unet: nn.Module) -> Weights:
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


def place(unet: Any, machine: Machine) -> None:
    """Moves a UNet to where it computes; frozen weights take the precision they are multiplied in."""
    if machine.dtype is not None:
        for weight in unet.parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(machine.dtype)
    unet.to(machine.device)


def predict_with(
    unet: nn.Module, machine: Machine, weights: Weights | None = None, guidance: Tensor | None = None
) -> Predict:
    """The UNet, with other weights in place of some, and with its guidance embedding (b, d) if it has one."""

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
    """The UNet as it was before it got adapters."""
    plain = predict_with(unet, machine)

    def predict(latent: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        unet.disable_adapters()
        try:
            return plain(latent, timestep, cond)
        finally:
            unet.enable_adapters()

    return predict


def kohya_tensors(adapters: Weights, rank: int) -> dict[str, Tensor]:
    """PEFT's weights under the keys of latent-consistency/lcm-lora-sdxl, with an α a module."""
    tensors = {}
    for name, weight in adapters.items():
        module, _, side = name.removesuffix(".default.weight").rpartition(".")
        key = "lora_unet_" + module.replace(".", "_")
        tensors[f"{key}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = weight
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    return tensors


def peft_tensors(adapters: Weights) -> dict[str, Tensor]:
    """PEFT's weights under diffusers' keys; without an α both sides take it to be the rank."""
    return {f"unet.{name.replace('.default.weight', '.weight')}": t for name, t in adapters.items()}


def describe(spec: TrainSpec, checkpoint: Checkpoint) -> dict[str, Any]:
    """How a LoRA was made, for its file. Paths are left out: they say nothing elsewhere."""
    made = {name: value for name, value in vars(spec).items() if name not in PATHS}
    family = checkpoint.family.name if checkpoint.family else None
    return {"architecture": checkpoint.architecture, "family": family, **made}


def save_lora(tensors: Mapping[str, Tensor], out: Path, made: dict[str, Any]) -> None:
    """Writes a LoRA in half precision, whole or not at all. LcmCompileError where it can't."""
    from safetensors.torch import save

    halves = {name: tensor.detach().half().cpu().contiguous() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise LcmCompileError("weights of the LoRA exceed half precision", "try a lower --lr")
    # One entry: safetensors writes several in no fixed order, and a seed must give the same file.
    data = save(halves, metadata={"lcm_compile": json.dumps(made)})
    with replacing_output(out) as part:
        part.write_bytes(data)
