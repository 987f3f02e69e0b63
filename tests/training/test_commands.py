"""distill and train-lora as people type them."""

from __future__ import annotations

import json
import shlex

import pytest
from runs import write_pictures

from lcm_compile.lora.read import read_lora
from lcm_compile.training import distill
from lcm_compile.training.state import state_path


def test_distill(command, bases, tmp_path):
    out = tmp_path / "lcm.safetensors"
    options = ("distill", "--base", bases["sd15"], "--data", "demo", "--rank", 2, "--batch", 1, "--steps", 2)
    code, told, err = command(*options, "--out", out)
    assert (code, told.strip()) == (0, str(out))
    assert f"lcm-compile build --base {bases['sd15']} --gpu cpu --lcm-lora {out}" in err
    code, told, err = command(*options, "--out", out, "--json", "--quiet")
    data = json.loads(told)
    assert (code, err, data["lcm_lora"], data["steps"], len(data["loss"])) == (0, "", str(out), 2, 2)


def test_distill_by_tcd(command, bases, tmp_path):
    out = tmp_path / "tcd.safetensors"
    options = ("distill", "--base", bases["sd15"], "--data", "demo", "--rank", 2, "--batch", 1, "--steps", 1)
    code, told, err = command(*options, "--method", "tcd", "--out", out)
    assert (code, told.strip()) == (0, str(out))
    assert f"build --base {bases['sd15']} --gpu cpu --few-step tcd --few-step-lora {out}" in err
    assert json.loads(read_lora(out).metadata["lcm_compile"])["method"] == "tcd"


def test_train_lora(command, bases, tmp_path):
    out, pictures = tmp_path / "style.safetensors", write_pictures(tmp_path / "pictures", 2, captions=False)
    options = ("train-lora", "--base", bases["sd15"], "--data", pictures, "--steps", 2)
    code, told, err = command(*options, "--prompt", "a photo of sks dog", "--out", out)
    assert (code, told.strip()) == (0, str(out))
    assert f"--lora {out}" in err
    code, _, err = command(*options, "--out", out)
    assert code == 1 and "no caption" in err


def test_whole_lcm_is_built_by_the_hint(command, bases, tmp_path):
    out = tmp_path / "lcm"
    _, told, err = command(
        *("distill", "--base", bases["sd15"], "--data", "demo", "--full", "--batch", 1, "--steps", 1),
        *("--out", out),
    )
    assert told.strip() == str(out)
    hint = shlex.split(err.strip().splitlines()[-1])
    code, told, _ = command(*hint[1:], "--backend", "torchscript", "--dry-run")
    assert code == 0 and told


@pytest.mark.parametrize(
    ("words", "trainable", "modules"),
    [
        (("distill", "--base", "sd15"), 67_252_224, 278),
        (("distill", "--base", "sd15", "--full"), 859_520_964 + 256 * 320, 0),
        (("train-lora", "--base", "sdxl"), 5_806_080, 560),
    ],
)
def test_dry_run(words, trainable, modules, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, told, _ = command(*words, "--dry-run", "--json")
    data = json.loads(told)
    assert (code, data["trainable_parameters"], data["modules"]) == (0, trainable, modules)
    _, told, _ = command(*words, "--dry-run")
    assert f"{trainable / 1e6:.1f} M trainable parameters" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["distill", "train-lora"])
def test_out_is_needed_to_train(verb, refused):
    refused(2, "--out", verb, "--base", "demo")


def test_interrupted_after_a_save(command, bases, tmp_path, monkeypatch):
    """As by Ctrl-C in the second step; then the same words with --resume."""
    out = tmp_path / "lcm.safetensors"
    draw = distill.draw

    def interrupted(spec, numbers, *rest):
        if 1 in numbers:
            raise KeyboardInterrupt
        return draw(spec, numbers, *rest)

    monkeypatch.setattr(distill, "draw", interrupted)
    words = ["distill", "--base", bases["sd15"], "--data", "demo", "--rank", 2, "--batch", 1, "--steps", 2]
    code, told, err = command(*words, "--out", out)
    assert (code, told) == (130, "") and "nothing was written" in err
    code, told, err = command(*words, "--out", out, "--save-every", 1)
    assert (code, told) == (130, "") and str(state_path(out)) in err and "--resume" in err
    monkeypatch.setattr(distill, "draw", draw)
    code, told, _ = command(*words, "--out", out, "--save-every", 1, "--resume", "--json")
    assert code == 0 and len(json.loads(told)["loss"]) == 2
