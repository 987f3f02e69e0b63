"""Distillation of a LoRA: what is trained, the files it writes, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import fuse_loras, load_modules
from references import in_numpy, reference_step, with_lora
from runs import PIPELINES, losses_of, settings_for

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.errors import CheckpointError, LcmCompileError, UsageError
from lcm_compile.lora.merge import match_layers
from lcm_compile.lora.read import read_lora
from lcm_compile.spec import LoraSpec
from lcm_compile.system import files
from lcm_compile.training import data, distill
from lcm_compile.training.adapters import (
    ADAPTED,
    add_lora,
    kohya_tensors,
    predict_with,
    predict_without_lora,
    save_lora,
    trained,
)
from lcm_compile.training.encode import Encoder
from lcm_compile.training.spec import Machine
from lcm_compile.training.state import state_path

CPU = Machine(torch.device("cpu"))


def test_three_networks_in_one_unet(bases, tmp_path):
    unet = load_component(open_checkpoint(str(bases["sd15"])), "unet")
    inputs = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([19, 999]),
        {"encoder_hidden_states": torch.randn(2, 77, 32)},
    )
    with torch.no_grad(), CPU.attention():
        plain = unet(*inputs[:2], inputs[2]["encoder_hidden_states"]).sample
        add_lora(unet, 2, ADAPTED, seed=0)
        student = trained(unet)
        torch.testing.assert_close(predict_with(unet, CPU)(*inputs), plain, rtol=0, atol=0)
        other = {name: (torch.randn_like(weight) * 0.1).half().float() for name, weight in student.items()}
        target = predict_with(unet, CPU, other)(*inputs)
        for name, weight in student.items():
            weight.copy_(other[name])
        torch.testing.assert_close(predict_with(unet, CPU)(*inputs), target, rtol=0, atol=0)
        torch.testing.assert_close(predict_without_lora(unet, CPU)(*inputs), plain, rtol=0, atol=0)
    assert not torch.allclose(target, plain, atol=1e-3)
    # What is trained is what the file holds.
    save_lora(kohya_tensors(other), tmp_path / "lora.safetensors", {})
    fused = load_component(open_checkpoint(str(bases["sd15"])), "unet")
    fuse_loras({"unet": fused}, [(read_lora(tmp_path / "lora.safetensors"), LoraSpec("lora"))])
    with torch.no_grad():
        torch.testing.assert_close(predict_with(fused, CPU)(*inputs), target, rtol=1e-4, atol=1e-4)
    assert [name for name, p in unet.named_parameters() if p.requires_grad] == list(student)


@pytest.mark.parametrize(("kind", "prediction"), [("sdxl", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("method", ["lcm", "tcd"])
def test_a_step_is_the_papers(kind, prediction, method, bases, tmp_path):
    """The second step's loss, with the adapters that were kept after the first."""
    spec = settings_for(bases[kind], steps=2, save_every=1, method=method)
    steps = distill.distill(spec, tmp_path / "lora.safetensors")
    next(steps)
    state = torch.load(state_path(tmp_path / "lora.safetensors"), weights_only=True)
    loss = next(steps).loss
    pipe = PIPELINES["sdxl" if kind == "sdxl" else "sd15"].from_pretrained(bases[kind])
    weights = state["weights"], state["means"]["target"]
    student, target = (in_numpy(with_lora(copy.deepcopy(pipe.unet), adapters)) for adapters in weights)
    networks = student, target, in_numpy(pipe.unet)
    expected = reference_step(pipe, spec, range(2, 4), lambda w: networks, prediction)
    assert loss == pytest.approx(expected, rel=1e-3)


