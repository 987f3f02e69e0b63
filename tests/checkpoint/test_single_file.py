"""Bases that are one file in the original layout: the folder's pictures, and diffusers' modules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import factories
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from factories import load_modules
from original_keys import original_keys
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lcm_compile import BuildSpec, build, load
from lcm_compile.checkpoint.checkpoint import MODELS, Component
from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.tensor_stream import write_header
from lcm_compile.checkpoint.write_single_file import original_weights
from lcm_compile.errors import CheckpointError


def pipeline_of(folder):
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    return kind, kind.from_pretrained(folder, local_files_only=True)


def write_sd2(folder):
    """SD1.5's architecture with an OpenCLIP text encoder, as SD2.x has it."""
    factories.write_sd15(folder, use_linear_projection=True, prediction_type="v_prediction")
    config = CLIPTextModel.from_pretrained(folder / "text_encoder").config
    config.hidden_act = "gelu"
    factories.lively(CLIPTextModel(config), 4).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def bases(sdxl_checkpoint, sd15_checkpoint, tmp_path_factory):
    """Each architecture as a folder and as a file."""
    folder = tmp_path_factory.mktemp("originals")
    folders = {"sdxl": sdxl_checkpoint, "sd15": sd15_checkpoint, "sd2": write_sd2(folder / "sd2")}
    return {
        name: (path, factories.write_original(pipeline_of(path)[1], folder / f"{name}.safetensors"))
        for name, path in folders.items()
    }


@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd2"])
def test_the_modules_are_the_folders_and_diffusers_own(bases, name):
    folder, file = bases[name]
    kind, _ = pipeline_of(folder)
    single = kind.from_single_file(str(file), config=str(folder), local_files_only=True, safety_checker=None)
    opened = open_checkpoint(str(file), str(folder))
    assert opened.scheduler == open_checkpoint(str(folder)).scheduler
    expected = load_modules(open_checkpoint(str(folder))).named()
    modules = load_modules(opened).named()
    assert modules.keys() == expected.keys() == {n for n in MODELS if getattr(single, n, None) is not None}
    for part, module in modules.items():
        weights, theirs = module.state_dict(), getattr(single, part).state_dict()
        assert not module.training
        for key, weight in expected[part].state_dict().items():
            assert weights[key].dtype == torch.float32
            assert torch.equal(weights[key], weight) and torch.equal(weights[key], theirs[key]), (part, key)


def test_the_pictures_are_the_folders(command, bases, tmp_path):
    folder, file = bases["sdxl"]
    backend = ("--gpu", "cpu", "--backend", "torchscript", "--no-lcm")
    words = ("build", "--base", file, "--config", folder, *backend)
    assert command(*words, "--out", tmp_path / "b")[0] == 0
    assert command("build", "--base", folder, *backend, "--out", tmp_path / "of-folder")[0] == 0
    pictures = []
    for bundle in (tmp_path / "b", tmp_path / "of-folder"):
        with load(bundle) as pipeline:
            pictures.append(np.asarray(pipeline("a large red star", seed=3)[0]))
    assert np.array_equal(*pictures) and pictures[0].std() > 5
    assert command(*words, "--out", tmp_path / "b")[2].startswith("hit")
    renamed = shutil.copyfile(file, tmp_path / "other.safetensors")
    with renamed.open("r+b") as other:
        assert "hit" in command(*words[:2], renamed, *words[3:], "--out", tmp_path / "b", "--dry-run")[1]
        other.seek(-1, os.SEEK_END)
        other.write(b"\x01")
    told = command(*words[:2], renamed, *words[3:], "--out", tmp_path / "b", "--dry-run")[1]
    assert "miss" in told and "base file changed" in told


