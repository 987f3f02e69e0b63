"""Latent consistency distillation with a LoRA: teaches a base to draw in a few steps.

Algorithm 1 of "LCM-LoRA" (Luo et al. 2023, arXiv 2311.05556). The teacher is the UNet without its adapters,
the student the UNet with them, and the target the UNet with a running mean of them: one UNet in memory
serves all three. The file has the key layout of latent-consistency/lcm-lora-sdxl.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcm_compile.checkpoints import Checkpoint, Modules, load_modules, load_tokenizer, open_checkpoint
from lcm_compile.consistency import Conditioning, Predict, Solver, distillation_loss
from lcm_compile.errors import CheckpointError, LcmCompileError, UsageError
from lcm_compile.stages import EncodeOne, EncodeTwo
from lcm_compile.training_data import DEMO, Batch, open_data

# The modules that latent-consistency/lcm-lora-sdxl adapts, by the end of their names.
ADAPTED = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
TARGET_DECAY = 0.95  # μ of the paper
WARM_UP = 100  # steps, or a tenth of them all if that is fewer
COOL_DOWN = 0.3  # of all steps: with a batch this small the last weights of a constant rate are noisy ones


@dataclass(frozen=True)
class DistillSpec:
    """One distillation, as asked for. `data` is a folder or `demo`, which is also the demo base's default."""

    base: str
    steps: int = 1000
    rank: int = 64
    skip: int = 20
    guidance_min: float = 3.0
    guidance_max: float = 15.0
    batch: int = 12
    lr: float = 1e-4
    data: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "skip", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr must be a positive number, not {self.lr}", "for example --lr 1e-4")
        for name in ("guidance_min", "guidance_max"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name.replace('_', '-')} must be a number of at least 0, not {value}")
        if self.guidance_min > self.guidance_max:
            raise UsageError(f"guidance-min {self.guidance_min} is above guidance-max {self.guidance_max}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        if self.data is None and self.base != DEMO:
            raise UsageError(
                f"no pictures to distil {self.base} on", "give a folder of captioned pictures to --data"
            )


@dataclass(frozen=True)
class Progress:
    """A step that is done, counted from 1, and its loss."""

    step: int
    total: int
    loss: float


def distill(spec: DistillSpec, out: Path) -> Generator[Progress, None, Path]:
    """Distils a base into an LCM-LoRA; yields after every step, and returns `out` once it is written.

    All that can be wrong with the request is found before this returns; weights are loaded at the first
    step. Nothing is at `out` before the last one. UsageError, CheckpointError, LcmCompileError.
    """
    check_out(out)
    checkpoint = open_checkpoint(spec.base)
    check_teacher(checkpoint, spec.skip)
    height, width = checkpoint.default_size
    batches = open_data(spec.data or DEMO, spec.batch, height, width, spec.seed)
    return train(spec, checkpoint, batches, out)


def check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out} is no .safetensors file", "for example --out lcm_lora.safetensors")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder", "give a file name")
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} of --out does not exist", f"mkdir -p {out.parent}")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"the folder {out.parent} of --out can't be written", "give another --out")


def check_teacher(checkpoint: Checkpoint, skip: int) -> None:
    if checkpoint.has_guidance_embedding:
        raise CheckpointError(
            f"{checkpoint.base} is an LCM already: its UNet takes the guidance scale",
            f"lcm-compile build --base {checkpoint.base} --no-lcm",
        )
    last = checkpoint.scheduler.num_train_timesteps
    if last % skip:
        # LCM sampling starts at the last timestep: one that is never trained would draw noise.
        usual = last // checkpoint.scheduler.original_inference_steps
        raise UsageError(f"skip {skip} does not divide the {last} training timesteps", f"use --skip {usual}")


