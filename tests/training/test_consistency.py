"""The maths of distillation against the papers' equations in float64, and diffusers' DDIM."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from factories import BETAS
from references import reference_loss

from lcm_compile.scheduler import SchedulerSettings, lcm_timesteps
from lcm_compile.training import consistency
from lcm_compile.training.consistency import Solver, pseudo_huber, teacher_step

TYPES = ("epsilon", "v_prediction", "sample")


def network(shift):
    """Some smooth function of all that a UNet sees, in NumPy."""
    return lambda z, t, c: np.sin(1.3 * z + t / 300 + shift) * c


def in_torch(function):
    def predict(latent, timestep, cond):
        t, c = (x.double().numpy()[:, None, None, None] for x in (timestep, cond["encoder_hidden_states"]))
        return torch.from_numpy(function(latent.double().numpy(), t, c)).to(latent.dtype)

    return predict


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("skip", [20, 100])
@pytest.mark.parametrize("ends", [None, (0, 5, 40, 300, 899)], ids=["lcm", "tcd"])
@pytest.mark.parametrize("tuning", [False, True], ids=["distil", "finetune"])
def test_loss_is_the_papers(kind, skip, ends, tuning):
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 5, 4, 8, 8))
    timestep = np.array([skip - 1, 2 * skip - 1, 499, 799, 999])
    w = rng.uniform(0, 14, 5)
    prompt, empty = rng.uniform(0.2, 1, (2, 5))
    networks = [network(shift) for shift in (0.0, 0.1, 0.5)]
    expected = [
        reference_loss(*networks, *picture, kind, skip, end, tuning)
        for *picture, end in zip(clean, noise, timestep, w, prompt, empty, ends or [None] * 5, strict=True)
    ]
    solver = Solver.of(SchedulerSettings(**BETAS, prediction_type=kind), skip)
    pair = {"encoder_hidden_states": torch.from_numpy(np.concatenate([prompt, empty]))}
    clean, noise, timestep, w = (torch.from_numpy(x) for x in (clean, noise, timestep, w))
    student, target, teacher = map(in_torch, networks)
    end = torch.tensor(ends) if ends else None
    if tuning:
        prompts = {name: t[:5] for name, t in pair.items()}
        loss = consistency.tuning_loss(student, target, clean, noise, timestep, prompts, solver, end)
    else:
        loss = consistency.distillation_loss(
            student, target, teacher, clean, noise, timestep, w, pair, solver, end
        )
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("timestep", [19, 39, 519, 999])
def test_teacher_steps_as_ddim(kind, timestep):
    scheduler = DDIMScheduler(**BETAS, prediction_type=kind, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(50)
    latent, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    solver = Solver.of(SchedulerSettings(**BETAS, prediction_type=kind), 20)
    at = torch.tensor([timestep])
    ours = teacher_step(lambda *_: torch.cat([output, output]), latent, at, torch.zeros(1), {}, solver)
    theirs = scheduler.step(output, timestep, latent).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_boundary_and_schedule():
    settings = SchedulerSettings()
    solver = Solver.of(settings, 20)
    latent = torch.randn(1, 4, 8, 8)
    at_zero = consistency.consistency(lambda *_: latent * 1e3, latent, torch.tensor([0]), {}, solver)
    torch.testing.assert_close(at_zero, latent, rtol=0, atol=0)
    assert solver.timesteps()[[0, 1, -1]].tolist() == [19, 39, 999]
    trained = set(solver.timesteps().tolist())
    assert all(trained.issuperset(lcm_timesteps(n, settings)) for n in range(1, 51))


def test_pseudo_huber():
    a = torch.tensor([0.0, 3e-3, 1.0])
    assert float(pseudo_huber(a, torch.zeros(3))) == pytest.approx((0 + 0.0021623 + 0.9990005) / 3, rel=1e-4)
