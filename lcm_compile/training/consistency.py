"""The maths of latent consistency distillation and tuning, and of trajectory consistency, in torch.

Distillation (Luo et al. 2023, arXiv 2310.04378, section 4) makes the student consistent at two timesteps that
are k apart. A frozen teacher makes the step from one to the other, and the target is a running mean of the
student:

    ẑ_n = DDIM step from t_{n+k} to t_n of teacher(c) + w·(teacher(c) − teacher(∅)),
    loss = d(f_student(z_{n+k}, c, t_{n+k}), f_target(ẑ_n, c, t_n)),    f(z, c, t) = c_skip·z + c_out·ẑ0.

d is `pseudo_huber`. w is the paper's guidance scale, the weight of the difference that guidance adds;
diffusers' guidance_scale is 1 + w.

Tuning (the same paper, section 4.4) has no teacher: z_n has the same z0 and the same noise as z_{n+k}.

Trajectory consistency (Zheng et al. 2024, arXiv 2402.19159, section 4.1) compares where both lead at a random
timestep s from 0 to t_n, and not only at 0. Its f(z, c, t, s) is the DDIM step from t to s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_compile.scheduler import SchedulerSettings, alphas_cumprod, boundary_scalings

HUBER_C = 1e-3  # c of `pseudo_huber`

# The inputs of a UNet besides latent and timestep: text states (b, 77, d) as encoder_hidden_states, and for
# SDXL also text_embeds (b, p) and time_ids (b, 6).
Conditioning = dict[str, Tensor]
# (latent, timestep, conditioning) → the UNet's raw prediction, all with the same batch size
Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Solver:
    """The values of a noise schedule that the maths needs: ᾱ, c_skip and c_out of every timestep, each (T,).

    `skip` is k, the number of timesteps that one step of the teacher spans.
    """

    alphas: Tensor
    c_skip: Tensor
    c_out: Tensor
    prediction_type: str
    skip: int

    @classmethod
    def of(cls, settings: SchedulerSettings, skip: int, device: torch.device | str = "cpu") -> Solver:
        """Returns the solver of a base's scheduler settings, with its tensors on `device`."""
        alphas = torch.from_numpy(alphas_cumprod(settings))
        pairs = [boundary_scalings(t, settings.timestep_scaling) for t in range(len(alphas))]
        c_skip, c_out = torch.tensor(pairs, dtype=torch.float32).unbind(1)
        return cls(alphas.to(device), c_skip.to(device), c_out.to(device), settings.prediction_type, skip)

    def timesteps(self) -> Tensor:
        """Returns the timesteps t_{n+k} that are trained, shape (T / k,).

        With k = T / original_inference_steps they include every timestep that LCM sampling visits.
        """
        return torch.arange(1, len(self.alphas) // self.skip + 1) * self.skip - 1

    def earlier(self, timestep: Tensor) -> Tensor:
        """Returns t_n for t_{n+k}: `skip` timesteps before, but not below 0."""
        return (timestep - self.skip).clamp(min=0)


def per_picture(values: Tensor) -> Tensor:
    """Reshapes (b,) to (b, 1, 1, 1), so that the values multiply latents."""
    return values[:, None, None, None]


def add_noise(clean: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Returns √ᾱ·z0 + √(1 − ᾱ)·ε, which is forward diffusion. `alpha` is ᾱ, shape (b,).

    Applied to the estimates ẑ0 and ε̂ it is a DDIM step to ᾱ (Song et al. 2020, η = 0).
    """
    alpha = per_picture(alpha)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def clean_and_noise(
    latent: Tensor, output: Tensor, alpha: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Returns the estimates ẑ0 and ε̂, for which latent = √ᾱ·ẑ0 + √(1 − ᾱ)·ε̂.

    `prediction_type` says what the UNet's output is: epsilon, v_prediction or sample (ẑ0 itself).
    """
    root, sigma = per_picture(alpha).sqrt(), (1 - per_picture(alpha)).sqrt()
    if prediction_type == "epsilon":
        return (latent - sigma * output) / root, output
    if prediction_type == "v_prediction":
        return root * latent - sigma * output, sigma * latent + root * output
    return output, (latent - root * output) / sigma  # "sample"


def consistency(
    predict: Predict,
    latent: Tensor,
    timestep: Tensor,
    cond: Conditioning,
    solver: Solver,
    end: Tensor | None = None,
) -> Tensor:
    """Returns f(z, c, t) = c_skip·z + c_out·ẑ0, which is z itself at t = 0.

    With `end`, the timesteps s (b,), returns the trajectory's f(z, c, t, s), which is z itself at t = s.
    """
    output = predict(latent, timestep, cond)
    clean, noise = clean_and_noise(latent, output, solver.alphas[timestep], solver.prediction_type)
    if end is not None:
        return add_noise(clean, noise, solver.alphas[end])
    return per_picture(solver.c_skip[timestep]) * latent + per_picture(solver.c_out[timestep]) * clean


def teacher_step(
    predict: Predict, latent: Tensor, timestep: Tensor, w: Tensor, pair: Conditioning, solver: Solver
) -> Tensor:
    """Returns ẑ_n: the guided teacher's DDIM step over `skip` timesteps, but not below timestep 0.

    `pair` is the conditioning of 2b predictions: the first b with the prompts, the other b without.
    """
    both = predict(torch.cat([latent, latent]), torch.cat([timestep, timestep]), pair)
    with_prompt, without = both.chunk(2)
    # ẑ0 and ε̂ are affine in the prediction, so guiding the prediction guides both of them.
    guided = with_prompt + per_picture(w) * (with_prompt - without)
    clean, noise = clean_and_noise(latent, guided, solver.alphas[timestep], solver.prediction_type)
    return add_noise(clean, noise, solver.alphas[solver.earlier(timestep)])


def pseudo_huber(a: Tensor, b: Tensor, c: float = HUBER_C) -> Tensor:
    """Returns the mean of √((a − b)² + c²) − c."""
    return ((a - b).square() + c**2).sqrt().sub(c).mean()


def consistency_loss(
    student: Predict,
    target: Predict,
    latent: Tensor,
    previous: Tensor,
    timestep: Tensor,
    cond: Conditioning,
    solver: Solver,
    end: Tensor | None = None,
) -> Tensor:
    """Returns the loss between z_{n+k} and z_n, with gradients for the student only.

    `latent` is z_{n+k} and `previous` z_n, both (b, c, h, w), `timestep` is t_{n+k} (b,), and `end` is as in
    `consistency`.
    """
    with torch.no_grad():
        wanted = consistency(target, previous, solver.earlier(timestep), cond, solver, end)
    return pseudo_huber(consistency(student, latent, timestep, cond, solver, end), wanted)


def distillation_loss(
    student: Predict,
    target: Predict,
    teacher: Predict,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    w: Tensor,
    pair: Conditioning,
    solver: Solver,
    end: Tensor | None = None,
) -> Tensor:
    """Returns the loss of one batch, with gradients for the student only.

    `clean` (z0) and `noise` have shape (b, c, h, w), `timestep` and `w` (b,), and `pair` (2b, …) as in
    `teacher_step`. With `end` (b,) it is the loss of trajectory consistency.
    """
    prompts = {name: value[: len(clean)] for name, value in pair.items()}
    latent = add_noise(clean, noise, solver.alphas[timestep])
    with torch.no_grad():
        previous = teacher_step(teacher, latent, timestep, w, pair, solver)
    return consistency_loss(student, target, latent, previous, timestep, prompts, solver, end)


def tuning_loss(
    student: Predict,
    target: Predict,
    clean: Tensor,
    noise: Tensor,
    timestep: Tensor,
    prompts: Conditioning,
    solver: Solver,
    end: Tensor | None = None,
) -> Tensor:
    """Returns the loss of one batch without a teacher, with shapes as in `distillation_loss`."""
    latent, previous = (
        add_noise(clean, noise, solver.alphas[t]) for t in (timestep, solver.earlier(timestep))
    )
    return consistency_loss(student, target, latent, previous, timestep, prompts, solver, end)
