"""`fuse`: what is written is diffusers' and PEFT's own merge, as a folder and as a file."""

from __future__ import annotations

import json
from dataclasses import replace

import factories
import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from factories import load_modules, write_vae
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lcm_compile import BuildSpec, build, load
from lcm_compile.checkpoint.checkpoint import MODELS
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component, load_tokenizer
from lcm_compile.checkpoint.random_weights import open_random


def pipeline_of(folder, file=None):
    kind = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    if file is None:
        return kind.from_pretrained(folder, local_files_only=True)
    return kind.from_single_file(str(file), config=str(folder), local_files_only=True)


def picture(pipe):
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        "a large red star",
        num_inference_steps=2,
        guidance_scale=1.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    )
    return drawn.images[0]


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def fused(request, sdxl_checkpoint, sd15_checkpoint, tmp_path_factory):
    """A base with an LCM-LoRA and a style for all its models, and the fused folder and file."""
    from lcm_compile.lora.fuse import fuse
    from lcm_compile.spec import LoraSpec

    base = {"sdxl": sdxl_checkpoint, "sd15": sd15_checkpoint}[request.param]
    folder = tmp_path_factory.mktemp("fused")
    pipe = pipeline_of(base)
    loras = [
        factories.write_lora(pipe, folder / "lcm.safetensors", "peft", alpha=None, text=False),
        factories.write_lora(pipe, folder / "style.safetensors", "kohya", seed=1),
    ]
    spec = BuildSpec(base=str(base), lcm_lora=LoraSpec(str(loras[0])), loras=(LoraSpec(str(loras[1]), 0.5),))
    fuse(spec, folder / "out", "fp32")
    fuse(spec, folder / "out.safetensors", "fp32")
    return base, spec, folder / "out", folder / "out.safetensors", loras


def test_the_folder_is_diffusers_own_merge(fused):
    base, _, folder, _, (lcm, style) = fused
    reference = pipeline_of(base)
    reference.load_lora_weights(str(lcm.parent), weight_name=lcm.name, adapter_name="lcm")
    reference.load_lora_weights(str(style.parent), weight_name=style.name, adapter_name="style")
    reference.set_adapters(["lcm", "style"], [1.0, 0.5])
    pipe = pipeline_of(folder)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert np.abs(picture(pipe) - picture(reference)).max() < 1e-3
    assert np.abs(picture(pipe) - picture(pipeline_of(base))).max() > 0.05
    for name in MODELS:
        if getattr(pipe, name, None) is not None:
            _, info = type(getattr(pipe, name)).from_pretrained(
                folder, subfolder=name, output_loading_info=True
            )
            assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_file_is_the_folder_to_diffusers_and_to_build(fused, tmp_path):
    _, _, folder, file, _ = fused
    one, other = pipeline_of(folder), pipeline_of(folder, file)
    for name in MODELS:
        if getattr(one, name, None) is not None:
            weights = getattr(other, name).state_dict()
            for key, weight in getattr(one, name).state_dict().items():
                assert torch.equal(weight, weights[key]), (name, key)
    other.scheduler = one.scheduler
    assert np.abs(picture(one) - picture(other)).max() < 1e-5


def test_a_build_of_it_draws_what_the_build_with_loras_draws(fused, tmp_path):
    _, spec, folder, _, _ = fused
    pictures = []
    for number, each in enumerate((spec, BuildSpec(base=str(folder), no_lcm=True, few_step="lcm"))):
        bundle = build(BuildSpec(**{**vars(each), "backend": "torchscript"}), tmp_path / str(number))
        with load(bundle) as pipeline:
            pictures.append(np.asarray(pipeline("a large red star", seed=3)[0]).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_another_vae_and_half_precision(command, sd15_checkpoint, tmp_path):
    vae = write_vae(tmp_path / "vae", factor=8)
    words = ("fuse", "--base", sd15_checkpoint, "--no-lcm", "--vae", tmp_path / "vae")
    code, out, err = command(*words, "--out", tmp_path / "out")
    assert (code, out.strip()) == (0, str(tmp_path / "out")), err
    weights = load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight.half(), weights[key]) for key, weight in vae.state_dict().items())
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert command(*words, "--out", tmp_path / "out.safetensors", "--quiet")[1:] == (
        f"{tmp_path / 'out.safetensors'}\n",
        "",
    )
    with safe_open(tmp_path / "out.safetensors", "pt") as handle:
        assert {handle.get_tensor(key).dtype for key in handle.keys()} == {torch.float16}  # noqa: SIM118
        assert handle.metadata()["modelspec.prediction_type"] == "epsilon"


