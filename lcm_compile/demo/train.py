"""Trains the demo model from scratch: `python -m lcm_compile.demo.train --work DIR --out CHECKPOINT`.

It trains the VAE, then only the VAE's decoder, and then both text encoders and the UNet together on the VAE's
latents. Every stage saves its state to DIR about once a minute, as a new file that is then renamed, and
continues from that state when the command is run again.

With `--start CHECKPOINT --look dusk` it instead fine-tunes a trained checkpoint to pictures in other colours.
All weights are trained except those of the VAE's encoder.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcm_compile.checkpoint.write_folder import save_model
from lcm_compile.demo.judge import score
from lcm_compile.demo.model import (
    END,
    TextEncoders,
    make_scheduler,
    make_tokenizers,
    make_unet,
    save_tokenizer,
    tokenize,
)
from lcm_compile.demo.train_vae import encode, mean_error, scale_latents, train_decoder, train_vae
from lcm_compile.demo.training import SHARD, SIDE, Progress, draw, learning_rate, save_atomically
from lcm_compile.demo.world import LOOKS, Look, held_out_prompts

DROPPED = 0.1  # fraction of captions whose conditioning is set to zero, for classifier-free guidance
MAX_WEIGHT = 60.0  # of a timestep in the loss


def latent_pool(
    vae: AutoencoderKL, work: Path, shards: int, seed: int, look: Look
) -> tuple[Tensor, list[str]]:
    """Returns scaled latents (n, 4, 16, 16) in fp16, and their captions.

    Each shard is a file in `work`, which is computed only if it does not exist.
    """
    latents, captions = [], []
    for index in range(shards):
        path = work / f"pool-{index:03d}.pt"
        if not path.exists():
            pictures, texts = draw(seed + 1000 + index, SHARD, look)
            scaled = (encode(vae, pictures) * vae.config.scaling_factor).half()
            save_atomically({"latents": scaled, "captions": texts}, path)
            print(f"pool {index + 1}/{shards}", file=sys.stderr, flush=True)
        shard = torch.load(path)
        latents.append(shard["latents"])
        captions += shard["captions"]
    return torch.cat(latents), captions


class Base(nn.Module):
    """The models that are trained together: both text encoders and the UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoders()
        self.unet = make_unet()

    def load(self, checkpoint: Path) -> None:
        """Loads the weights of a checkpoint that `export` wrote."""
        pipeline = StableDiffusionXLPipeline.from_pretrained(checkpoint, add_watermarker=False)
        self.text.first.load_state_dict(pipeline.text_encoder.state_dict())
        self.text.second.load_state_dict(pipeline.text_encoder_2.state_dict())
        self.unet.load_state_dict(pipeline.unet.state_dict())

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor, kept: Tensor) -> Tensor:
        """Predicts the noise in latents `noisy` (b, 4, 16, 16), given captions as token ids (b, 2, 77).

        `kept` (b,) is 1, or 0 where the caption's conditioning is set to zero.
        """
        hidden, pooled = self.text(tokens)
        size = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE], device=noisy.device).expand(len(noisy), 6)
        added = {"text_embeds": pooled * kept[:, None], "time_ids": size}
        hidden = hidden * kept[:, None, None]
        return self.unet(noisy, timestep, hidden, added_cond_kwargs=added, return_dict=False)[0]


