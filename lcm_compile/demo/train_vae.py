"""Trains the demo model's VAE: first all of it on crops, then only its decoder on complete pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lcm_compile.demo.model import make_vae
from lcm_compile.demo.training import (
    SIDE,
    Progress,
    draw,
    learning_rate,
    save_atomically,
    to_model,
)
from lcm_compile.demo.world import Look

SCENES = 8192  # pictures that the VAE is trained on
CHECKED = 512  # other pictures, which set the latents' scale and measure the error
ZEBRA = 0.15  # fraction of the pictures in zebra style, which the UNet is not trained on
CROP_BATCH = 16  # crops in a batch
PICTURE_BATCH = 8  # complete pictures in a batch
# Noise on the latents that the decoder is trained on, as a fraction of their standard deviation. The UNet's
# latents are close to the encoder's, but not equal.
LATENT_NOISE = 0.02


class Updates:
    """A VAE's optimizer, which saves itself and the VAE to `path` and continues from an existing file.

    It updates the weights `trained` for `steps` steps, with `peak` as the highest learning rate.
    """

    def __init__(
        self, vae: AutoencoderKL, trained: Iterable[nn.Parameter], path: Path, steps: int, peak: float
    ) -> None:
        self.vae, self.trained, self.path, self.steps, self.peak = vae, list(trained), path, steps, peak
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
        self.done = 0
        if path.exists():
            state = torch.load(path, map_location=vae.device)
            vae.load_state_dict(state["vae"])
            self.done = state["step"]
            if self.done < steps:
                self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(path.stem, self.done, steps)

    def __call__(self, loss: Tensor) -> None:
        """Takes one step on `loss`, and saves if a save is due."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.steps, self.peak, 100, self.steps // 2)
        self.optimizer.step()
        if self.progress(self.done, loss):
            state = {"vae": self.vae.state_dict(), "step": self.done}
            save_atomically(state | {"optimizer": self.optimizer.state_dict()}, self.path)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Returns the error of decoded pictures (b, 3, h, w), plus the error of their edges.

    The edges are the differences of adjacent pixels, down and across.
    """
    error = output - target
    # Shapes have vivid colours, backgrounds do not. Without the weight a VAE this small mixes up the colours.
    vivid = target.amax(1, keepdim=True) - target.amin(1, keepdim=True)
    colours = ((1 + 4 * vivid) * (error.abs() + error.square())).mean()
    return colours + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()


def train_vae(work: Path, steps: int, seed: int, device: torch.device) -> AutoencoderKL:
    """Returns the VAE, trained on 32×32 crops."""
    vae = make_vae().to(device)
    update = Updates(vae, vae.parameters(), work / "vae.pt", steps, 2e-3)
    if update.done < steps:
        torch.manual_seed(seed + update.done)  # a resumed run draws other batches than the run before it
        pictures, _ = draw(seed, SCENES, zebra=ZEBRA)
        while update.done < steps:
            crop = pictures[torch.randint(len(pictures), (CROP_BATCH,))]
            top, left = (int(n) for n in torch.randint(SIDE // 2 + 1, (2,)))
            target = to_model(crop[:, :, top : top + SIDE // 2, left : left + SIDE // 2]).to(device)
            posterior = vae.encode(target).latent_dist
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            update(reconstruction_loss(vae.decode(posterior.sample()).sample, target) + 2e-4 * kl)
    return vae


def train_decoder(vae: AutoencoderKL, work: Path, steps: int, seed: int, look: Look) -> None:
    """Trains only the decoder, on complete pictures.

    Crops are not enough, because group normalisation has other statistics on them. The latents do not change,
    so models that were trained on them stay valid.
    """
    vae.requires_grad_(False)
    trained = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    for weight in trained:
        weight.requires_grad_(True)
    update = Updates(vae, trained, work / "decoder.pt", steps, 1e-3)
    if update.done < steps:
        torch.manual_seed(seed + update.done)
        pictures, _ = draw(seed + 2, SCENES, look, ZEBRA)
        latents = encode(vae, pictures)
        noise = LATENT_NOISE * latents.std()
        while update.done < steps:
            index = torch.randint(len(pictures), (PICTURE_BATCH,))
            latent = latents[index] + noise * torch.randn(PICTURE_BATCH, *latents.shape[1:])
            output = vae.decode(latent.to(vae.device)).sample
            update(reconstruction_loss(output, to_model(pictures[index]).to(vae.device)))
    vae.requires_grad_(False).eval()


def scale_latents(vae: AutoencoderKL, seed: int) -> None:
    """Sets the VAE's `scaling_factor` so that scaled latents have variance 1."""
    latents = encode(vae, draw(seed + 1, CHECKED)[0])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 3))


def mean_error(vae: AutoencoderKL, seed: int, look: Look) -> float:
    """Returns the mean absolute error of reconstructed pictures, for values from 0 to 1."""
    pictures, _ = draw(seed + 1, CHECKED, look)
    with torch.no_grad():
        batches = zip(pictures.split(64), encode(vae, pictures).split(64), strict=True)
        errors = [(vae.decode(z.to(vae.device)).sample.cpu() - to_model(p)).abs().mean() for p, z in batches]
    return torch.stack(errors).mean().item() / 2


def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encodes uint8 pictures (n, 3, 64, 64) into unscaled latents (n, 4, 16, 16) on the CPU."""
    with torch.no_grad():
        latents = [
            vae.encode(to_model(p).to(vae.device)).latent_dist.mode().cpu() for p in pictures.split(64)
        ]
    return torch.cat(latents)
