"""Checkpoints whose weights have the names of other programs and times: each is read as what it holds."""

from __future__ import annotations

import re
import shutil

import factories
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lcm_compile.builder.plan import make_plan
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.spec import BuildSpec

VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request, sd15_checkpoint, sdxl_checkpoint, tmp_path_factory):
    """A folder, and its tensors in the original layout."""
    folder = {"sd15": sd15_checkpoint, "sdxl": sdxl_checkpoint}[request.param]
    kind = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[request.param]
    file = tmp_path_factory.mktemp("original") / "a.safetensors"
    return folder, load_file(factories.write_original(kind.from_pretrained(folder), file))


def assert_same(opened, folder, *names):
    """The weights are those that diffusers and transformers wrote to the folder."""
    own = open_checkpoint(str(folder))
    for name in names or own.components:
        expected, found = (load_component(each, name).state_dict() for each in (own, opened))
        assert expected.keys() == found.keys()
        assert all(torch.equal(weight, found[key]) for key, weight in expected.items()), name


@pytest.mark.parametrize("form", ["folder", "file"])
def test_without_a_vae_but_with_one_given(base, tmp_path, form):
    folder, tensors = base
    inside = {k: v for k, v in tensors.items() if k.startswith("first_stage_model.")}
    file, vae = tmp_path / "no-vae.safetensors", folder / "vae"
    save_file({k: v for k, v in tensors.items() if k not in inside}, file)
    if form == "file":
        vae = tmp_path / "vae.safetensors"
        save_file({k.removeprefix("first_stage_model."): v for k, v in inside.items()}, vae)
    spec = BuildSpec(base=str(file), config=str(folder), no_lcm=True, few_step="lcm", vae=str(vae))
    assert_same(make_plan(spec).export.checkpoint, folder)


def test_a_folder_without_its_vaes_weights_but_with_another_given(base, tmp_path):
    folder = shutil.copytree(base[0], tmp_path / "base")
    (folder / VAE_FILE).unlink()
    spec = BuildSpec(base=str(folder), no_lcm=True, few_step="lcm", vae=str(base[0]))
    assert_same(make_plan(spec).export.checkpoint, base[0])


@pytest.mark.parametrize("projection", ["transformer.text_projection.weight", "text_projection"])
def test_saved_by_comfyui(base, tmp_path, projection):
    """With CLIP's projection and scale, which no text-to-image pipeline reads of it."""
    folder, tensors = base
    first = "conditioner.embedders.0." if "text_encoder_2" in open_checkpoint(str(folder)).components else ""
    first = first or "cond_stage_model."
    extra = {f"{first}{projection}": torch.eye(32), f"{first}logit_scale": torch.tensor(4.6)}
    if first.startswith("conditioner"):
        extra["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    save_file(tensors | extra, tmp_path / "model.safetensors")
    opened = open_checkpoint(str(tmp_path / "model.safetensors"), str(folder))
    assert opened.notes == ()
    assert_same(opened, folder)


# What the attention's parts were called: in diffusers before 0.17 and since, and by its own convert scripts.
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
LDM = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
LDM_OLD = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def attention_renamed(tensors, place, names, matrices=True):
    """Tensors with other names for the parts of the attention at `place`, as matrices or 1×1 convolutions."""
    found = {}
    for key, tensor in tensors.items():
        if match := re.search(rf"{place}\.({'|'.join(map(re.escape, names))})\.(weight|bias)", key):
            key = key.replace(match[0], match[0].replace(f".{match[1]}.", f".{names[match[1]]}."))
            if match[2] == "weight":
                tensor = tensor.flatten(1) if matrices else tensor.flatten(1)[:, :, None, None]
        found[key] = tensor.contiguous()
    assert found.keys() != tensors.keys()
    return found


@pytest.mark.parametrize("names", [LDM, LDM_OLD])
@pytest.mark.parametrize("matrices", [True, False])
@pytest.mark.parametrize("own_file", [False, True])
def test_a_vaes_attention_in_the_original_layout(base, tmp_path, names, matrices, own_file):
    folder, tensors = base
    file = tmp_path / "model.safetensors"
    renamed = attention_renamed(tensors, r"mid\.attn_1", names, matrices)
    if own_file:
        start = "first_stage_model."
        renamed = {k.removeprefix(start): v for k, v in renamed.items() if k.startswith(start)}
    save_file(renamed, file)
    if own_file:
        spec = BuildSpec(base=str(folder), no_lcm=True, few_step="lcm", vae=str(file))
        assert_same(make_plan(spec).export.checkpoint, folder, "vae")
    else:
        assert_same(open_checkpoint(str(file), str(folder)), folder, "vae")


@pytest.mark.parametrize("form", ["folder", "vae folder", "vae file", "bin"])
def test_a_vaes_attention_in_a_folder_of_old(base, tmp_path, form):
    """As diffusers reads it."""
    folder = shutil.copytree(base[0], tmp_path / "base")
    tensors = attention_renamed(load_file(folder / VAE_FILE), r"attentions\.0", OLD)
    (folder / VAE_FILE).unlink()
    if form == "bin":
        torch.save(tensors, (folder / VAE_FILE).with_suffix(".bin"))
    else:
        save_file(tensors, folder / VAE_FILE)
    theirs = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=form != "bin").state_dict()
    if form in ("folder", "bin"):
        opened = open_checkpoint(str(folder))
    else:
        vae = folder / (VAE_FILE if form == "vae file" else "vae")
        opened = make_plan(
            BuildSpec(base=str(base[0]), no_lcm=True, few_step="lcm", vae=str(vae))
        ).export.checkpoint
    found = load_component(opened, "vae").state_dict()
    assert theirs.keys() == found.keys()
    assert all(torch.equal(weight, found[key]) for key, weight in theirs.items())
    assert_same(opened, base[0], "vae")


@pytest.mark.parametrize("names", ["transformers", "transformers without text_model", "OpenCLIP"])
def test_sd2_with_the_24th_layer_of_its_text_encoder(tmp_path, names):
    """Which its config leaves out, and nothing computes."""
    folder = factories.write_sd15(tmp_path / "base", use_linear_projection=True)
    config = CLIPTextModel.from_pretrained(folder / "text_encoder").config
    config.hidden_act, config.num_hidden_layers = "gelu", 23
    factories.lively(CLIPTextModel(config)).save_pretrained(folder / "text_encoder")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    tensors = load_file(factories.write_original(pipe, tmp_path / "a.safetensors"))
    if names != "OpenCLIP":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("cond_stage_model.")}
        start = "cond_stage_model.transformer." + ("" if "without" in names else "text_model.")
        tensors |= {f"{start}{key}": weight for key, weight in pipe.text_encoder.state_dict().items()}
    last = {k.replace(".22.", ".23."): torch.randn_like(v) for k, v in tensors.items() if ".22." in k}
    assert last
    save_file({k: v.contiguous() for k, v in (tensors | last).items()}, tmp_path / "model.safetensors")
    assert_same(open_checkpoint(str(tmp_path / "model.safetensors"), str(folder)), folder)
