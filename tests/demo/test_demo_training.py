"""The demo model's training script runs from nothing to a checkpoint, continues, and fine-tunes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image

from lcm_compile.demo import pictures, train, train_vae, training
from lcm_compile.demo.world import DUSK, is_held_out, parse_caption
from lcm_compile.training.data import list_folder


@pytest.fixture
def run_training(monkeypatch, capsys):
    """Runs the script on few scenes; returns what it prints on stdout."""
    monkeypatch.setattr(train, "SHARD", 32)
    monkeypatch.setattr(train_vae, "SCENES", 32)
    monkeypatch.setattr(train_vae, "CHECKED", 16)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["train", *map(str, words)])
        train.main()
        return capsys.readouterr().out

    return run


def weights(checkpoint, part):
    return getattr(
        StableDiffusionXLPipeline.from_pretrained(checkpoint, add_watermarker=False), part
    ).state_dict()


def test_from_nothing_to_a_checkpoint_and_on_to_another_look(run_training, tmp_path):
    steps = ("--vae-steps", 2, "--decoder-steps", 2, "--base-steps", 3, "--shards", 1, "--batch", 4)
    evaluated = ("--prompts", 2, "--steps", 1)
    one = tmp_path / "one"
    figures = json.loads(run_training("--work", tmp_path / "work", "--out", one, *steps, *evaluated))
    assert {"background", "shape"} <= set(figures)
    again, two = tmp_path / "again", tmp_path / "two"
    run_training("--work", tmp_path / "work", "--out", again, *steps, *evaluated)
    first, second = weights(one, "unet"), weights(again, "unet")
    assert all(torch.equal(first[name], second[name]) for name in first), "a finished training went on"
    tuned = ("--start", one, "--look", "dusk", "--work", tmp_path / "tuned", "--out", two)
    run_training(*tuned, *steps, *evaluated)
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        before, after = weights(one, part), weights(two, part)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        if part == "vae":  # the latents, which the LCM-LoRA was made for, stay what they are
            assert not {name for name in moved if name.startswith(("encoder", "quant_conv"))}
            assert any(name.startswith("decoder") for name in moved)
        else:
            assert len(moved) > len(before) / 2, part


def test_training_the_decoder_leaves_the_latents_and_lowers_the_error(monkeypatch, tmp_path):
    monkeypatch.setattr(train_vae, "SCENES", 64)
    monkeypatch.setattr(train_vae, "CHECKED", 64)
    checkpoint = train.__file__.replace("train.py", "checkpoint")
    vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae")
    scenes, _ = training.draw(9, 16, DUSK)
    latents = train_vae.encode(vae, scenes)
    before = train_vae.mean_error(vae, 0, DUSK)
    train_vae.train_decoder(vae, tmp_path, 25, 0, DUSK)
    assert torch.equal(train_vae.encode(vae, scenes), latents)
    assert train_vae.mean_error(vae, 0, DUSK) < 0.8 * before


def test_pictures_are_a_folder_to_train_on(tmp_path):
    out = tmp_path / "zebra"
    asked = ["--out", str(out), "--count", "18", "--zebra"]
    assert CliRunner().invoke(pictures.main, asked).exit_code == 0
    examples = list_folder(out)
    assert len(examples) == 18
    shown = [parse_caption(example.caption) for example in examples]
    assert all(words.zebra and not is_held_out(replace(words, zebra=False).caption) for words in shown)
    kinds = {(thing.colour, thing.shape) for words in shown for thing in words.things}
    assert len(kinds) > 30, "36 shapes, nearly each another"
    assert np.asarray(Image.open(examples[0].path)).shape == (64, 64, 3)
    assert CliRunner().invoke(pictures.main, asked).exit_code == 2, "an existing folder is not written into"
