"""A base whose weights lie in several files is the base whose weights lie in one, to the bit."""

from __future__ import annotations

import shutil

import factories
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from factories import load_modules
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.lora.fuse import fuse

KINDS = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
WHOLE = "1GB"


def resaved(base, to, size, variant):
    """A base whose UNet and text encoders diffusers and transformers saved in fp16, in shards of a size."""
    shutil.copytree(base, to)
    for name, kind in KINDS.items():
        model = kind.from_pretrained(base / name).half()
        shutil.rmtree(to / name)
        model.save_pretrained(to / name, max_shard_size=size, variant=variant)
    return to


@pytest.fixture(scope="module", params=[None, "fp16"], ids=["plain", "variant"])
def bases(request, sdxl_checkpoint, tmp_path_factory):
    """The same weights whole and in shards, the second one's folder listing them in an index."""
    folder = tmp_path_factory.mktemp("shards")
    whole = resaved(sdxl_checkpoint, folder / "whole", WHOLE, request.param)
    shards = resaved(sdxl_checkpoint, folder / "shards", "40KB", request.param)
    for name in KINDS:
        assert len(list((whole / name).glob("*.safetensors"))) == 1
        assert len(list((shards / name).glob("*.safetensors"))) > 1
        assert len(list((shards / name).glob("*.index*.json"))) == 1
    return whole, shards


@pytest.mark.parametrize("name", KINDS)
def test_the_weights_are_the_same(bases, name):
    one, other = (load_component(open_checkpoint(str(base)), name).state_dict() for base in bases)
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())


@pytest.fixture(scope="module")
def specs(bases, tmp_path_factory):
    """Each base with the same LoRA for all its models."""
    modules = load_modules(open_checkpoint(str(bases[0])))
    lora = factories.write_lora(modules, tmp_path_factory.mktemp("lora") / "lora.safetensors", "kohya")
    return [BuildSpec(base=str(b), lcm_lora=LoraSpec(str(lora)), backend="onnxruntime") for b in bases]


def test_fused_they_are_the_same(specs, tmp_path):
    for number, spec in enumerate(specs):
        fuse(spec, tmp_path / str(number), "fp32")
    files = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        one, other = (load_file(tmp_path / number / file) for number in "01")
        assert one.keys() == other.keys()
        assert all(torch.equal(weight, other[key]) for key, weight in one.items()), file


@pytest.mark.slow
@pytest.mark.parametrize("bases", ["fp16"], indirect=True)
def test_engines_and_pictures_are_the_same(specs, tmp_path):
    bundles = [build(spec, tmp_path / str(number)) for number, spec in enumerate(specs)]
    engines = [
        {name: digest for name, digest in bundle.manifest.files.items() if name.startswith("engines/")}
        for bundle in bundles
    ]
    assert engines[0] == engines[1] and len(engines[0]) >= 4
    pictures = []
    for bundle in bundles:
        with load(bundle) as pipeline:
            pictures.append(np.asarray(pipeline("a large red star", seed=3)[0]))
    np.testing.assert_array_equal(*pictures)
