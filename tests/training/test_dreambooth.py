"""Training a style: its loss against the equations in float64, its file, class pictures, and bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.training_utils import compute_snr
from factories import fuse_loras
from PIL import Image
from references import alpha_bar, in_numpy, inputs_of, with_lora
from runs import PIPELINES, write_pictures

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.errors import CheckpointError, LcmCompileError, UsageError
from lcm_compile.lora.merge import match_layers
from lcm_compile.lora.read import read_lora
from lcm_compile.spec import LoraSpec
from lcm_compile.training.data import NOISE, PRIOR_NOISE, open_data
from lcm_compile.training.dreambooth import MODULES, StyleSpec, draw, min_snr_weight, train_lora
from lcm_compile.training.state import state_path


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", 4, captions=False)


def settings_for(base, data, **changes) -> StyleSpec:
    values = {"steps": 3, "rank": 2, "batch": 2, "lr": 1e-2, "prompt": "a photo of sks dog", "seed": 3}
    return StyleSpec(str(base), str(data), **{**values, **changes})


def losses_of(spec, out, **options) -> list[float]:
    return [progress.loss for progress in train_lora(spec, out, **options)]


def scheduler_target(kind, clean, noise, t):
    """What the base was trained to predict."""
    root, sigma = np.sqrt(alpha_bar()[t]), np.sqrt(1 - alpha_bar()[t])
    return noise if kind == "epsilon" else root * noise - sigma * clean


@pytest.mark.parametrize(
    ("kind", "prediction"), [("sdxl", "epsilon"), ("sd15", "epsilon"), ("v", "v_prediction")]
)
@pytest.mark.parametrize("weight", [None, 0.3])
def test_a_step_is_the_equations(weight, kind, prediction, bases, pictures, tmp_path):
    """The second step's loss, with the adapters that were kept after the first."""
    prior = {} if weight is None else {"prior_data": str(write_pictures(tmp_path / "prior", 3))}
    changes = {**prior, "prior_weight": weight} if prior else {}
    spec = settings_for(bases[kind], pictures, steps=3, save_every=1, **changes)
    steps = train_lora(spec, tmp_path / "lora.safetensors")
    next(steps)
    adapters = torch.load(state_path(tmp_path / "lora.safetensors"), weights_only=True)["weights"]
    loss = next(steps).loss

    pipe = PIPELINES["sdxl" if kind == "sdxl" else "sd15"].from_pretrained(bases[kind])
    predict = in_numpy(with_lora(pipe.unet, adapters))
    numbers = range(2, 4)

    def error(purpose, data, prompt):
        samples = [open_data(str(data), 64, 64, spec.seed, prompt).sample(n) for n in numbers]
        latents, texts = inputs_of(pipe, samples)
        noises, timesteps = draw(purpose, spec.seed, numbers, latents[0].shape, 1000)
        errors = []
        for z0, (text, _), noise, t in zip(latents, texts, noises, timesteps.tolist(), strict=True):
            eps = noise.double().numpy()
            z = np.sqrt(alpha_bar()[t]) * z0 + np.sqrt(1 - alpha_bar()[t]) * eps
            errors.append(np.mean((predict(z, t, text) - scheduler_target(prediction, z0, eps, t)) ** 2))
        return np.mean(errors)

    expected = error(NOISE, pictures, spec.prompt)
    if weight is not None:
        expected += weight * error(PRIOR_NOISE, tmp_path / "prior", None)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_targets_are_diffusers():
    """The reference above is what diffusers' scripts train on."""
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    velocity = scheduler.get_velocity(clean, noise, torch.tensor([500])).numpy()
    ours = scheduler_target("v_prediction", clean.numpy(), noise.numpy(), 500)
    np.testing.assert_allclose(ours, velocity, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0])
def test_min_snr_weights_are_diffusers(kind, gamma):
    """As its text-to-image scripts weight their loss."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, timesteps)
    theirs = torch.minimum(snr, torch.full_like(snr, gamma)) / (snr + (kind == "v_prediction"))
    ours = min_snr_weight(scheduler.alphas_cumprod[timesteps], kind, gamma)
    torch.testing.assert_close(ours, theirs)


def test_snr_gamma_weights_the_loss(bases, pictures, tmp_path):
    """One picture a step: its loss is that without γ times its timestep's weight."""
    plain = settings_for(bases["sdxl"], pictures, steps=1, batch=1)
    weighted = settings_for(bases["sdxl"], pictures, steps=1, batch=1, snr_gamma=0.5)
    (one,), (other,) = (losses_of(spec, tmp_path / "lora.safetensors") for spec in (plain, weighted))
    side = open_checkpoint(str(bases["sdxl"])).unet["sample_size"]
    _, timestep = draw(NOISE, plain.seed, range(1), (4, side, side), 1000)
    snr = alpha_bar()[int(timestep)] / (1 - alpha_bar()[int(timestep)])
    assert other == pytest.approx(one * min(snr, 0.5) / snr, rel=1e-4)


def test_draws_cover_every_timestep():
    noise, timesteps = draw(NOISE, 0, range(4000), (1, 1, 1), 10)
    counts = torch.bincount(timesteps, minlength=10)
    assert len(counts) == 10 and counts.min() > 320
    assert abs(float(noise.mean())) < 0.06 and float(noise.std()) == pytest.approx(1, abs=0.05)
    other, _ = draw(PRIOR_NOISE, 0, range(4000), (1, 1, 1), 10)
    assert abs(float((noise * other).mean())) < 0.06