def train(
    spec: DistillSpec, checkpoint: Checkpoint, batches: Iterator[Batch], out: Path
) -> Generator[Progress, None, Path]:
    """The training loop."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    modules = load_modules(checkpoint)
    for module in modules.named().values():
        module.to(device)
    unet: Any = modules.unet
    student = add_lora(unet, spec.rank, spec.seed)
    check_space(out, 2 * sum(weight.numel() for weight in student.values()))
    target = {name: weight.detach().clone() for name, weight in student.items()}
    condition = Conditioner(checkpoint, modules, device)
    solver = Solver.of(checkpoint.scheduler, spec.skip, device)
    timesteps = solver.timesteps()
    optimizer = torch.optim.AdamW(student.values(), lr=0.0, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(spec.seed)
    for step in range(1, spec.steps + 1):
        pictures, captions = next(batches)
        clean = encode_pictures(modules.vae, torch.from_numpy(pictures).to(device))
        noise, timestep, w = (t.to(device) for t in draw(spec, clean.shape, timesteps, generator))
        loss = distillation_loss(
            predict_with(unet),
            predict_with(unet, target),
            predict_without_lora(unet),
            clean,
            noise,
            timestep,
            w,
            condition(captions),
            solver,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(student.values(), 1.0)
        if not norm.isfinite():
            raise LcmCompileError(f"step {step}: the loss is no longer finite", f"try --lr {spec.lr / 10:g}")
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * rate(step, spec.steps)
        optimizer.step()
        torch._foreach_lerp_(list(target.values()), list(student.values()), 1 - TARGET_DECAY)
        yield Progress(step, spec.steps, loss.item())
    save_lora(student, out, describe(spec, checkpoint))
    return out


def rate(step: int, steps: int) -> float:
    """The part of the learning rate at a step counted from 1: a warm-up, then constant, then down to 0."""
    rising = step / min(WARM_UP, math.ceil(steps / 10))
    falling = (steps - step + 1) / math.ceil(COOL_DOWN * steps)
    return min(1.0, rising, falling)


def draw(
    spec: DistillSpec, shape: torch.Size, timesteps: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch's noise, timesteps (b,) and guidance (b,), on the CPU: the same draws on any device."""
    noise = torch.randn(shape, generator=generator)
    timestep = timesteps[torch.randint(len(timesteps), shape[:1], generator=generator)]
    w = torch.empty(shape[:1]).uniform_(spec.guidance_min, spec.guidance_max, generator=generator)
    return noise, timestep, w


