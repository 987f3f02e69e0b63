"""Distillation: its maths against the papers' equations, and the LoRA files it writes."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from factories import BETAS, write_sd15, write_sdxl

from lcm_compile import consistency, distill
from lcm_compile.checkpoints import load_component, load_modules, open_checkpoint
from lcm_compile.consistency import Solver, pseudo_huber, teacher_step
from lcm_compile.distill import Conditioner, DistillSpec
from lcm_compile.errors import CheckpointError, LcmCompileError, UsageError
from lcm_compile.lora import fuse_loras, match_layers, read_lora
from lcm_compile.scheduler import SchedulerSettings, lcm_timesteps
from lcm_compile.spec import LoraSpec
from lcm_compile.stages import Decode
from lcm_compile.training_data import open_data

TYPES = ("epsilon", "v_prediction", "sample")
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"sdxl": write_sdxl(folder / "sdxl"), "sd15": write_sd15(folder / "sd15", factor=4)}


def settings_for(base, **changes) -> DistillSpec:
    values = {"steps": 3, "rank": 2, "batch": 2, "lr": 1e-2, "data": "demo", "seed": 3}
    return DistillSpec(str(base), **{**values, **changes})


def run(spec: DistillSpec, out: Path) -> list[float]:
    return [progress.loss for progress in distill.distill(spec, out)]


# The maths ----------------------------------------------------------------------------------------------


def network(shift):
    """Some smooth function of all that a UNet sees, in NumPy."""
    return lambda z, t, c: np.sin(1.3 * z + t / 300 + shift) * c


def in_torch(function):
    def predict(latent, timestep, cond):
        t, c = (x.double().numpy()[:, None, None, None] for x in (timestep, cond["encoder_hidden_states"]))
        return torch.from_numpy(function(latent.double().numpy(), t, c)).to(latent.dtype)

    return predict


def reference_loss(student, target, teacher, z0, noise, t, w, prompt, empty, kind, k) -> float:
    """One picture's loss in float64, in Luo et al. 2023's own form: their ε̂, f, Ψ_DDIM and guided step."""
    beta = np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - beta)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    s = max(t - k, 0)

    def epsilon(z, output, t):
        return {
            "epsilon": output,
            "v_prediction": alpha[t] * output + sigma[t] * z,
            "sample": (z - alpha[t] * output) / sigma[t],
        }[kind]

    def f(function, z, t):
        z0_hat = (z - sigma[t] * epsilon(z, function(z, t, prompt), t)) / alpha[t]
        c_skip = 0.5**2 / ((10 * t) ** 2 + 0.5**2)
        c_out = 10 * t / np.sqrt((10 * t) ** 2 + 0.5**2)
        return c_skip * z + c_out * z0_hat

    def psi(z, condition):
        ratio = alpha[s] / alpha[t]
        eps = epsilon(z, teacher(z, t, condition), t)
        return ratio * z - sigma[s] * (sigma[t] / sigma[s] * ratio - 1) * eps - z

    z = alpha[t] * z0 + sigma[t] * noise
    z_hat = z + (1 + w) * psi(z, prompt) - w * psi(z, empty)
    difference = f(student, z, t) - f(target, z_hat, s)
    return float(np.mean(np.sqrt(difference**2 + 0.001**2) - 0.001))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("skip", [20, 100])
def test_loss_is_the_papers(kind, skip):
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 5, 4, 8, 8))
    timestep = np.array([skip - 1, 2 * skip - 1, 499, 799, 999])
    w = rng.uniform(0, 14, 5)
    prompt, empty = rng.uniform(0.2, 1, (2, 5))
    networks = [network(shift) for shift in (0.0, 0.1, 0.5)]
    expected = [
        reference_loss(*networks, *picture, kind, skip)
        for picture in zip(clean, noise, timestep, w, prompt, empty, strict=True)
    ]
    solver = Solver.of(SchedulerSettings(**BETAS, prediction_type=kind), skip)
    pair = {"encoder_hidden_states": torch.from_numpy(np.concatenate([prompt, empty]))}
    arrays = (torch.from_numpy(x) for x in (clean, noise, timestep, w))
    loss = consistency.distillation_loss(*map(in_torch, networks), *arrays, pair, solver)
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


# What the UNet is told ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdxl", "sd15", "sdxl with an encoded empty prompt"])
def test_conditioning_is_the_pipelines(kind, bases, tmp_path):
    architecture, *other = kind.split(" ", 1)
    folder = bases[architecture]
    if other:
        folder = shutil.copytree(folder, tmp_path / "base")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    checkpoint = open_checkpoint(str(folder))
    pipe = PIPELINES[architecture].from_pretrained(folder)
    prompts = ["a large red star", "small " * 100]
    ours = Conditioner(checkpoint, load_modules(checkpoint), torch.device("cpu"))(prompts)
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    torch.testing.assert_close(ours["encoder_hidden_states"], torch.cat(encoded[:2]))
    if architecture == "sdxl":
        torch.testing.assert_close(ours["text_embeds"], torch.cat(encoded[2:]))
        assert ours["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 4


def test_latents_are_what_decode_undoes(bases):
    vae = load_component(open_checkpoint(str(bases["sdxl"])), "vae")
    pictures, _ = next(open_data("demo", 2, 64, 64, 0))
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    for statistics in ({}, {"latents_mean": [1.0, 2, 3, 4], "latents_std": [0.5, 1, 2, 4]}):
        vae.register_to_config(**statistics)
        decode = Decode(vae)
        latents = distill.encode_pictures(vae, torch.from_numpy(pictures))
        torch.testing.assert_close(
            latents * decode.scale + decode.shift, vae.encode(pixels).latent_dist.mode()
        )


def test_three_networks_in_one_unet(bases, tmp_path):
    unet = load_component(open_checkpoint(str(bases["sd15"])), "unet")
    inputs = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([19, 999]),
        {"encoder_hidden_states": torch.randn(2, 77, 32)},
    )
    with torch.no_grad():
        with distill.attention(torch.device("cpu")):
            plain = unet(*inputs[:2], inputs[2]["encoder_hidden_states"]).sample
        student = distill.add_lora(unet, 2, seed=0)
        torch.testing.assert_close(distill.predict_with(unet)(*inputs), plain, rtol=0, atol=0)
        other = {name: (torch.randn_like(weight) * 0.1).half().float() for name, weight in student.items()}
        target = distill.predict_with(unet, other)(*inputs)
        for name, weight in student.items():
            weight.copy_(other[name])
        torch.testing.assert_close(distill.predict_with(unet)(*inputs), target, rtol=0, atol=0)
        torch.testing.assert_close(distill.predict_without_lora(unet)(*inputs), plain, rtol=0, atol=0)
    assert not torch.allclose(target, plain, atol=1e-3)
    # What is trained is what the file holds.
    distill.save_lora(other, tmp_path / "lora.safetensors", {"rank": 2})
    fused = load_component(open_checkpoint(str(bases["sd15"])), "unet")
    fuse_loras({"unet": fused}, [(read_lora(tmp_path / "lora.safetensors"), LoraSpec("lora"))])
    with torch.no_grad():
        torch.testing.assert_close(distill.predict_with(fused)(*inputs), target, rtol=1e-4, atol=1e-4)
    assert [name for name, p in unet.named_parameters() if p.requires_grad] == list(student)


# The file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_file_fits_lcm_compile_and_diffusers(kind, bases, tmp_path):
    out = tmp_path / "lora.safetensors"
    run(settings_for(bases[kind]), out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    checkpoint = open_checkpoint(str(bases[kind]))
    modules, lora = load_modules(checkpoint), read_lora(out)
    adapted = {m for m in modules.unet.state_dict() if m.removesuffix(".weight").endswith(distill.ADAPTED)}
    matched = match_layers(lora, modules.named())
    assert len(matched) == len(adapted) - sum(m.endswith(".bias") for m in adapted)
    assert {(layer.component, layer.alpha, layer.down.dtype) for layer, _ in matched} == {
        ("unet", 2.0, torch.float16)
    }
    fuse_loras(modules.named(), [(lora, LoraSpec(str(out)))])
    pipe = PIPELINES[kind].from_pretrained(bases[kind])
    condition = Conditioner(checkpoint, modules, torch.device("cpu"))(["a red star"])
    hidden = condition.pop("encoder_hidden_states")
    inputs = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 499, hidden

    def predict(unet):
        with torch.no_grad():
            return unet(*inputs, added_cond_kwargs=condition).sample

    before = predict(pipe.unet)
    pipe.load_lora_weights(tmp_path, weight_name=out.name)
    theirs, ours = predict(pipe.unet), predict(modules.unet)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float((ours - before).abs().max()) > 0.01


def test_a_seed_decides_every_byte(bases, tmp_path):
    files = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        files[name] = tmp_path / f"{name}.safetensors"
        run(settings_for(bases["sd15"], steps=2, seed=seed), files[name])
    assert files["one"].read_bytes() == files["again"].read_bytes()
    assert files["one"].read_bytes() != files["other"].read_bytes()


def test_one_batch_is_learnt(bases, tmp_path, monkeypatch):
    """With the same pictures, noise and timesteps at every step the loss must fall, and steadily."""
    batch = next(open_data("demo", 4, 64, 64, 0))
    draw = distill.draw
    monkeypatch.setattr(distill, "open_data", lambda *_: itertools.repeat(batch))
    monkeypatch.setattr(distill, "draw", lambda *args: draw(*args[:-1], torch.Generator().manual_seed(1)))
    spec = settings_for(bases["sdxl"], batch=4, rank=4, lr=1e-3, steps=14, guidance_min=1, guidance_max=3)
    losses = run(spec, tmp_path / "lora.safetensors")
    assert losses[-1] < 0.75 * losses[0]
    assert sum(b < a for a, b in itertools.pairwise(losses)) > 10


def test_target_trails_the_student(bases, tmp_path, monkeypatch):
    seen = {}
    add_lora, predict_with = distill.add_lora, distill.predict_with

    def spy_on_add(*args):
        seen["student"] = add_lora(*args)
        return seen["student"]

    def spy_on_predict(unet, adapters=None):
        seen["target"] = adapters or seen.get("target")
        return predict_with(unet, adapters)

    monkeypatch.setattr(distill, "add_lora", spy_on_add)
    monkeypatch.setattr(distill, "predict_with", spy_on_predict)
    expected = None
    for _ in distill.distill(settings_for(bases["sd15"]), tmp_path / "lora.safetensors"):
        student = {name: weight.detach().clone() for name, weight in seen["student"].items()}
        if expected is not None:
            expected = {name: 0.95 * expected[name] + 0.05 * student[name] for name in student}
            torch.testing.assert_close(seen["target"], expected)
        expected = {name: weight.clone() for name, weight in seen["target"].items()}
        assert not torch.equal(next(iter(student.values())), next(iter(expected.values())))


def test_progress_and_interrupt(bases, tmp_path):
    out = tmp_path / "lora.safetensors"
    out.write_text("the old file")
    steps = distill.distill(settings_for(bases["sd15"], steps=9), out)
    first, second = next(steps), next(steps)
    assert [(p.step, p.total) for p in (first, second)] == [(1, 9), (2, 9)]
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "the old file"


def test_a_failed_write_leaves_nothing(bases, tmp_path, monkeypatch):
    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LcmCompileError, match="No space left"):
        run(settings_for(bases["sd15"], steps=1), tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


# Bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be"),
        ({"steps": -1}, "steps must be"),
        ({"skip": 0}, "skip must be"),
        ({"batch": 0}, "batch must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"guidance_min": -1.0}, "guidance-min must be"),
        ({"guidance_max": float("inf")}, "guidance-max must be"),
        ({"guidance_min": 9.0, "guidance_max": 2.0}, "above"),
        ({"seed": -1}, "seed must be"),
        ({"data": None}, "no pictures"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UsageError, match=message):
        settings_for("base", **changes)


def test_bad_out(bases, tmp_path, monkeypatch):
    spec = settings_for(bases["sd15"])
    (tmp_path / "folder.safetensors").mkdir()
    for out, message in (
        ("lora.bin", "no .safetensors file"),
        ("folder.safetensors", "is a folder"),
        ("missing/lora.safetensors", "does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            distill.distill(spec, tmp_path / out)
    with monkeypatch.context() as patch:
        patch.setattr(distill.os, "access", lambda *_: False)
        with pytest.raises(UsageError, match="can't be written"):
            distill.distill(spec, tmp_path / "lora.safetensors")
    monkeypatch.setattr(distill.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(LcmCompileError, match="MB free"):
        next(distill.distill(spec, tmp_path / "lora.safetensors"))


def test_bad_bases(bases, tmp_path):
    out = tmp_path / "lora.safetensors"
    with pytest.raises(UsageError, match="skip 30 does not divide"):
        distill.distill(settings_for(bases["sd15"], skip=30), out)
    path = shutil.copytree(bases["sd15"], tmp_path / "base") / "unet" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (({"time_cond_proj_dim": 256}, "LCM already"), ({"in_channels": 9}, "9 channels")):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            distill.distill(settings_for(path.parent.parent), out)


@pytest.mark.parametrize(("steps", "message"), [(5, "no longer finite"), (1, "exceed half precision")])
def test_a_training_that_explodes_ends(steps, message, bases, tmp_path):
    with pytest.raises(LcmCompileError, match=message):
        run(settings_for(bases["sd15"], lr=1e30, steps=steps), tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    rates = [distill.rate(step, 1000) for step in range(1, 1001)]
    assert rates[0] == 0.01
    assert all(rate == 1.0 for rate in rates[99:700])
    assert rates[700:] == sorted(rates[700:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert distill.rate(1, 1) == 1.0
