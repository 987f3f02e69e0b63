"""Trains a ControlNet for the demo model: `python -m lcm_compile.demo.train_controlnet --out FOLDER`.

It reads outlines of shapes, white on black, and the model then draws its shapes there. The folder is a
diffusers ControlNet, which `build --base demo --controlnet FOLDER` builds; next to it are outlines to try it
with. At the end it draws held-out captions with it, with the demo's LCM-LoRA in four steps, and tells how
much of the shapes lies in their outlines: the mean intersection over union, with the ControlNet and without.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    LCMScheduler,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcm_compile.checkpoint.families import DEMO_FOLDER, FAMILIES
from lcm_compile.demo.judge import Picture
from lcm_compile.demo.model import make_scheduler, tokenize
from lcm_compile.demo.train import DROPPED, MAX_WEIGHT, Base, autocast
from lcm_compile.demo.train_vae import encode
from lcm_compile.demo.training import SIDE, Progress, learning_rate
from lcm_compile.demo.world import (
    DAY,
    Scene,
    caption,
    coverage,
    render,
    sample_scene,
    second_tone,
)

CHECKPOINT = DEMO_FOLDER / "checkpoint"
HINT_BLOCK = (16, 32, 64)  # channels of the layers that read the picture: it becomes four times smaller
LINE = 2  # pixels on each side of a shape's edge that its outline covers


def shapes_of(scene: Scene, size: int = SIDE) -> np.ndarray:
    """Returns which pixels the scene's shapes cover. Shape (size, size), of booleans."""
    covers = [
        coverage(thing.shape, place, size)
        for thing, place in zip(scene.description.things, scene.placements, strict=True)
    ]
    return np.maximum.reduce(covers) > 0.5


def outlines(scene: Scene, size: int = SIDE) -> Picture:
    """Returns the control picture of a scene: white outlines on black. Shape (size, size, 3)."""
    inside = np.pad(shapes_of(scene, size), LINE, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(inside, (2 * LINE + 1,) * 2)
    edge = np.not_equal(windows.max((2, 3)), windows.min((2, 3)))
    return np.stack([np.where(edge, np.uint8(255), np.uint8(0))] * 3, axis=-1)


def overlap(picture: Picture, scene: Scene) -> float:
    """Returns the intersection over union of the shapes in a picture and those of a scene.

    A pixel belongs to a shape if it is nearer to a colour of the caption's shapes than to the background's
    tones.
    """
    words = scene.description
    tones = [np.array(DAY.backgrounds[words.background], float), second_tone(words.background)]
    paints = [np.array(DAY.colours[thing.colour], float) for thing in words.things]
    far = np.linalg.norm(picture[:, :, None].astype(float) - np.array(tones + paints), axis=-1)
    painted, asked = far.argmin(-1) >= len(tones), shapes_of(scene, len(picture))
    return float((painted & asked).sum() / (painted | asked).sum())


def new_controlnet(base: Base) -> ControlNetModel:
    """Returns a ControlNet that adds nothing yet: a copy of the UNet's first half."""
    return ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=HINT_BLOCK)


def train(options: argparse.Namespace) -> ControlNetModel:
    """Returns a trained ControlNet. The base stays as it is."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    base = Base().to(device)
    base.load(CHECKPOINT)
    base.requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(CHECKPOINT, subfolder="vae").to(device)
    controlnet = new_controlnet(base).to(device)
    rng = np.random.default_rng(options.seed)
    scenes = [sample_scene(rng) for _ in range(options.scenes)]
    pictures = torch.from_numpy(np.stack([render(scene, SIDE) for scene in scenes])).permute(0, 3, 1, 2)
    latents = encode(vae, pictures) * vae.config.scaling_factor
    hints = torch.from_numpy(np.stack([outlines(scene) for scene in scenes])).permute(0, 3, 1, 2)
    tokens = tokenize([caption(scene) for scene in scenes])
    alphas = make_scheduler().alphas_cumprod.to(device)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=0.0, betas=(0.9, 0.99), fused=True)
    attention = SDPBackend.MATH if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    progress = Progress("ControlNet", 0, options.steps)
    for step in range(1, options.steps + 1):
        index = torch.randint(len(latents), (options.batch,))
        clean = latents[index].to(device, torch.float32)
        even = (torch.arange(options.batch) + torch.rand(options.batch)) / options.batch
        timestep = (even * len(alphas)).long().clamp(max=len(alphas) - 1).to(device)
        alpha = alphas[timestep][:, None, None, None]
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        kept = (torch.rand(options.batch, device=device) >= DROPPED).float()
        hint = hints[index].to(device, torch.float32) / 255
        with autocast(device), sdpa_kernel(attention):
            predicted = predict(base, controlnet, noisy, timestep, tokens[index].to(device), kept, hint)
        weight = (1 / alpha).clamp(max=MAX_WEIGHT)  # as in the base's training
        loss = (weight * (predicted.float() - noise).square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr, 50, options.steps // 3)
        optimizer.step()
        progress(step, loss)
    return controlnet.eval()


def predict(
    base: Base,
    controlnet: ControlNetModel,
    noisy: Tensor,
    timestep: Tensor,
    tokens: Tensor,
    kept: Tensor,
    hint: Tensor,
) -> Tensor:
    """Predicts noise as Base does, guided by outlines `hint` (b, 3, 64, 64) from 0 to 1."""
    hidden, pooled = base.text(tokens)
    size = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE], device=noisy.device).expand(len(noisy), 6)
    added = {"text_embeds": pooled * kept[:, None], "time_ids": size}
    hidden = hidden * kept[:, None, None]
    down, middle = controlnet(
        noisy, timestep, hidden, controlnet_cond=hint, added_cond_kwargs=added, return_dict=False
    )
    found: Tensor = base.unet(
        noisy,
        timestep,
        hidden,
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]
    return found


def evaluate(controlnet: ControlNetModel, scenes: list[Scene], out: Path) -> dict[str, float]:
    """Returns the mean overlap of held-out scenes' pictures with their outlines, with the ControlNet and not.

    Writes the outlines of the first scenes to `out`, each named after its caption.
    """
    pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(
        CHECKPOINT, controlnet=controlnet, add_watermarker=False
    )
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(FAMILIES["demo"].lcm_lora)
    pipeline.set_progress_bar_config(disable=True)
    found: dict[str, list[float]] = {"controlled": [], "not controlled": []}
    for seed, scene in enumerate(scenes):
        hint = Image.fromarray(outlines(scene))
        if seed < 8:
            hint.save(out / f"{caption(scene).replace(' ', '-')}.png")
        for name, strength in (("controlled", 1.0), ("not controlled", 0.0)):
            picture = pipeline(
                caption(scene),
                image=hint,
                num_inference_steps=4,
                guidance_scale=1.0,
                controlnet_conditioning_scale=strength,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images[0]
            found[name].append(overlap(np.rint(picture * 255).astype(np.uint8), scene))
    return {name: round(float(np.mean(values)), 3) for name, values in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m lcm_compile.demo.train_controlnet", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=2048, help="training scenes")
    parser.add_argument("--held-out", type=int, default=40, help="scenes that it is judged by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    controlnet = train(options).cpu()
    controlnet.save_pretrained(options.out)
    print(f"wrote {options.out}", file=sys.stderr, flush=True)
    rng = np.random.default_rng(options.seed + 1)
    held_out = [sample_scene(rng, held_out=True) for _ in range(options.held_out)]
    print(json.dumps(evaluate(controlnet, held_out, options.out)))


if __name__ == "__main__":
    main()
