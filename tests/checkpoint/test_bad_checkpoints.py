"""Folders that are no base: each refusal names the very file, before anything is written."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.errors import CheckpointError

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


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "two.safetensors"}}', "{}", '{"weight_map": [1]}'])
def test_with_a_shard_missing(refuse, base, index):
    (base / UNET).unlink()
    (base / f"{UNET}.index.json").write_text(index)
    refuse([base / "unet", "lacks the weight files"])


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def truncated_early(path):
    path.write_bytes(path.read_bytes()[:1000])


def garbage(path):
    path.write_bytes(bytes(range(256)) * 8)


def without_a_weight(path):
    save_file({k: v for k, v in load_file(path).items() if k != "conv_in.weight"}, path, {"format": "pt"})


def misshapen(path):
    tensors = load_file(path)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3].contiguous()
    save_file(tensors, path, {"format": "pt"})


def under_another_name(path):
    tensors = load_file(path)
    path.unlink()  # the tensors are mapped from the file
    torch.save(tensors, path)


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def web_page(path):
    path.write_text("<!DOCTYPE html><html></html>")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncated, ["bytes", "download it again"]),
        (truncated_early, ["within its header", "download it again"]),
        (empty, ["is empty", "download it again"]),
        (garbage, "no whole safetensors file"),
        (under_another_name, "it is a pickle"),
        (pointer, "git lfs pull"),
        (web_page, "a web page"),
        (without_a_weight, ["lacks 1 weights (conv_in.weight)", "saved together"]),
        (misshapen, ["has another shape of 1 weights (conv_in.weight)", "saved together"]),
    ],
)
def test_with_damaged_weights(refuse, base, damage, told):
    damage(base / UNET)
    refuse([base / "unet", *([told] if isinstance(told, str) else told)])


UNET_QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
STRAY = [
    (UNET, f"{UNET_QUERY}.to_q.lora_layer.down.weight"),
    (UNET, f"{UNET_QUERY}.processor.to_q_lora.down.weight"),
    (UNET, "time_embedding.cond_proj.weight"),
    ("text_encoder/model.safetensors", "encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"),
    ("text_encoder_2/model.safetensors", "text_model.encoder.layers.9.mlp.fc1.bias"),
    ("vae/diffusion_pytorch_model.safetensors", "decoder.mid_block.attentions.0.to_q.lora_A.weight"),
]


@pytest.mark.parametrize(("file", "key"), STRAY)
@pytest.mark.parametrize("pickled", [False, True])
def test_with_a_weight_that_its_config_has_no_place_for(base, file, key, pickled):
    path = base / file
    tensors = load_file(path) | {key: torch.ones(4, 4)}
    path.unlink()
    if pickled:
        stem = path.stem.replace("model", "pytorch_model") if path.stem == "model" else path.stem
        torch.save(tensors, path.with_name(f"{stem}.bin"))
    else:
        save_file(tensors, path)
    with pytest.raises(CheckpointError, match=re.escape(f"has no place for 1 weights ({key})")):
        load_component(open_checkpoint(str(base)), path.parent.name)


def test_what_computes_nothing_beside_a_text_encoder_is_no_stray(base):
    """What old versions of transformers and ComfyUI save with it."""
    for name in ("text_encoder", "text_encoder_2"):
        path = base / name / "model.safetensors"
        tensors = load_file(path)
        extra = {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(())}
        path.unlink()
        save_file({"text_projection.weight": torch.ones(3, 3)} | extra | tensors, path)
        module = load_component(open_checkpoint(str(base)), name)
        assert all(torch.equal(weight, tensors[key]) for key, weight in module.state_dict().items())


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
        ("unet", "in_channels", 8),
        ("unet", "cross_attention_dim", -1),
        ("unet", "block_out_channels", "wide"),
        ("vae", "block_out_channels", []),
        ("vae", "scaling_factor", "0.18215"),
        ("vae", "scaling_factor", 0),
        ("text_encoder_2", "projection_dim", 1.5),
        ("text_encoder", "hidden_size", "x"),
        ("scheduler", "prediction_type", "flow"),
        ("scheduler", "num_train_timesteps", "1000"),
        ("scheduler", "num_train_timesteps", 10),
        ("scheduler", "beta_start", -0.5),
        ("scheduler", "trained_betas", [0.1]),
        ("scheduler", "thresholding", "yes"),
        ("scheduler", "dynamic_thresholding_ratio", 2),
    ],
)
def test_with_a_senseless_setting(refuse, base, file, setting, value):
    change_json(
        base / file / ("scheduler_config.json" if file == "scheduler" else "config.json"), **{setting: value}
    )
    refuse([base, file])


def test_a_safety_checker_is_left_out_with_a_note(command, base, tmp_path):
    change_json(
        base / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]
    )
    for words in (("build", "--gpu", "cpu", "--dry-run"), ("fuse", "--out", tmp_path / "fused")):
        code, _, err = command(*words, "--base", base, "--no-lcm")
        assert code == 0 and err.count("safety checker is left out") == 1, err
    change_json(base / "model_index.json", safety_checker=[None, None])
    assert (
        "safety checker" not in command("build", "--gpu", "cpu", "--dry-run", "--base", base, "--no-lcm")[2]
    )
