"""Folders whose weights are pickles: what diffusers loads of them, and never any code."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lcm_compile.checkpoint.diffusers_folder import FULL_FIRST, needed_files
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.errors import CheckpointError

KINDS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def pickled(base, form):
    """Saves a base's weights as pickles: whole, as the variant fp16, or in two shards."""
    for name in KINDS:
        path = next((base / name).glob("*.safetensors"))
        weights = {key: weight.clone() for key, weight in load_file(path).items()}
        path.unlink()
        stem = "pytorch_model" if name.startswith("text") else path.stem
        if form == "fp16":
            torch.save({key: w.half() for key, w in weights.items()}, base / name / f"{stem}.fp16.bin")
        elif form == "shards":
            shards = {f"{stem}-0000{n}-of-00002.bin": list(weights)[n - 1 :: 2] for n in (1, 2)}
            for file, keys in shards.items():
                torch.save({key: weights[key] for key in keys}, base / name / file)
            index = {
                "metadata": {},
                "weight_map": {key: file for file, keys in shards.items() for key in keys},
            }
            (base / name / f"{stem}.bin.index.json").write_text(json.dumps(index))
        else:
            legacy = form == "of before 2020"
            torch.save(weights, base / name / f"{stem}.bin", _use_new_zipfile_serialization=not legacy)
    return base


@pytest.mark.parametrize("form", ["whole", "of before 2020", "fp16", "shards"])
def test_the_weights_are_those_that_diffusers_loads(sdxl_checkpoint, tmp_path, form):
    base = pickled(shutil.copytree(sdxl_checkpoint, tmp_path / "base"), form)
    opened = open_checkpoint(str(base))
    variant = "fp16" if form == "fp16" else None
    for name, kind in KINDS.items():
        weights = load_component(opened, name).state_dict()
        theirs = (
            kind.from_pretrained(base / name, variant=variant, use_safetensors=False).float().state_dict()
        )
        assert weights.keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[key]) for key, weight in weights.items()), name


def test_a_plan_and_inspect_read_them(command, sdxl_checkpoint, tmp_path):
    base = pickled(shutil.copytree(sdxl_checkpoint, tmp_path / "base"), "whole")
    assert command("build", "--base", base, "--no-lcm", "--gpu", "cpu", "--dry-run")[0] == 0
    told, own = (json.loads(command("inspect", b, "--json")[1]) for b in (base, sdxl_checkpoint))
    assert told["components"] == own["components"]


class Code:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("content", [{"weight": Code()}, [torch.ones(1)], {"weight": 1}, b"\x80\x02."])
def test_any_other_pickle_is_refused(sdxl_checkpoint, tmp_path, capsys, content):
    base = shutil.copytree(sdxl_checkpoint, tmp_path / "base")
    next((base / "unet").glob("*.safetensors")).unlink()
    path = base / "unet/diffusion_pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=str(path)):
        load_component(open_checkpoint(str(base)), "unet")
    assert "code ran" not in capsys.readouterr().out


def test_of_the_hub_they_are_taken_where_there_is_nothing_else():
    names = [
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.bin",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.safetensors",
        "text_encoder_2/pytorch_model-00001-of-00002.bin",
        "text_encoder_2/pytorch_model-00002-of-00002.bin",
        "text_encoder_2/pytorch_model.bin.index.json",
        "vae/flax_model.msgpack",
    ]
    needed = {names[0], *names[3:7]}
    assert set(needed_files(names, FULL_FIRST)) == needed
