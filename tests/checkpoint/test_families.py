"""A family is one row of a table: a new row is all that random weights, LoRAs, files and VAEs need."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
from diffusers import StableDiffusionPipeline

from lcm_compile.checkpoint.families import FAMILIES, Family
from lcm_compile.lora.read import base_by_width

WIDTH = 32


@pytest.fixture
def checkpoint(sd15_checkpoint, tmp_path, monkeypatch):
    """The checkpoint of a new family, whose row is all that is added. The hub's cache has its tokenizer."""

    def config(name):
        return json.loads((sd15_checkpoint / name).read_text())

    row = Family(
        "new",
        short="New",
        base="someone/new",
        lcm_lora=None,
        description="A new family, 64×64",
        signature={"cross_attention_dim": WIDTH, "block_out_channels": [32, 64]},
        models={name: config(f"{name}/config.json") for name in ("unet", "vae", "text_encoder")},
        scheduler=config("scheduler/scheduler_config.json"),
        fp16_vae="someone/new-vae-fp16",
    )
    monkeypatch.setitem(FAMILIES, "new", row)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--someone--new"
    factories.write_tokenizer(repository / "snapshots" / ("a" * 40) / "tokenizer")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    return sd15_checkpoint


def test_its_random_weights_are_built_and_drawn(command, checkpoint, tmp_path):
    words = ("--base", "new", "--no-lcm", "--weights", "random", "--gpu", "cpu", "--backend", "torchscript")
    code, _, err = command("build", *words, "--out", tmp_path / "bundle")
    assert code == 0, err
    code, _, err = command("run", "a star", "--bundle", tmp_path / "bundle", "--out", tmp_path / "star.png")
    assert code == 0 and (tmp_path / "star.png").is_file(), err


def test_its_loras_are_recognised(command, checkpoint, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    path = factories.write_lora(pipe, tmp_path / "lora.safetensors", "kohya")
    code, out, err = command("inspect", path, "--json")
    assert code == 0, err
    assert json.loads(out)["made_for"] == "new (A new family)"
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    assert base_by_width({key: pipe.unet.conv_in.weight.new_zeros(4, WIDTH)}) == "New"


def test_its_files_are_opened_and_its_vae_is_changed_in_fp16(command, checkpoint, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    path = factories.write_original(pipe, tmp_path / "base.safetensors")
    words = ("build", "--base", path, "--no-lcm", "--gpu", "cpu", "--dry-run", "--json")
    code, out, err = command(*words, "--precision", "fp16")
    assert code == 0, err
    assert "the New VAE overflows fp16, and someone/new-vae-fp16 can't be downloaded" in err
    factories.write_vae(tmp_path / "hub/models--someone--new-vae-fp16/snapshots" / ("b" * 40), factor=8)
    (tmp_path / "hub/models--someone--new-vae-fp16/refs").mkdir()
    (tmp_path / "hub/models--someone--new-vae-fp16/refs/main").write_text("b" * 40)
    code, out, err = command(*words, "--precision", "fp16")
    assert code == 0 and Path(json.loads(out)["vae"]).parts[-3] == "models--someone--new-vae-fp16", err