@pytest.fixture
def small_sd15(monkeypatch):
    """SD1.5's table of configs, with few and narrow layers."""
    unet = {
        "sample_size": 8,
        "in_channels": 4,
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    text = {
        **FAMILIES["sd15"].models["text_encoder"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    }
    vae = dict(factories.tiny_vae(8).config)
    small = {"unet": unet, "text_encoder": text, "vae": vae}
    monkeypatch.setitem(FAMILIES, "sd15", replace(FAMILIES["sd15"], models=small))
    monkeypatch.setattr("lcm_compile.checkpoint.random_weights.fetch", no_hub)


def no_hub(*_):
    raise ConnectionError("no network")


def test_random_weights_make_a_whole_checkpoint(command, small_sd15, tmp_path):
    """Its tokenizer too, which reads prompts as the one of the build from the table does."""
    words = ("--weights", "random:5", "--base", "sd15", "--no-lcm")
    code, _, err = command("fuse", *words, "--out", tmp_path / "out", "--precision", "fp32")
    assert code == 0, err
    assert pipeline_of(tmp_path / "out").tokenizer.model_max_length == 77
    table, folder = open_random("sd15", 5), open_checkpoint(str(tmp_path / "out"))
    text = "a Red star, 2 of them!"
    ids = [Tokenizer.from_str(load_tokenizer(c, "tokenizer").json).encode(text).ids for c in (table, folder)]
    assert ids[0] == ids[1] and len(set(ids[0])) > 10
    for name in ("unet", "vae", "text_encoder"):
        weights = load_component(folder, name).state_dict()
        for key, weight in load_component(table, name).state_dict().items():
            assert torch.equal(weight, weights[key]), (name, key)


@pytest.mark.parametrize("out", ["there", "missing/out", "missing/out.safetensors"])
def test_a_place_that_can_not_be_written(refused, sdxl_checkpoint, tmp_path, out):
    (tmp_path / "there").mkdir()
    told = "exists" if out == "there" else "mkdir"
    refused(2, told, "fuse", "--base", sdxl_checkpoint, "--no-lcm", "--out", tmp_path / out)


def test_a_lora_for_another_base_leaves_nothing(refused, sdxl_checkpoint, sd15_checkpoint, tmp_path):
    lora = factories.write_lora(pipeline_of(sd15_checkpoint), tmp_path / "lora.safetensors", "peft")
    words = ("fuse", "--base", sdxl_checkpoint, "--no-lcm", "--lora", lora)
    refused(1, "does not fit this base", *words, "--out", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors"]


def test_fuse_and_export_tell_what_build_tells_of_the_base(sdxl_checkpoint, command, tmp_path):
    pipe = load_modules(open_checkpoint(str(sdxl_checkpoint)))
    file = factories.write_original(pipe, tmp_path / "base.safetensors", extra_key=torch.ones(1))
    words = ("--base", file, "--config", sdxl_checkpoint, "--no-lcm")
    told = "1 keys belong to no model and are not read: extra_key"
    assert told in command("build", *words, "--gpu", "cpu", "--dry-run")[2]
    assert told in command("fuse", *words, "--out", tmp_path / "fused")[2]
    assert told in command("export", *words, "--out", tmp_path / "fused")[2]  # which ends in an error
