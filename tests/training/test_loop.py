"""The training loop: what a step takes, what is averaged, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from diffusers.training_utils import EMAModel
from runs import losses_of, settings_for, write_pictures
from safetensors.torch import load_file

from lcm_compile.errors import LcmCompileError, UsageError
from lcm_compile.training import distill
from lcm_compile.training.loop import train
from lcm_compile.training.spec import Machine, TrainSpec
from lcm_compile.training.state import State, state_path


def difference(one, other) -> float:
    """How far apart two files' weights are, as a part of them."""
    ours, theirs = (torch.cat([t.double().flatten() for t in load_file(p).values()]) for p in (one, other))
    return float((ours - theirs).norm() / theirs.norm())


def saved_states(spec, out):
    """What is kept after every step but the last."""
    for progress in distill.distill(spec, out):
        if progress.step < progress.total:
            yield torch.load(state_path(out), weights_only=True)


# Equal trainings ----------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_batch(bases, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    whole = losses_of(settings_for(bases["sd15"], batch=4, lr=1e-3), one)
    parts = losses_of(settings_for(bases["sd15"], batch=2, gradient_accumulation=2, lr=1e-3), two)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert difference(one, two) < 1e-3
    other = losses_of(settings_for(bases["sd15"], batch=2, lr=1e-3), tmp_path / "other.safetensors")
    assert other[0] != pytest.approx(whole[0], rel=1e-3)


def test_checkpointed_gradients_are_the_gradients(bases, tmp_path):
    """With fewer activations kept for the backward pass."""
    kept, losses = {}, {}
    for checkpointing in (False, True):
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        spec = settings_for(bases["sdxl"], steps=2, gradient_checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses[checkpointing] = losses_of(spec, tmp_path / f"{checkpointing}.safetensors")
        kept[checkpointing] = sum(sizes)
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
    assert difference(tmp_path / "True.safetensors", tmp_path / "False.safetensors") < 1e-3
    assert kept[True] < 0.6 * kept[False]


def test_bf16_is_near_fp32(bases, tmp_path):
    exact = losses_of(settings_for(bases["sd15"], lr=1e-4), tmp_path / "exact.safetensors")
    spec = settings_for(bases["sd15"], lr=1e-4, mixed_precision="bf16")
    rough = losses_of(spec, tmp_path / "rough.safetensors")
    assert rough == pytest.approx(exact, rel=0.05)
    assert rough != exact


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is for GPUs")
def test_fp16_needs_a_gpu(bases, tmp_path):
    with pytest.raises(UsageError, match="fp16 trains on a GPU only") as caught:
        distill.distill(settings_for(bases["sd15"], mixed_precision="fp16"), tmp_path / "lora.safetensors")
    assert caught.value.hint


def test_fp16_scales_the_loss_and_skips_what_overflows(tmp_path):
    """On a loss so steep that 65536 times its gradient is infinite, as the scaler starts with."""
    weights = {"w": torch.nn.Parameter(torch.tensor(1.0))}
    spec = TrainSpec("base", steps=4, lr=0.1)
    state = State(tmp_path / "state", {}, None)
    half = Machine(torch.device("cpu"), torch.float16)
    kept, losses = [], []
    for progress in train(spec, half, weights, {}, lambda _: weights["w"] ** 2 * 5e33, lambda *_: 1.0, state):
        kept.append(weights["w"].item())
        losses.append(progress.loss)
    assert kept[0] == 1.0 and losses[1] == losses[0]
    assert kept[-1] < 0.95 and losses[-1] < losses[0]


# Running means ------------------------------------------------------------------------------------------


def test_target_trails_the_student(bases, tmp_path):
    spec = settings_for(bases["sd15"], steps=4, save_every=1)
    first, *later = saved_states(spec, tmp_path / "lora.safetensors")
    expected = first["means"]["target"]
    assert any(not torch.equal(expected[name], first["weights"][name]) for name in expected)
    for state in later:
        expected = {name: 0.95 * expected[name] + 0.05 * state["weights"][name] for name in expected}
        torch.testing.assert_close(state["means"]["target"], expected)
        # or every step would hang on to the ones before it
        assert not any(weight.requires_grad for weight in state["means"]["target"].values())


def test_ema_is_diffusers_and_is_what_is_written(bases, tmp_path):
    spec = settings_for(bases["sd15"], steps=6, save_every=1, ema=0.3)
    plain, averaged = tmp_path / "plain.safetensors", tmp_path / "averaged.safetensors"
    states = list(saved_states(spec, averaged))
    reference = EMAModel([torch.zeros_like(w) for w in states[0]["weights"].values()], decay=0.3)
    for state in states:
        reference.step(list(state["weights"].values()))
        ours = list(state["means"]["ema"].values())
        torch.testing.assert_close(ours, list(reference.shadow_params))
    losses_of(settings_for(bases["sd15"], steps=6), plain)
    # The last step's own weights are in the other file.
    last = load_file(plain)
    written, before = load_file(averaged), states[-1]["means"]["ema"]
    for name, ema in before.items():
        module, _, side = name.removesuffix(".default.weight").rpartition(".")
        key = f"lora_unet_{module.replace('.', '_')}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"
        torch.testing.assert_close(
            written[key].float(), 0.3 * ema + 0.7 * last[key].float(), rtol=2e-3, atol=1e-5
        )


# Kills and resumes --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from runs import settings_for
from lcm_compile.training.distill import distill

base, out = sys.argv[1:]
for progress in distill(settings_for(base, steps=8, save_every=3, ema=0.9), Path(out)):
    if progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_training_goes_on(bases, tmp_path, request):
    spec = settings_for(bases["sd15"], steps=8, save_every=3, ema=0.9)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    losses = losses_of(spec, whole)
    paths = os.pathsep.join([str(request.path.parent), str(request.path.parent.parent)])
    words = [sys.executable, "-c", KILLED, str(bases["sd15"]), str(out)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir() if path != whole] == [state_path(out).name]
    progress = list(distill.distill(spec, out, resume=True))
    assert [p.step for p in progress] == [4, 5, 6, 7, 8]  # from step 3 on, the last that was kept
    assert progress[-1].losses == losses
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, whole.name]