def add_lora(unet: Any, rank: int, seed: int) -> dict[str, Tensor]:
    """Puts PEFT adapters of α = rank into a UNet. Their weights by name: nothing else is trained."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ADAPTED)))
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


def predict_with(unet: nn.Module, adapters: dict[str, Tensor] | None = None) -> Predict:
    """The UNet with its adapters, or with other weights in their place."""

    def predict(latent: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        hidden = cond["encoder_hidden_states"]
        added = {name: value for name, value in cond.items() if name != "encoder_hidden_states"}
        options = {"added_cond_kwargs": added or None, "return_dict": False}
        with mixed_precision(latent.device), attention(latent.device):
            (output,) = torch.func.functional_call(unet, adapters or {}, (latent, timestep, hidden), options)
        return output.float()

    return predict


def predict_without_lora(unet: Any) -> Predict:
    """The UNet as it was before it got adapters."""
    plain = predict_with(unet)

    def predict(latent: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        unet.disable_adapters()
        try:
            return plain(latent, timestep, cond)
        finally:
            unet.enable_adapters()

    return predict


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; a CPU stays with fp32, where bfloat16 was only a fifth faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Any kernel on a GPU; on a CPU the plain one, as fused attention's backward takes a third of a step."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


class Conditioner:
    """Prompts to what the UNet is told, by the very stage that bundles are built with."""

    def __init__(self, checkpoint: Checkpoint, modules: Modules, device: torch.device) -> None:
        from tokenizers import Tokenizer

        self._encode: nn.Module = EncodeOne(modules.text_encoder)
        if modules.text_encoder_2 is not None:
            self._encode = EncodeTwo(modules.text_encoder, modules.text_encoder_2)
        self._tokenizers = []
        for name in checkpoint.tokenizers:
            files = load_tokenizer(checkpoint, name)
            tokenizer = Tokenizer.from_str(files.json)
            tokenizer.enable_truncation(files.max_length)
            tokenizer.enable_padding(length=files.max_length, pad_id=files.pad_token_id)
            self._tokenizers.append(tokenizer)
        height, width = checkpoint.default_size
        size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        self._time_ids = size.to(device)
        empty = self._states([""])
        # As the pipeline does without a negative prompt: SDXL's zeros, or the empty prompt.
        self._empty = [torch.zeros_like(t) for t in empty] if checkpoint.zero_negative_prompt else empty

    def _states(self, prompts: Sequence[str]) -> list[Tensor]:
        tokens = [
            torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(prompts))])
            for tokenizer in self._tokenizers
        ]
        with torch.no_grad():
            states = self._encode(*(ids.to(self._time_ids.device) for ids in tokens))
        return [states] if isinstance(states, Tensor) else list(states)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """First the prompts, then as many times none: rows (2b, …)."""
        both = [
            torch.cat([states, empty.expand_as(states)])
            for states, empty in zip(self._states(prompts), self._empty, strict=True)
        ]
        if len(both) == 1:
            return {"encoder_hidden_states": both[0]}
        time_ids = self._time_ids.expand(len(both[0]), -1)
        return {"encoder_hidden_states": both[0], "text_embeds": both[1], "time_ids": time_ids}


def encode_pictures(vae: Any, pictures: Tensor) -> Tensor:
    """uint8 pictures (b, height, width, 3) to latents scaled as the UNet knows them (b, c, h, w)."""
    config = vae.config
    with torch.no_grad():
        latents = vae.encode(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mode()
    if getattr(config, "latents_mean", None) is not None:
        mean, std = latents.new_tensor([config.latents_mean, config.latents_std])[..., None, None]
        latents = (latents - mean) / std
    return latents * config.scaling_factor


def describe(spec: DistillSpec, checkpoint: Checkpoint) -> dict[str, Any]:
    """How a LoRA was made, for its file. The base's path is left out: it says nothing elsewhere."""
    made = {name: value for name, value in vars(spec).items() if name not in ("base", "data")}
    family = checkpoint.family.name if checkpoint.family else None
    return {"architecture": checkpoint.architecture, "family": family, **made}


def check_space(out: Path, size: int) -> None:
    """A full disk is better found before the training than after it."""
    free = shutil.disk_usage(out.parent).free
    if free < 1.1 * size + 1_000_000:
        raise LcmCompileError(
            f"{out.parent} has {free / 1e6:.1f} MB free and {out.name} will take {size / 1e6:.1f} MB",
            "make room, or give another --out",
        )


def save_lora(adapters: dict[str, Tensor], out: Path, made: dict[str, Any]) -> None:
    """Writes PEFT's weights under kohya's keys in half precision, whole or not at all."""
    from safetensors.torch import save

    tensors = {}
    for name, weight in adapters.items():
        module, _, side = name.removesuffix(".default.weight").rpartition(".")
        key = "lora_unet_" + module.replace(".", "_")
        direction = {"lora_A": "lora_down", "lora_B": "lora_up"}[side]
        tensors[f"{key}.{direction}.weight"] = weight.detach().half().cpu().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(made["rank"]), dtype=torch.float16)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise LcmCompileError("weights of the LoRA exceed half precision", "try a lower --lr")
    # One entry: safetensors writes several in no fixed order, and a seed must give the same file.
    data = save(tensors, metadata={"lcm_compile_distill": json.dumps(made)})
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_bytes(data)
        part.replace(out)
    except OSError as error:
        raise LcmCompileError(f"{out} can't be written: {error.strerror}", "give another --out") from error
    finally:
        part.unlink(missing_ok=True)