# The file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_file_fits_lcm_compile_and_diffusers(kind, bases, tmp_path):
    out = tmp_path / "lora.safetensors"
    losses_of(settings_for(bases[kind]), out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    checkpoint = open_checkpoint(str(bases[kind]))
    modules, lora = load_modules(checkpoint), read_lora(out)
    adapted = {m for m in modules.unet.state_dict() if m.removesuffix(".weight").endswith(ADAPTED)}
    matched = match_layers(lora, modules.named())
    assert len(matched) == len(adapted) - sum(m.endswith(".bias") for m in adapted)
    assert {
        (layer.component, layer.update.alpha, layer.update.factors["down"].dtype) for layer, _ in matched
    } == {("unet", 2.0, torch.float16)}
    fuse_loras(modules.named(), [(lora, LoraSpec(str(out)))])
    pipe = PIPELINES[kind].from_pretrained(bases[kind])
    condition = Encoder(checkpoint, CPU.device).prompts(["a red star"])
    hidden = condition.pop("encoder_hidden_states")
    inputs = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 499, hidden

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
        losses_of(settings_for(bases["sd15"], steps=2, seed=seed), files[name])
    assert files["one"].read_bytes() == files["again"].read_bytes()
    assert files["one"].read_bytes() != files["other"].read_bytes()


def test_one_batch_is_learnt(bases, tmp_path, monkeypatch):
    """With the same pictures, noise and timesteps at every step the loss must fall, and steadily."""
    for module in (distill, data):
        monkeypatch.setattr(
            module, "generator", lambda kind, seed, n: np.random.default_rng([kind, 1, n % 4])
        )
    spec = settings_for(bases["sdxl"], batch=4, rank=4, lr=1e-3, steps=14, guidance_min=1, guidance_max=3)
    losses = losses_of(spec, tmp_path / "lora.safetensors")
    assert losses[-1] < 0.75 * losses[0]
    assert sum(b < a for a, b in itertools.pairwise(losses)) > 10


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
        losses_of(settings_for(bases["sd15"], steps=1), tmp_path / "lora.safetensors")
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
        ({"gradient_accumulation": 0}, "gradient-accumulation must be"),
        ({"save_every": 0}, "save-every must be"),
        ({"ema": 1.0}, "ema must be"),
        ({"mixed_precision": "fp8"}, "unknown mixed precision"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UsageError, match=message):
        settings_for("base", **changes)


def test_bad_out(bases, tmp_path, monkeypatch):
    spec = settings_for(bases["sd15"])
    with pytest.raises(UsageError, match="no pictures"):
        distill.distill(settings_for(bases["sd15"], data=None), tmp_path / "lora.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for out, message in (
        ("lora.bin", "not a .safetensors file"),
        ("folder.safetensors", "is a folder"),
        ("missing/lora.safetensors", "does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            distill.distill(spec, tmp_path / out)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "access", lambda *_: False)
        with pytest.raises(UsageError, match="can't be written"):
            distill.distill(spec, tmp_path / "lora.safetensors")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(LcmCompileError, match="MB free"):
        next(distill.distill(spec, tmp_path / "lora.safetensors"))


def test_bad_bases(bases, tmp_path):
    out = tmp_path / "lora.safetensors"
    with pytest.raises(UsageError, match="skip 30 does not divide"):
        distill.distill(settings_for(bases["sd15"], skip=30), out)
    path = shutil.copytree(bases["sd15"], tmp_path / "base") / "unet" / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"time_cond_proj_dim": 256}, "LCM already"),
        ({"in_channels": 9}, "inpainting model"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            distill.distill(settings_for(path.parent.parent), out)


@pytest.mark.parametrize(("steps", "message"), [(5, "no longer finite"), (1, "exceed half precision")])
def test_a_training_that_explodes_ends(steps, message, bases, tmp_path):
    with pytest.raises(LcmCompileError, match=message):
        losses_of(settings_for(bases["sd15"], lr=1e30, steps=steps), tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    rates = [distill.rate(step, 1000) for step in range(1, 1001)]
    assert rates[0] == 0.01
    assert all(rate == 1.0 for rate in rates[99:700])
    assert rates[700:] == sorted(rates[700:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert distill.rate(1, 1) == 1.0