def autocast(device: torch.device) -> torch.autocast:
    """Returns a context in which models compute in bfloat16, if the hardware supports it.

    That is several times faster, and the UNet trains equally well.
    """
    fast = device.type == "cuda" or (device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def train_base(vae: AutoencoderKL, work: Path, options: argparse.Namespace) -> None:
    """Trains the text encoders and the UNet to predict noise, and keeps a running mean of their weights."""
    steps, batch, device, path = options.base_steps, options.batch, vae.device, work / "base.pt"
    torch.manual_seed(options.seed)
    base = Base().to(device)
    if options.start:
        base.load(options.start)
    base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own types lack it
    averaged = copy.deepcopy(base).requires_grad_(False)
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    first = 0
    if path.exists():
        state = torch.load(path, map_location=device)
        base.load_state_dict(state["base"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    latents, captions = latent_pool(vae, work, options.shards, options.seed, LOOKS[options.look])
    tokens = tokenize(captions)
    alphas = make_scheduler().alphas_cumprod.to(device)
    torch.manual_seed(options.seed + first)
    # On a CPU the backward pass of fused attention takes a third of a step, that of plain attention little.
    attention = SDPBackend.MATH if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    progress = Progress("base", first, steps)
    for step in range(first + 1, steps + 1):
        index = torch.randint(len(latents), (batch,))
        clean = latents[index].to(device, torch.float32)
        # Timesteps spread evenly over the schedule make the loss of a batch less noisy than independent ones.
        even = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
        timestep = (even * len(alphas)).long().clamp(max=len(alphas) - 1)
        alpha = alphas[timestep][:, None, None, None]
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        kept = (torch.rand(batch, device=device) >= DROPPED).float()
        with autocast(device), sdpa_kernel(attention):
            predicted = base(noisy, timestep, tokens[index].to(device), kept)
        # The weight 1 / alpha makes this the loss of a velocity prediction. It favours the noisy timesteps,
        # which decide what is drawn and where. It is bounded, because the last timesteps show almost nothing.
        weight = (1 / alpha).clamp(max=MAX_WEIGHT)
        loss = (weight * (predicted.float() - noise).square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, options.lr, 300, options.decay_last)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(base.parameters()), 1 - decay)
        if progress(step, loss):
            state = {"base": base.state_dict(), "averaged": averaged.state_dict(), "step": step}
            save_atomically(state | {"optimizer": optimizer.state_dict()}, path)


def export(vae: AutoencoderKL, work: Path, out: Path) -> None:
    """Writes the running mean of the weights, from the last saved state, as a diffusers folder in fp16."""
    state = torch.load(work / "base.pt", map_location="cpu")
    base = Base()
    base.load_state_dict(state["averaged"])
    tokenizers = make_tokenizers()
    pipeline = StableDiffusionXLPipeline(
        vae=copy.deepcopy(vae).cpu(),
        text_encoder=base.text.first,
        text_encoder_2=base.text.second,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=base.unet,
        scheduler=make_scheduler(),
        add_watermarker=False,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        fresh, old = Path(folder) / "new", Path(folder) / "old"
        pipeline.to(dtype=torch.float16).save_pretrained(fresh)
        # transformers loads a model in the precision that its config names, diffusers in fp32. With fp32 in
        # the configs both load alike.
        for name in ("text_encoder", "text_encoder_2"):
            save_model(name, getattr(pipeline, name), fresh / name)
            config = fresh / name / "config.json"
            config.write_text(config.read_text().replace('"float16"', '"float32"'))
        # Plain tokenizer files, which every version of transformers reads.
        for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
            shutil.rmtree(fresh / name)
            save_tokenizer(fresh / name, pad)
        fresh.chmod(0o755)
        for weights in fresh.rglob("*.safetensors"):  # they are written readable for their owner only
            weights.chmod(0o644)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"exported step {state['step']} to {out}, {size / 1e6:.2f} MB", file=sys.stderr, flush=True)


def evaluate(options: argparse.Namespace, prompts: list[str]) -> dict[str, float]:
    """Returns the judge's scores of an exported checkpoint on prompts.

    Writes a sheet of the first pictures to the work folder.
    """
    pipeline = StableDiffusionXLPipeline.from_pretrained(options.out, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[np.ndarray] = []
    for at in range(0, len(prompts), 25):
        seeds = [torch.Generator().manual_seed(at + index) for index in range(len(prompts[at : at + 25]))]
        drawn = pipeline(
            prompts[at : at + 25],
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=seeds,
            output_type="np",
        )
        pictures += [np.rint(picture * 255).astype(np.uint8) for picture in drawn.images]
    rows = [np.concatenate(pictures[at : at + 8], 1) for at in range(0, min(len(pictures), 48) // 8 * 8, 8)]
    if rows:
        sheet = Image.fromarray(np.concatenate(rows))
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(
            options.work / "sheet.png"
        )
    return score(pictures, prompts, LOOKS[options.look])


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m lcm_compile.demo.train", description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for everything that is kept between runs"
    )
    default = Path(__file__).parent / "checkpoint"
    parser.add_argument(
        "--out", type=Path, default=default, help="diffusers folder to write, replaced if it exists"
    )
    parser.add_argument("--stage", choices=("vae", "base", "export", "eval", "all"), default="all")
    parser.add_argument("--start", type=Path, help="a trained checkpoint to fine-tune")
    parser.add_argument("--look", choices=LOOKS, default="day", help="the colours of the pictures")
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument("--decoder-steps", type=int, default=6000)
    parser.add_argument("--base-steps", type=int, default=10000)
    parser.add_argument(
        "--decay-last", type=int, default=2500, help="final base steps in which the learning rate falls"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--shards", type=int, default=24, help=f"amount of latents to train on, in shards of {SHARD}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=100, help="eval: number of held-out prompts")
    parser.add_argument("--steps", type=int, default=25, help="eval: number of Euler steps")
    parser.add_argument("--guidance", type=float, default=3.0, help="eval: guidance scale")
    options = parser.parse_args()
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    options.work.mkdir(parents=True, exist_ok=True)
    look = LOOKS[options.look]
    if options.stage != "eval":
        if options.start:
            vae = AutoencoderKL.from_pretrained(options.start, subfolder="vae").to(name)
        else:
            vae = train_vae(options.work, options.vae_steps, options.seed, torch.device(name))
            scale_latents(vae, options.seed)
        train_decoder(vae, options.work, options.decoder_steps, options.seed, look)
        error = mean_error(vae, options.seed, look)
        print(f"vae error {error:.4f}, scaling {vae.config.scaling_factor}", file=sys.stderr, flush=True)
    if options.stage in ("base", "all"):
        train_base(vae, options.work, options)
    if options.stage in ("export", "all"):
        export(vae, options.work, options.out)
    if options.stage in ("eval", "all"):
        prompts = held_out_prompts(options.prompts, options.seed)
        print(json.dumps(evaluate(options, prompts)))


if __name__ == "__main__":
    main()
