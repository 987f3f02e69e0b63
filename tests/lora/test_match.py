"""The original Stable Diffusion's names and the layouts of files: each against diffusers' own conversions."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from factories import fuse_loras, save_tensors
from safetensors.torch import save_file
from torch.nn import Conv2d, Linear, Module
from transformers import CLIPTextConfig, CLIPTextModel

from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.original_unet_names import original_name, original_names
from lcm_compile.errors import LoraError
from lcm_compile.lora.read import read_lora
from lcm_compile.spec import LoraSpec

SMALL = {"norm_num_groups": 4, "cross_attention_dim": 12, "sample_size": 8}


def small_unet(family: str) -> UNet2DConditionModel:
    """A family's UNet, block by block, with few channels and shallow transformers."""
    config = {**FAMILIES[family.removesuffix(" without middle")].models["unet"], **SMALL}
    if family.endswith(" without middle"):  # as BK-SDM's and Segmind's smallest
        config |= {"mid_block_type": None, "layers_per_block": 1}
    blocks = len(config["block_out_channels"])
    config["block_out_channels"] = [8, 8, 16, 16][:blocks]
    config["attention_head_dim"] = 2
    for depth in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        if depth in config and family != "ssd-1b":
            config[depth] = [1, 2, 2][:blocks]
    if "addition_embed_type" in config:
        config |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    torch.manual_seed(0)
    return UNet2DConditionModel(**config)


@pytest.fixture(scope="module", params=["sd15", "sdxl", "ssd-1b", "sd21", "sd15 without middle"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def unet(family):
    return small_unet(family)


def renamed(unet: Module) -> dict[str, str]:
    """diffusers' name → the original's, for each module that has weights."""
    originals = original_names(unet)
    return {
        name: original_name(name, originals)
        for name, module in unet.named_modules()
        if getattr(module, "weight", None) is not None
    }


def test_names_are_those_of_whole_checkpoints(unet):
    """A checkpoint under our original names comes out of diffusers' converter under diffusers' own."""
    names = renamed(unet)
    assert len(set(names.values())) == len(names)
    weights = unet.state_dict()
    original = {}
    for key in weights:
        module, _, parameter = key.rpartition(".")
        original[f"model.diffusion_model.{names[module]}.{parameter}"] = torch.tensor(hash(key))
    converted = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert {key: int(tag) for key, tag in converted.items()} == {key: hash(key) for key in weights}


def test_names_are_those_of_loras(unet, family):
    """kohya's keys, as diffusers converts them."""
    tensors = {}
    for name, original in renamed(unet).items():
        module = unet.get_submodule(name)
        # It takes SD1.5's block 10 for block 1 too, and its first upsampler for an attention; the converter
        # of whole checkpoints knows both.
        unknown = re.search(r"blocks\.1\d\.|\.1\.conv$", original)
        if unknown or not isinstance(module, Linear | Conv2d):
            continue
        stem = f"lora_unet_{original.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = name
        tensors[f"{stem}.lora_up.weight"] = name
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), unet.config)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    for key, name in converted.items():
        flat = key.removeprefix("unet.").replace(".processor", "").replace("_lora", ".lora")
        flat = flat.partition(".lora.")[0].replace(".", "_").replace("to_out_0", "to_out")
        assert flat == name.replace(".", "_").replace("to_out_0", "to_out")
    assert len(converted) == len(tensors)