def test_half_precision_ema_and_unknown_keys(command, bases, tmp_path):
    folder, _ = bases["sd15"]
    _, pipe = pipeline_of(folder)
    extra = {
        "model_ema.decay": torch.ones(()),
        "alphas_cumprod": torch.ones(1000),
        "betas": torch.ones(1000),
        "strange.weight": torch.ones(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    file = factories.write_original(pipe, tmp_path / "half.safetensors", "fp16", **extra)
    opened = open_checkpoint(str(file), str(folder))
    assert opened.notes == ("half.safetensors: 1 keys belong to no model and are not read: strange.weight",)
    unet = load_modules(opened).unet
    assert unet.conv_in.weight.dtype == torch.float32
    assert torch.equal(unet.conv_in.weight, pipe.unet.conv_in.weight.half().float())
    words = ("build", "--base", file, "--config", folder, "--gpu", "cpu", "--no-lcm", "--dry-run")
    assert "strange.weight" in command(*words)[2]
    assert command(*words, "--quiet")[2] == ""


def test_the_demo_as_a_file_needs_no_config(tmp_path):
    """Its family is recognised, and the family's settings are at hand."""
    pipe = StableDiffusionXLPipeline.from_pretrained(FAMILIES["demo"].base, torch_dtype=torch.float32)
    opened = open_checkpoint(str(factories.write_original(pipe, tmp_path / "base.safetensors")))
    assert opened.family is FAMILIES["demo"]
    assert opened.scheduler == open_checkpoint("demo").scheduler
    assert torch.equal(load_modules(opened).unet.conv_in.weight, pipe.unet.conv_in.weight)


def write_full_size(family, path, **metadata):
    """A file with all the keys and shapes of a family's checkpoint; its weights are a hole of zeros."""
    models = FAMILIES[family].models
    shapes = {}
    for name, config in models.items():
        weights = original_weights(
            name, config, "text_encoder_2" in models, empty_module(Component(name, config))
        )
        shapes |= {key: weight.shape for key, weight in weights}
    assert sorted(shapes) == sorted(original_keys(family))
    with path.open("wb") as file:
        size = write_header(file, shapes, "fp16", metadata)
        file.truncate(file.tell() + size)
    return path


@pytest.fixture
def tokenizers(monkeypatch, tmp_path):
    """A hub cache with the tokenizers of every family, and no network."""

    def cache(family):
        name = FAMILIES[family].others or FAMILIES[family].base
        repository = tmp_path / "hf/hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("a" * 40)
        for name in ("tokenizer", "tokenizer_2"):
            factories.write_tokenizer(snapshot / name)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("a" * 40)
        return {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}

    return cache


def opened_in(environment, file):
    """What a file is opened as, in a process of its own; "" and the error where it is not."""
    script = f"""
import sys
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.errors import LcmCompileError
try:
    opened = open_checkpoint({str(file)!r})
except LcmCompileError as error:
    sys.exit(f"{{error.message}}; {{error.hint}}")
print(opened.family.name, opened.default_size[0], opened.scheduler.prediction_type, *opened.notes)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("family", "metadata", "size", "prediction"),
    [
        ("sd15", {}, 512, "epsilon"),
        ("sdxl", {}, 1024, "epsilon"),
        ("sdxl", {"modelspec.prediction_type": "v"}, 1024, "v_prediction"),
        ("ssd-1b", {}, 1024, "epsilon"),
        ("lcm-sdxl", {}, 1024, "epsilon"),
        ("lcm-ssd-1b", {}, 1024, "epsilon"),
        ("lcm-dreamshaper", {}, 768, "epsilon"),
        ("sd21", {}, 512, "epsilon"),
        ("sd21", {"modelspec.prediction_type": "v"}, 768, "v_prediction"),
    ],
)
def test_families_are_recognised_at_full_size(tokenizers, tmp_path, family, metadata, size, prediction):
    file = write_full_size(family, tmp_path / "full.safetensors", **metadata)
    out, err = opened_in(tokenizers(family), file)
    assert out == f"{family} {size} {prediction}", err


# Millions of the UNet and of the text encoders, as they are published.
MILLIONS = {
    "sd15": (859.5, 123.1),
    "sd21": (865.9, 340.4),
    "sdxl": (2567.5, 817.7),
    "ssd-1b": (1331.3, 817.7),
}


@pytest.mark.parametrize("family", MILLIONS)
def test_inspect_tells_a_file_of_full_size(command, tmp_path, family):
    file = write_full_size(family, tmp_path / "full.safetensors")
    told = json.loads(command("inspect", file, "--json")[1])
    assert (told["single_file"], told["family"]) == (str(file), family)
    millions = {part["name"]: part["parameters"] / 1e6 for part in told["components"]}
    unet, text = MILLIONS[family]
    assert millions["unet"] == pytest.approx(unet, abs=0.1)
    assert sum(n for name, n in millions.items() if "text" in name) == pytest.approx(text, abs=0.3)
    assert {part["dtype"] for part in told["components"]} == {"F16"}
    assert family in command("inspect", file)[1]


def test_sd2_that_predicts_v_is_told_by_its_norms(tokenizers, tmp_path):
    """As ComfyUI tells it: published v models' biases spread by more than 0.09."""
    file = write_full_size("sd21", tmp_path / "full.safetensors")
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    with file.open("r+b") as data:
        length = int.from_bytes(data.read(8), "little")
        place = json.loads(data.read(length))[key]["data_offsets"][0]
        data.seek(8 + length + place)
        data.write((torch.randn(320) * 0.2).half().numpy().tobytes())
    out, err = opened_in(tokenizers("sd21"), file)
    assert out == "sd21 768 v_prediction", err


def test_without_tokenizers_both_ways_out_are_named(tmp_path):
    file = write_full_size("sd15", tmp_path / "full.safetensors")
    environment = {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    out, err = opened_in(environment, file)
    assert out == ""
    for told in ("sd15 family", "tokenizer", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--config DIR"):
        assert told in err


REFUSED = {
    "a LoRA": ({"lora_unet_x.lora_down.weight": (4, 4)}, "--lora"),
    "a VAE alone": ({"first_stage_model.decoder.conv_in.weight": (4, 4)}, "--vae"),
    "training's averaged weights": (
        {"model_ema.diffusion_modelinput_blocks00weight": (8, 4, 3, 3), "first_stage_model.decoder.x": (4,)},
        "for drawing",
    ),
    "an edit model": ({"model.diffusion_model.input_blocks.0.0.weight": (8, 8, 3, 3)}, "--base"),
    "an SDXL refiner": ({"conditioner.embedders.0.model.ln_final.bias": (4,)}, "--base"),
    "a Stable Diffusion 3": (
        {"model.diffusion_model.joint_blocks.0.x_block.bias": (4,)},
        "--base",
    ),
    "a Flux": ({"double_blocks.0.img_attn.proj.weight": (4, 4)}, "--base"),
    "a ControlNet": ({"control_model.time_embed.0.weight": (4, 4)}, "--controlnet"),
    "a ControlNet, not": ({"controlnet_cond_embedding.conv_in.weight": (4, 4)}, "--controlnet"),
    "no Stable Diffusion checkpoint": ({"weight": (4, 4)}, "--base"),
    "an unCLIP model": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
            "model.diffusion_model.label_emb.0.0.weight": (4, 4),
            "cond_stage_model.model.ln_final.bias": (4,),
        },
        "--base",
    ),
    "a CosXL model": ({"edm_vpred.sigma_max": (), "v_pred": (0,)}, "--base"),
    "has no vae": ({}, "--vae"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_base_is_told(refused, bases, tmp_path, kind):
    shapes, hint = REFUSED[kind]
    folder, whole = bases["sd15"]
    file = tmp_path / "file.safetensors"
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    if not tensors:
        tensors = {k: v for k, v in load_file(whole).items() if not k.startswith("first_stage_model.")}
    save_file(tensors, file)
    told = [file, kind, hint]
    refused(1, told, "build", "--base", file, "--config", folder, "--gpu", "cpu", "--no-lcm")


def test_a_pickle_is_never_opened(refused, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"weight": torch.ones(1)}, path)
    refused(1, [path, "pickle", ".safetensors", "from_single_file"], "build", "--base", path, "--gpu", "cpu")


def test_a_file_of_no_known_family_wants_a_config(refused, bases):
    file = bases["sd15"][1]
    told = [file, "no known family", "[32, 64]", "--config"]
    refused(1, told, "build", "--base", file, "--gpu", "cpu", "--no-lcm")


def test_config_is_for_files_alone(refused, bases):
    folder = bases["sd15"][0]
    refused(2, "--config", "build", "--base", folder, "--config", folder, "--gpu", "cpu", "--no-lcm")


@pytest.mark.parametrize("damage", ["lacks", "has no place for", "has another shape of"])
def test_weights_that_do_not_fit_their_config(bases, tmp_path, damage):
    folder, file = bases["sdxl"]
    tensors, key = load_file(file), "model.diffusion_model.out.2.weight"
    weight = tensors.pop(key)
    if damage == "has no place for":
        tensors |= {key: weight, "model.diffusion_model.input_blocks.1.0.in_layers.9.weight": weight + 1}
    elif damage == "has another shape of":
        tensors[key] = weight[:, :3].contiguous()
    save_file(tensors, tmp_path / "damaged.safetensors")
    spec = BuildSpec(
        base=str(tmp_path / "damaged.safetensors"), config=str(folder), no_lcm=True, few_step="lcm"
    )
    with pytest.raises(CheckpointError, match=f"unet of .*it {damage} 1 weights"):
        build(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()
