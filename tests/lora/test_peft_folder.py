"""Folders that PEFT writes, against PEFT's own loading of them; what can't be read right is refused."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from factories import fuse_loras, load_modules
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from lcm_compile import BuildSpec, LoraSpec
from lcm_compile.builder.plan import make_plan
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.errors import LoraError
from lcm_compile.lora.find import find_lora
from lcm_compile.lora.read import read_lora

TOKENS = torch.arange(77)[None]
LATENT = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.randn(1, 77, 80, generator=torch.Generator().manual_seed(1))
ADDED = {"text_embeds": torch.ones(1, 40), "time_ids": torch.ones(1, 6)}


def modules_of(checkpoint):
    return load_modules(open_checkpoint(str(checkpoint)))


def save_adapter(model, config, folder):
    """A random adapter, as its training would save it."""
    adapted = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.1)
            elif "lora_" in name or "hada_" in name:
                parameter.normal_(0, 0.2, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def output(component, model):
    with torch.no_grad():
        if component == "unet":
            return model(LATENT, 499, HIDDEN, added_cond_kwargs=ADDED).sample
        return model(TOKENS).last_hidden_state


PATTERNS = {
    "rank_pattern": {"to_k": 2, "mid_block.attentions.0.proj_in": 6},
    "alpha_pattern": {"down_blocks.1.*to_q|conv1": 1, "to_k": 5},
}
CONFIGS = {
    "plain": ("unet", {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "conv1", "proj_in"]}),
    "patterns": (
        "unet",
        {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "conv1", "proj_in"], **PATTERNS},
    ),
    "rank-stabilised": (
        "unet",
        {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "to_k"], "use_rslora": True, **PATTERNS},
    ),
    "DoRA": ("unet", {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "conv1"], "use_dora": True}),
    "first text encoder": ("text_encoder", {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"]}),
    "second text encoder": ("text_encoder_2", {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"]}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_what_peft_makes_of_it(sdxl_checkpoint, tmp_path, name):
    component, settings = CONFIGS[name]
    modules = modules_of(sdxl_checkpoint)
    model = modules.named()[component]
    folder = save_adapter(model, LoraConfig(**settings), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    before, expected = output(component, model), output(component, theirs)
    spec = LoraSpec(str(folder))
    fuse_loras(modules.named(), [(read_lora(find_lora(spec)), spec)])
    torch.testing.assert_close(output(component, model), expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2


def test_a_folder_of_pickles(sdxl_checkpoint, folder, tmp_path):
    """As PEFT and diffusers write them with safe_serialization=False, under the names that they read."""
    model = modules_of(sdxl_checkpoint).unet
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    adapted.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(adapted))
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path / "diffusers", unet_lora_layers=layers, safe_serialization=False
    )
    expected = load_file(folder / "adapter_model.safetensors")
    assert sorted(p.name for p in (tmp_path / "diffusers").iterdir()) == ["pytorch_lora_weights.bin"]
    for name in ("pickled", "diffusers"):
        found = read_lora(find_lora(LoraSpec(str(tmp_path / name))))
        assert len(found.layers) == len(expected) / 2
        for layer in found.layers:
            down = expected[f"base_model.model.{layer.module}.lora_A.weight"]
            assert torch.equal(layer.update.factors["down"], down)
    assert {layer.update.alpha for layer in read_lora(tmp_path / "pickled").layers} == {1, 5, 6}


@pytest.fixture
def folder(sdxl_checkpoint, tmp_path):
    _, settings = CONFIGS["patterns"]
    return save_adapter(modules_of(sdxl_checkpoint).unet, LoraConfig(**settings), tmp_path / "adapter")


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def test_both_files_are_in_the_key(sdxl_checkpoint, folder, tmp_path):
    def key(of):
        return make_plan(
            BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", loras=(LoraSpec(str(of)),))
        ).key

    first = key(folder)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert key(moved) == first
    assert key(edited(moved, lora_alpha=7)) != first
    other = shutil.copytree(folder, tmp_path / "other")
    weights = other / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    assert key(other) != first


def test_inspected(command, folder):
    code, out, _ = command("inspect", folder, "--json")
    data = json.loads(out)
    assert (code, data["layout"], set(data["ranks"])) == (0, "peft", {"2", "4", "6"})
    assert set(data["alphas"]) == {"1", "5", "6"}


def test_an_adapter_whose_class_was_not_kept(sdxl_checkpoint, folder, tmp_path):
    """Its keys tell a text encoder's from a UNet's."""
    assert {layer.component for layer in read_lora(edited(folder, auto_mapping=None)).layers} == {"unet"}
    component, settings = CONFIGS["first text encoder"]
    text = save_adapter(modules_of(sdxl_checkpoint).text_encoder, LoraConfig(**settings), tmp_path / "text")
    assert {layer.component for layer in read_lora(edited(text, auto_mapping=None)).layers} == {component}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"lora_alpha": None}, "no lora_alpha"),
        ({"lora_alpha": "strong"}, "adapter metadata is broken"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"use_dora": True}, "DoRA that lacks the magnitude"),
    ],
)
def test_settings_that_are_refused(refused, sdxl_checkpoint, folder, changes, told):
    edited(folder, **changes)
    words = ("build", "--base", sdxl_checkpoint, "--no-lcm", "--gpu", "cpu", "--lora", folder)
    refused(1, [folder, told], *words)


def test_a_loha_that_peft_saved_is_refused(sdxl_checkpoint, tmp_path):
    config = LoHaConfig(r=4, alpha=2, target_modules=["to_q"])
    folder = save_adapter(modules_of(sdxl_checkpoint).unet, config, tmp_path / "loha")
    with pytest.raises(LoraError, match="LOHA"):
        read_lora(find_lora(LoraSpec(str(folder))))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_broken_config(refused, folder, text):
    (folder / "adapter_config.json").write_text(text)
    refused(1, ["adapter_config.json", "can't be read"], "inspect", folder)


def test_half_a_folder(refused, folder):
    (folder / "adapter_model.safetensors").unlink()
    refused(1, ["neither pytorch_lora_weights", "adapter_model.safetensors"], "inspect", folder)