@pytest.mark.parametrize(
    ("family", "original", "ours"),
    [
        ("sd15", "output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sd15", "output_blocks.8.2.conv", "up_blocks.2.upsamplers.0.conv"),
        ("sd15", "input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("sd15", "middle_block.2.in_layers.2", "mid_block.resnets.1.conv1"),
        ("sdxl", "output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl", "label_emb.0.2", "add_embedding.linear_2"),
        (
            "sdxl",
            "input_blocks.4.1.transformer_blocks.0.attn1.to_k",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
        ),
        ("ssd-1b", "middle_block.0.emb_layers.1", "mid_block.resnets.0.time_emb_proj"),
    ],
)
def test_well_known_names(family, original, ours):
    assert renamed(small_unet(family))[ours] == original


class Base:
    """A small SDXL UNet and its text encoder, whose every copy has the same weights."""

    def __init__(self):
        torch.manual_seed(1)
        self.modules = {"unet": small_unet("sdxl")}
        config = CLIPTextConfig(
            vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        torch.manual_seed(2)
        self.modules["text_encoder"] = CLIPTextModel(config)


TEXT = "text_model.encoder.layers.0.self_attn.out_proj"
UNET = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.1.attn2.to_v",
]
MORE = ["up_blocks.0.resnets.1.conv1", "up_blocks.0.upsamplers.0.conv", "conv_in", "time_embedding.linear_1"]


def random_factors(names):
    base, generator = Base().modules["unet"], torch.Generator().manual_seed(3)
    for name in names:
        weight = base.get_submodule(name).weight
        down = torch.randn(2, *weight.shape[1:], generator=generator)
        yield name, down, torch.randn(weight.shape[0], 2, *(1 for _ in weight.shape[2:]), generator=generator)
    down, up = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    yield TEXT, down, up


def kohya(name):
    prefix = "lora_te1_" if name == TEXT else "lora_unet_"
    return prefix + name.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"


def webui(name):
    if name == TEXT:
        return kohya(name)
    original = original_name(name, original_names(Base().modules["unet"]))
    return "lora_unet_" + original.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"


def dotted_original(name):
    if name == TEXT:
        return peft(name)
    original = original_name(name, original_names(Base().modules["unet"]))
    return f"diffusion_model.{original}", ".lora_A.weight", ".lora_B.weight"


def lycoris(name):
    stem = kohya(name)[0].replace("lora_unet_", "lycoris_")
    return stem, ".lora_down.weight", ".lora_up.weight"


def peft(name):
    stem = f"text_encoder.{name}" if name == TEXT else f"unet.{name}"
    return stem, ".lora_A.weight", ".lora_B.weight"


def peft_with_adapter_name(name):
    stem = f"base_model.model.{name}" if name != TEXT else f"base_model.model.text_encoder.{name}"
    return stem, ".lora_A.default.weight", ".lora_B.default.weight"


def peft_with_any_adapter_name(name):
    return peft(name)[0], ".lora_A.my-style_0.weight", ".lora_B.my-style_0.weight"


def wrapped(*wrappers):
    """PEFT's names of a model in what torch or PEFT wrap it in, as scripts save them by hand."""

    def spell(name):
        component, _, module = peft(name)[0].partition(".")
        return ".".join((component, *wrappers, module)), ".lora_A.weight", ".lora_B.weight"

    return spell


def compiled_part(name):
    stem = peft(name)[0].replace(".0.", ".0._orig_mod.", 1)
    return stem, ".lora_A.weight", ".lora_B.weight"


def compiled_kohya(name):
    stem = kohya(name)[0].replace("unet_", "unet__orig_mod_").replace("te1_", "te1__orig_mod_")
    return stem, ".lora_down.weight", ".lora_up.weight"


def comfy(name):
    if name == TEXT:
        return f"text_encoders.clip_l.transformer.{TEXT}", ".lora_down.weight", ".lora_up.weight"
    return dotted_original(name)[0], ".lora_down.weight", ".lora_up.weight"


def whole_checkpoint(name):
    """The names of a checkpoint in one file, as scripts that take the difference of two write them."""
    stem = comfy(name)[0].replace("text_encoders.clip_l.", "clip_l.")
    return stem.replace("diffusion_model.", "model.diffusion_model."), ".lora_down.weight", ".lora_up.weight"


def omi(name):
    """OneTrainer's OMI layout."""
    stem = (
        comfy(name)[0]
        .replace("diffusion_model.", "unet.")
        .replace("text_encoders.clip_l.transformer", "clip_l")
    )
    return stem, ".lora_down.weight", ".lora_up.weight"


def onetrainer(name):
    """OneTrainer's own: kohya's prefixes before diffusers' dotted names."""
    stem = peft(name)[0].replace("text_encoder.", "lora_te1.").replace("unet.", "lora_unet.")
    return stem, ".lora_down.weight", ".lora_up.weight"


def diffusers(name):
    kind = ".lora_linear_layer" if name == TEXT else ".lora"
    return peft(name)[0], f"{kind}.down.weight", f"{kind}.up.weight"


def processors(name):
    if name == TEXT:
        stem = f"text_encoder.{TEXT.replace('out_proj', 'to_out_lora')}"
    else:
        parent, _, last = name.removesuffix(".0").rpartition(".")
        stem = f"unet.{parent}.processor.{last}_lora"
    return stem, ".down.weight", ".up.weight"


def bare_processors(name):
    return processors(name)[0].removeprefix("unet."), ".down.weight", ".up.weight"


def fused(path):
    modules = Base().modules
    before = {c: {k: v.clone() for k, v in m.state_dict().items()} for c, m in modules.items()}
    fuse_loras(modules, [(read_lora(path), LoraSpec("x", 0.7))])
    after = {(c, k): v for c, m in modules.items() for k, v in m.state_dict().items()}
    return after, {(c, k) for c, k in after if not torch.equal(after[c, k], before[c][k])}


LAYOUTS = {
    "webui": webui,
    "original, dotted": dotted_original,
    "LyCORIS": lycoris,
    "PEFT": peft,
    "PEFT, adapter named": peft_with_adapter_name,
    "PEFT, any adapter": peft_with_any_adapter_name,
    "torch.compile": wrapped("_orig_mod"),
    "DistributedDataParallel": wrapped("module"),
    "PEFT in a component": wrapped("base_model", "model"),
    "all of these": wrapped("module", "_orig_mod", "base_model", "model"),
    "a compiled block": compiled_part,
    "kohya, compiled": compiled_kohya,
    "ComfyUI": comfy,
    "a whole checkpoint's": whole_checkpoint,
    "OMI": omi,
    "OneTrainer": onetrainer,
    "diffusers": diffusers,
    "processors": processors,
    "bare processors": bare_processors,
}


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [*((layout, ".safetensors") for layout in LAYOUTS), *(("PEFT", end) for end in (".bin", ".pt", ".pth"))],
)
def test_one_lora_in_every_layout_makes_the_same_bits(layout, suffix, tmp_path):
    """α is left to the rank: a diffusers file has none."""
    names = UNET if "processors" in layout else [*UNET, *MORE]

    def write(spelling, path):
        tensors = {}
        for name, down, up in random_factors(names):
            stem, a, b = spelling(name)
            tensors |= {stem + a: down, stem + b: up}
        torch.save(tensors, path) if suffix != ".safetensors" else save_tensors(tensors, path)
        return path

    one, changed = fused(write(kohya, tmp_path / f"kohya{suffix}"))
    other, _ = fused(write(LAYOUTS[layout], tmp_path / f"other{suffix}"))
    assert len(changed) == len(names) + 1
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_dora_and_alpha_in_each_layout_make_the_same_bits(tmp_path):
    """α in a key or in diffusers' metadata; the magnitude as kohya's column, or PEFT's vector or kernel."""
    tensors = {"kohya": {}, "peft": {}}
    weights = Base().modules["unet"]
    for name, down, up in random_factors(["up_blocks.0.resnets.1.conv1", UNET[0]]):
        if name == TEXT:
            continue
        weight = weights.get_submodule(name).weight.detach()
        norm = weight.flatten(1).norm(dim=1) * 1.3
        ones = [1] * (weight.ndim - 1)
        stem, _, _ = kohya(name)
        tensors["kohya"] |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(3.0),
            f"{stem}.dora_scale": norm.reshape(-1, *ones).clone(),
        }
        magnitude = norm if weight.ndim == 2 else norm.reshape(1, -1, 1, 1)
        tail = "" if weight.ndim == 2 else ".weight"
        tensors["peft"] |= {
            f"unet.{name}.lora_A.weight": down,
            f"unet.{name}.lora_B.weight": up,
            f"unet.{name}.lora_magnitude_vector{tail}": magnitude.clone(),
        }
    settings = json.dumps({"unet.lora_alpha": 3, "unet.use_dora": True})
    save_file(tensors["kohya"], tmp_path / "kohya.safetensors")
    save_file(tensors["peft"], tmp_path / "peft.safetensors", {"lora_adapter_metadata": settings})
    one, changed = fused(tmp_path / "kohya.safetensors")
    other, _ = fused(tmp_path / "peft.safetensors")
    assert len(changed) == 2
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("component", "prefix"),
    [
        ("text_encoder", "text_encoders.clip_l.transformer.text_model."),  # ComfyUI
        ("text_encoder", "clip_l.transformer.text_model."),
        ("text_encoder", "clip_l.text_model."),  # OMI
        ("text_encoder", "lora_clip_l.text_model."),
        ("text_encoder", "text_encoders.clip_h.transformer.text_model."),  # SD2.x in ComfyUI
        ("text_encoder", "lora_te.text_model."),
        ("text_encoder", "lora_te_text_model_"),
        ("text_encoder", "text_encoder._orig_mod.text_model."),
        ("text_encoder_2", "text_encoders.clip_g.transformer.text_model."),
        ("text_encoder_2", "clip_g.transformer.text_model."),
        ("text_encoder_2", "clip_g.text_model."),
        ("text_encoder_2", "lora_clip_g.text_model."),
        ("text_encoder_2", "lora_te2.text_model."),
        ("text_encoder_2", "lora_te2_text_model_"),
        ("text_encoder_2", "text_encoder_2.module.text_model."),
    ],
)
def test_both_text_encoders_under_each_trainers_names(component, prefix, tmp_path):
    """A linear layer, a norm and its bias, and the words' embeddings, which ComfyUI extracts too."""
    config = CLIPTextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    modules = {name: CLIPTextModel(config) for name in ("text_encoder", "text_encoder_2")}
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in modules.items()}
    flat = "_" if prefix.endswith("_") else "."
    linear, norm, words = (
        prefix + name.replace(".", flat)
        for name in ("encoder.layers.0.mlp.fc1", "encoder.layers.0.layer_norm1", "embeddings.token_embedding")
    )
    down, up, rows, columns = torch.randn(2, 8), torch.randn(16, 2), torch.randn(16, 2), torch.randn(2, 8)
    scale, shift = torch.randn(8), torch.randn(8)
    tensors = {
        f"{linear}.lora_down.weight": down,
        f"{linear}.lora_up.weight": up,
        f"{norm}.diff": scale,
        f"{norm}.diff_b": shift,
        f"{words}.lora_up.weight": rows,
        f"{words}.lora_down.weight": columns,
    }
    path = save_tensors(tensors, tmp_path / "lora.safetensors")
    fuse_loras(modules, [(read_lora(path), LoraSpec("x"))])
    changes = {"fc1.weight": up @ down, "layer_norm1.weight": scale, "layer_norm1.bias": shift}
    changes["token_embedding.weight"] = rows @ columns
    for name, module in modules.items():
        for key, weight in module.state_dict().items():
            change = next((c for end, c in changes.items() if key.endswith(end) and name == component), 0)
            torch.testing.assert_close(weight, before[name][key] + change)


def test_a_module_under_two_names_is_refused(tmp_path):
    """diffusers drops one of the two; neither may be lost here."""
    tensors = {}
    for name, down, up in random_factors(UNET[:1]):
        for spelling in (kohya, webui):
            stem, a, b = spelling(name)
            tensors |= {stem + a: down.clone(), stem + b: up.clone()}
    path = save_tensors(tensors, tmp_path / "lora.safetensors")
    modules = Base().modules
    with pytest.raises(LoraError, match=r"twice.*(input|down)_blocks.*, .*(input|down)_blocks"):
        fuse_loras(modules, [(read_lora(path), LoraSpec("x"))])