@pytest.mark.parametrize("modules", ["attention", "all"])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_file_fits_lcm_compile_and_diffusers(kind, modules, bases, pictures, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    losses_of(settings_for(bases[kind], pictures, modules=modules), folder / "style.safetensors")
    assert [path.name for path in folder.iterdir()] == ["style.safetensors"]
    lora = read_lora(folder / "style.safetensors")
    assert lora.layout == "peft"
    unet = load_component(open_checkpoint(str(bases[kind])), "unet")
    matched = match_layers(lora, {"unet": unet})
    names = [name.removesuffix(".weight") for name in unet.state_dict() if name.endswith(".weight")]
    endings = tuple(f".{ending}" for ending in MODULES[modules])
    assert len(matched) == sum(f".{name}".endswith(endings) for name in names)
    fuse_loras({"unet": unet}, [(lora, LoraSpec("style"))])

    pipe = PIPELINES[kind].from_pretrained(bases[kind])
    added = {"text_embeds": torch.randn(1, 40), "time_ids": torch.ones(1, 6)}
    hidden = torch.randn(1, 77, unet.config.cross_attention_dim)

    def predict(unet):
        latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return unet(latent, 499, hidden, added_cond_kwargs=added).sample

    before = predict(pipe.unet)
    pipe.load_lora_weights(folder, weight_name="style.safetensors")
    torch.testing.assert_close(predict(unet), predict(pipe.unet), rtol=1e-4, atol=1e-4)
    assert float((predict(unet) - before).abs().max()) > 0.01


def test_pictures_are_learnt(bases, pictures, tmp_path):
    spec = settings_for(bases["sd15"], pictures, steps=40, batch=4, rank=4, modules="all")
    losses = losses_of(spec, tmp_path / "lora.safetensors")
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_resume(bases, pictures, tmp_path):
    prior = write_pictures(tmp_path / "prior", 3)
    spec = settings_for(bases["sd15"], pictures, steps=5, save_every=2, prior_data=str(prior))
    whole, out = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    losses = losses_of(spec, whole)
    steps = train_lora(spec, out)
    next(steps), next(steps), next(steps)
    steps.close()
    with pytest.raises(UsageError, match="unfinished training"):
        train_lora(spec, out)
    assert losses_of(spec, out, resume=True) == losses[2:]
    assert out.read_bytes() == whole.read_bytes()
    assert not state_path(out).exists()


def test_the_base_draws_missing_class_pictures(bases, pictures, tmp_path):
    prior = tmp_path / "prior"
    spec = settings_for(
        bases["sd15"], pictures, steps=1, prior_data=str(prior), prior_prompt="a red star", prior_images=2
    )
    told = []
    losses_of(spec, tmp_path / "lora.safetensors", tell=told.append)
    assert told == ["drawing class picture 1 of 2", "drawing class picture 2 of 2"]
    drawn = sorted(prior.iterdir())
    assert [path.name for path in drawn] == ["class-0000.png", "class-0001.png"]
    pipe = DiffusionPipeline.from_pretrained(bases["sd15"])
    theirs = pipe("a red star", generator=torch.Generator().manual_seed(spec.seed + 1)).images[0]
    assert np.abs(np.asarray(Image.open(drawn[1]), int) - np.asarray(theirs, int)).max() <= 1
    losses_of(spec, tmp_path / "again.safetensors", tell=told.append)
    assert len(told) == 2  # there is none missing
    first, second = (path.read_bytes() for path in drawn)
    drawn[0].unlink()
    losses_of(spec, tmp_path / "third.safetensors", tell=told.append)
    assert [path.read_bytes() for path in sorted(prior.iterdir())] == [first, second]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": "every"}, "unknown modules 'every'"),
        ({"prior_weight": 0.0}, "prior-weight must be"),
        ({"prior_weight": float("nan")}, "prior-weight must be"),
        ({"snr_gamma": 0.0}, "snr-gamma must be"),
        ({"snr_gamma": float("inf")}, "snr-gamma must be"),
        ({"prior_images": -1}, "prior-images must be"),
        ({"prior_prompt": "a dog"}, "need a folder"),
        ({"prior_images": 3}, "need a folder"),
        ({"prior_images": 3, "prior_data": "prior"}, "nothing says what to draw"),
        ({"prompt": " "}, "prompt is empty"),
        ({"rank": 0}, "rank must be"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UsageError, match=message):
        settings_for("base", "data", **changes)


def test_bad_folders(bases, pictures, tmp_path):
    out = tmp_path / "lora.safetensors"
    with pytest.raises(LcmCompileError, match="4 of 4 pictures have no caption"):
        train_lora(settings_for(bases["sd15"], pictures, prompt=None), out)
    with pytest.raises(UsageError, match="--prior-data missing does not exist"):
        train_lora(settings_for(bases["sd15"], pictures, prior_data="missing"), out)
    with pytest.raises(UsageError, match="no pictures to train on"):
        train_lora(StyleSpec(str(bases["sd15"])), out)
    with pytest.raises(UsageError, match=r"not a .safetensors file"):
        train_lora(settings_for(bases["sd15"], pictures), tmp_path / "lora")


def test_an_lcm_is_no_base(bases, pictures, tmp_path):
    path = shutil.copytree(bases["sd15"], tmp_path / "base") / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time_cond_proj_dim": 256}))
    with pytest.raises(CheckpointError, match="is an LCM"):
        train_lora(settings_for(tmp_path / "base", pictures), tmp_path / "lora.safetensors")
