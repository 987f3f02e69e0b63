"""Folders that are no base: each refusal names the very file, before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def base(sdxl_checkpoint, tmp_path):
    return shutil.copytree(sdxl_checkpoint, tmp_path / "base")


@pytest.fixture
def refuse(refused, base, tmp_path):
    """Builds from `base`, which must be refused."""

    def run(told, code=1):
        out = tmp_path / "out" / "bundle"
        refused(code, told, "build", "--base", base, "--gpu", "cpu", "--no-lcm", "--out", out)
        assert not out.parent.exists() or list(out.parent.iterdir()) == []

    return run


def change_json(path, **settings):
    data = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def test_an_empty_folder(refuse, base):
    shutil.rmtree(base)
    base.mkdir()
    refuse([base, "model_index.json", "save_pretrained"])


def test_a_file(refuse, base):
    shutil.rmtree(base)
    base.write_text("weights")
    refuse([base, "no whole safetensors file"])


def test_of_another_kind(refuse, base):
    change_json(base / "model_index.json", unet=None, _class_name="FluxPipeline")
    refuse(["FluxPipeline", "no unet"])


@pytest.mark.parametrize("entry", [[], [None, None], {}, "unet"])
def test_a_component_that_is_not_there(refuse, base, entry):
    change_json(base / "model_index.json", unet=entry)
    refuse("no unet")


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_without_weights(refuse, base, name):
    next((base / name).glob("*.safetensors")).unlink()
    refuse([base / name, "has no weights", "safetensors"])


def test_with_pickles_only(refuse, base, tmp_path):
    """Even where opening the pickle would do nothing but load."""
    weights = load_file(base / UNET)
    (base / UNET).unlink()
    torch.save(weights, base / "unet/diffusion_pytorch_model.bin")
    refuse(["diffusion_pytorch_model.bin", "pickle", "safe_serialization"])


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "two.safetensors"}}', "{}", '{"weight_map": [1]}'])
def test_with_a_shard_missing(refuse, base, index):
    (base / UNET).unlink()
    (base / f"{UNET}.index.json").write_text(index)
    refuse([base / "unet", "lacks the weight files"])


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(bytes(range(256)) * 8)


def without_a_weight(path):
    save_file({k: v for k, v in load_file(path).items() if k != "conv_in.weight"}, path, {"format": "pt"})


def misshapen(path):
    tensors = load_file(path)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3].contiguous()
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("damage", [truncated, empty, garbage, without_a_weight, misshapen])
def test_with_damaged_weights(refuse, base, damage):
    damage(base / UNET)
    refuse([base / "unet", "download"])


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    ],
)
@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_with_a_damaged_config(refuse, base, file, text):
    (base / file).write_bytes(text.encode(errors="surrogateescape"))
    refuse([base / file.rpartition("/")[0]])


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2", "scheduler", "vae"])
def test_with_a_folder_missing(refuse, base, folder):
    shutil.rmtree(base / folder)
    refuse([base, folder])


@pytest.mark.parametrize(
    ("file", "setting", "value"),
    [
        ("unet", "sample_size", None),
        ("unet", "sample_size", [64]),
        ("unet", "in_channels", "4"),
        ("unet", "in_channels", 9),
        ("unet", "cross_attention_dim", -1),
        ("unet", "block_out_channels", "wide"),
        ("vae", "block_out_channels", []),
        ("text_encoder_2", "projection_dim", 1.5),
        ("text_encoder", "hidden_size", "x"),
        ("scheduler", "prediction_type", "flow"),
        ("scheduler", "num_train_timesteps", "1000"),
        ("scheduler", "num_train_timesteps", 10),
        ("scheduler", "beta_start", -0.5),
        ("scheduler", "trained_betas", [0.1]),
        ("scheduler", "thresholding", True),
    ],
)
def test_with_a_senseless_setting(refuse, base, file, setting, value):
    change_json(
        base / file / ("scheduler_config.json" if file == "scheduler" else "config.json"), **{setting: value}
    )
    refuse([base, file])
