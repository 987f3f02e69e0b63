"""The papers' equations in float64, and UNets to put into them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from factories import BETAS

from lcm_compile.training import distill
from lcm_compile.training.data import open_data


def alpha_bar() -> np.ndarray:
    return np.cumprod(1 - np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2)


def reference_loss(
    student, target, teacher, z0, noise, t, w, prompt, empty, kind, k, end=None, tuning=False
) -> float:
    """One picture's loss in float64, in Luo et al. 2023's own form: their ε̂, f, Ψ_DDIM and guided step.

    With `end` f is that of Zheng et al. 2024, formula 18: an exponential integrator in λ = log(α/σ).
    """
    alpha, sigma = np.sqrt(alpha_bar()), np.sqrt(1 - alpha_bar())
    s = max(t - k, 0)

    def epsilon(z, output, t):
        return {
            "epsilon": output,
            "v_prediction": alpha[t] * output + sigma[t] * z,
            "sample": (z - alpha[t] * output) / sigma[t],
        }[kind]

    def f(function, z, t):
        z0_hat = (z - sigma[t] * epsilon(z, function(z, t, prompt), t)) / alpha[t]
        if end is not None:
            h = np.log(alpha[end] / sigma[end]) - np.log(alpha[t] / sigma[t])
            return sigma[end] / sigma[t] * z - alpha[end] * (np.exp(-h) - 1) * z0_hat
        c_skip = 0.5**2 / ((10 * t) ** 2 + 0.5**2)
        c_out = 10 * t / np.sqrt((10 * t) ** 2 + 0.5**2)
        return c_skip * z + c_out * z0_hat

    def psi(z, condition):
        ratio = alpha[s] / alpha[t]
        eps = epsilon(z, teacher(z, t, condition), t)
        return ratio * z - sigma[s] * (sigma[t] / sigma[s] * ratio - 1) * eps - z

    z = alpha[t] * z0 + sigma[t] * noise
    z_hat = alpha[s] * z0 + sigma[s] * noise
    if not tuning:
        z_hat = z + (1 + w) * psi(z, prompt) - w * psi(z, empty)
    difference = f(student, z, t) - f(target, z_hat, s)
    return float(np.mean(np.sqrt(difference**2 + 0.001**2) - 0.001))


def inputs_of(pipe, samples):
    """Latents in float64, and the text states with and without a prompt, as diffusers makes them."""
    latents, pairs = [], []
    with torch.no_grad():
        for picture, caption in samples:
            pixels = torch.tensor(picture)[None].permute(0, 3, 1, 2) / 127.5 - 1
            latents.append(pipe.vae.encode(pixels).latent_dist.mode()[0] * pipe.vae.config.scaling_factor)
            text = pipe.encode_prompt(
                caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
            )
            pair = [{"encoder_hidden_states": text[0][0]}, {"encoder_hidden_states": text[1][0]}]
            if len(text) > 2:
                for states, pooled in zip(pair, text[2:], strict=True):
                    time_ids = torch.tensor([64.0, 64, 0, 0, 64, 64])
                    states |= {"text_embeds": pooled[0], "time_ids": time_ids}
            pairs.append(pair)
    return [latent.double().numpy() for latent in latents], pairs


def in_numpy(unet: UNet2DConditionModel, guidance: torch.Tensor | None = None):
    """A UNet in float64 as a function of one picture's latent, its timestep and its text states."""
    unet = unet.double()

    def predict(latent, timestep, states):
        latent = torch.from_numpy(latent)[None]
        added = {name: t[None].double() for name, t in states.items() if name != "encoder_hidden_states"}
        hidden = states["encoder_hidden_states"][None].double()
        told = None if guidance is None else guidance[None].double()
        with torch.no_grad():
            output = unet(latent, timestep, hidden, timestep_cond=told, added_cond_kwargs=added or None)
        return output.sample[0].numpy()

    return predict


def with_lora(unet: UNet2DConditionModel, adapters: dict[str, torch.Tensor]) -> UNet2DConditionModel:
    """W + B·A of every adapter, whose α is its rank."""
    unet = unet.double()
    modules = {name.rsplit(".lora_", 1)[0] for name in adapters}
    for module in modules:
        down, up = (adapters[f"{module}.lora_{side}.default.weight"].double() for side in "AB")
        weight = unet.get_submodule(module).weight
        weight.data += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return unet


def reference_step(pipe, spec, numbers, networks, prediction, data="demo") -> float:
    """The loss on pictures of `data`, with `networks(w)` as student, target and teacher."""
    data = open_data(str(data), 64, 64, spec.seed)
    latents, pairs = inputs_of(pipe, [data.sample(n) for n in numbers])
    timesteps = torch.arange(spec.skip - 1, 1000, spec.skip)
    drawn = distill.draw(spec, numbers, latents[0].shape, timesteps)
    losses = []
    for z0, (prompt, empty), noise, t, w, s in zip(latents, pairs, *drawn, strict=True):
        picture = z0, noise.double().numpy(), int(t), float(w), prompt, empty
        end = int(s) if spec.method == "tcd" else None
        losses.append(
            reference_loss(*networks(w), *picture, prediction, spec.skip, end, tuning=spec.finetune)
        )
    return float(np.mean(losses))