@pytest.fixture
def unfinished(bases, tmp_path):
    """A training that was stopped after two of its three steps: its settings and its output."""
    out = tmp_path / "lora.safetensors"
    pictures = write_pictures(tmp_path / "pictures", 3)
    spec = settings_for(bases["sd15"], data=str(pictures), save_every=1)
    steps = distill.distill(spec, out)
    next(steps), next(steps)
    steps.close()
    return spec, out


def changed(spec, **changes):
    return type(spec)(**{**vars(spec), **changes})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lr": 0.5}, "lr"),
        ({"steps": 4}, "steps"),
        ({"seed": 4}, "seed"),
        ({"rank": 3}, "rank"),
        ({"ema": 0.5}, "ema"),
        ({"batch": 1}, "pictures a step"),
        ({"guidance_max": 4.0}, "guidance_max"),
        ({"data": "demo"}, "data"),
        ({"mixed_precision": "bf16"}, "mixed_precision"),
    ],
)
def test_another_training_is_not_resumed(changes, name, unfinished):
    spec, out = unfinished
    with pytest.raises(UsageError, match=f"its {name} was") as caught:
        distill.distill(changed(spec, **changes), out, resume=True)
    assert caught.value.hint and state_path(out).is_file()


def test_a_changed_base_or_folder_is_not_resumed(unfinished, bases, tmp_path):
    spec, out = unfinished
    with pytest.raises(UsageError, match="its base was"):
        distill.distill(changed(spec, base=str(bases["v"])), out, resume=True)
    (tmp_path / "pictures" / "0.txt").write_text("something else")
    with pytest.raises(UsageError, match="its data was"):
        distill.distill(spec, out, resume=True)


def test_what_does_not_shape_the_curve_may_change(unfinished):
    spec, out = unfinished
    other = changed(spec, batch=1, gradient_accumulation=2, gradient_checkpointing=True, save_every=9)
    assert [p.step for p in distill.distill(other, out, resume=True)] == [3]


def test_an_unfinished_training_is_not_thrown_away(unfinished):
    spec, out = unfinished
    before = state_path(out).read_bytes()
    with pytest.raises(UsageError, match="unfinished training") as caught:
        distill.distill(spec, out)
    assert "--resume" in caught.value.hint
    assert state_path(out).read_bytes() == before


def test_nothing_to_resume(bases, tmp_path):
    with pytest.raises(UsageError, match="nothing to resume"):
        distill.distill(settings_for(bases["sd15"]), tmp_path / "lora.safetensors", resume=True)


@pytest.mark.parametrize("damage", ["cut", "pickle", "empty"])
def test_a_damaged_state(damage, unfinished):
    spec, out = unfinished
    path = state_path(out)
    whole = path.read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "pickle": b"cos\nsystem\n(S'true'\ntR.", "empty": b""}
    path.write_bytes(damaged[damage])
    with pytest.raises(LcmCompileError, match="can't be read") as caught:
        distill.distill(spec, out, resume=True)
    assert caught.value.hint


def test_a_state_that_cannot_be_written_leaves_the_last(bases, tmp_path, monkeypatch):
    out = tmp_path / "lora.safetensors"
    steps = distill.distill(settings_for(bases["sd15"], save_every=1), out)
    next(steps)
    before = state_path(out).read_bytes()

    def full(data, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LcmCompileError, match="can't be written"):
        next(steps)
    assert [path.name for path in tmp_path.iterdir()] == [state_path(out).name]
    assert state_path(out).read_bytes() == before


# Several processes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(bases, tmp_path):
    def words(out, batch):
        options = f"--data demo --steps 3 --rank 2 --lr 1e-3 --batch {batch} --save-every 1 --json"
        return ["distill", "--base", str(bases["sd15"]), "--out", str(out), *options.split()]

    def run(*command):
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return json.loads(done.stdout)["loss"]

    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    # What `accelerate launch` starts on several GPUs; on CPUs it would want an MPI.
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lcm_compile"]
    shared = run(*launch, *words(two, 2))
    alone = run("lcm_compile", *words(one, 4))
    assert shared == pytest.approx(alone, rel=1e-5)
    assert difference(one, two) < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == [one.name, two.name]
