"""IP-Adapters and image encoders as they are published, and those that do not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import factories
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from lcm_compile import BuildSpec
from lcm_compile.builder.plan import make_plan
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.ip_adapter import (
    IP_ENCODER,
    IP_LAYERS,
    IP_PROJECTION,
    tokens_shape,
    with_ip_adapter,
)
from lcm_compile.checkpoint.load import load_component
from lcm_compile.errors import CheckpointError, UsageError
from lcm_compile.spec import IpAdapterSpec


@pytest.fixture(scope="module")
def published(sd15_checkpoint, sdxl_checkpoint, tmp_path_factory):
    """The folders of h94/IP-Adapter: SDXL has an encoder of its own, and an adapter for that of SD1.5."""
    root = tmp_path_factory.mktemp("published")
    models, sdxl = root / "models", root / "sdxl_models"
    for kind in ("base", "plus", "full"):
        factories.write_ip_adapter(sd15_checkpoint, models / f"{kind}_sd15.safetensors", kind)
    factories.write_ip_adapter(sd15_checkpoint, models / "base_sd15.bin")
    factories.write_ip_adapter(sdxl_checkpoint, sdxl / "base_sdxl.safetensors", embedding=40, hidden=48)
    factories.write_ip_adapter(sdxl_checkpoint, sdxl / "plus_sdxl_vit-h.safetensors", "plus")
    factories.write_image_encoder(models / "image_encoder")
    factories.write_image_encoder(sdxl / "image_encoder", hidden=48, projection=40)
    return root


def opened(base, source, encoder=None):
    return with_ip_adapter(open_checkpoint(str(base)), str(source), encoder and str(encoder), half=False)


def conversions(base, file):
    """What diffusers makes of a file: the projection, and the layers of all attentions in their order."""
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in load_file(file).items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    made = unet._convert_ip_adapter_image_proj_to_diffusers(parts["image_proj"], low_cpu_mem_usage=False)
    processors = unet._convert_ip_adapter_attn_to_diffusers([parts], low_cpu_mem_usage=False)
    return made, [one for one in processors.values() if hasattr(one, "to_k_ip")]


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_weights_are_those_that_diffusers_reads(published, sd15_checkpoint, kind):
    file = published / f"models/{kind}_sd15.safetensors"
    checkpoint = opened(sd15_checkpoint, file)
    theirs, processors = conversions(sd15_checkpoint, file)
    ours = load_component(checkpoint, IP_PROJECTION)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], weight), key
    seen = torch.randn((1, 24) if kind == "base" else (1, 5, 32))
    assert torch.equal(ours(seen), theirs(seen)) and ours(seen).shape == tokens_shape(checkpoint)
    layers = load_component(checkpoint, IP_LAYERS)
    assert len(processors) == len(layers) > 2
    for i, processor in enumerate(processors):
        pair = layers[str(2 * i + 1)]
        assert torch.equal(pair["to_k_ip"].weight, processor.to_k_ip[0].weight)
        assert torch.equal(pair["to_v_ip"].weight, processor.to_v_ip[0].weight)
    encoder = load_component(checkpoint, IP_ENCODER).state_dict()
    reference = CLIPVisionModelWithProjection.from_pretrained(published / "models/image_encoder")
    for key, weight in reference.state_dict().items():
        assert torch.equal(encoder[key], weight), key


def test_a_pickle_has_the_same_weights(published, sd15_checkpoint):
    found = [opened(sd15_checkpoint, published / f"models/base_sd15.{end}") for end in ("bin", "safetensors")]
    for name in (IP_PROJECTION, IP_LAYERS):
        one, other = (load_component(checkpoint, name).state_dict() for checkpoint in found)
        assert all(torch.equal(one[key], other[key]) for key in other) and one.keys() == other.keys()


def test_the_encoder_that_fits_is_found(published, sdxl_checkpoint, sd15_checkpoint, tmp_path):
    def encoder(base, source, given=None):
        return opened(base, source, given).components[IP_ENCODER].folder

    assert encoder(sdxl_checkpoint, published / "sdxl_models/base_sdxl.safetensors") == (
        published / "sdxl_models/image_encoder"
    )
    shared = published / "sdxl_models/plus_sdxl_vit-h.safetensors"
    assert encoder(sdxl_checkpoint, shared) == published / "models/image_encoder"
    alone = tmp_path / "alone"
    alone.mkdir()
    file = shutil.copy(published / "models/base_sd15.safetensors", alone)
    with pytest.raises(CheckpointError, match="has no image encoder: there is none in"):
        opened(sd15_checkpoint, file)
    given = published / "models/image_encoder"
    assert encoder(sd15_checkpoint, alone, given) == given  # the only file in its folder
    with pytest.raises(CheckpointError, match=r"does not fit.* gives 40 numbers \(projection_dim\), and 24"):
        opened(sd15_checkpoint, file, published / "sdxl_models/image_encoder")
    shutil.copytree(published / "sdxl_models/image_encoder", alone / "image_encoder")
    with pytest.raises(CheckpointError, match="none of those beside it fits"):
        opened(sd15_checkpoint, file)


def test_on_the_hub(published, sdxl_checkpoint, sd15_checkpoint):
    """Of the hub's cache, as tests have no network."""
    cache = Path(os.environ["HF_HOME"]) / "hub/models--h94--IP-Adapter"
    snapshot = cache / "snapshots" / ("a" * 40)
    shutil.copytree(published, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("a" * 40)
    try:
        found = opened(sdxl_checkpoint, "h94/IP-Adapter:sdxl_models/plus_sdxl_vit-h.safetensors")
        assert found.components[IP_LAYERS].files == (snapshot / "sdxl_models/plus_sdxl_vit-h.safetensors",)
        assert found.components[IP_ENCODER].folder == snapshot / "models/image_encoder"
        file = published / "models/base_sd15.safetensors"
        given = opened(sd15_checkpoint, file, "h94/IP-Adapter:models/image_encoder")
        assert given.components[IP_ENCODER].folder == snapshot / "models/image_encoder"
        with pytest.raises(CheckpointError, match="has no models/none"):
            opened(sdxl_checkpoint, "h94/IP-Adapter:models/none.safetensors")
        with pytest.raises(UsageError, match="has no file of weights"):
            opened(sdxl_checkpoint, "h94/IP-Adapter")
    finally:
        shutil.rmtree(cache)
    with pytest.raises(CheckpointError, match="neither a path nor in the hub cache"):
        opened(sdxl_checkpoint, "h94/IP-Adapter:models/base_sd15.safetensors")


def test_those_that_do_not_fit_are_told(published, sd15_checkpoint, sdxl_checkpoint, refused, tmp_path):
    with pytest.raises(CheckpointError, match=r"tokens of width 32, .* SDXL.*, reads tokens of width 80"):
        opened(sdxl_checkpoint, published / "models/base_sd15.safetensors")
    tensors = load_file(published / "models/base_sd15.safetensors")
    fewer = {key: tensor for key, tensor in tensors.items() if not key.startswith("ip_adapter.5.")}
    file = factories.save_tensors(fewer, tmp_path / "fewer.safetensors")
    words = ["build", "--base", sd15_checkpoint, "--gpu", "cpu", "--no-lcm", "--out", tmp_path / "b"]
    words += ["--ip-encoder", published / "models/image_encoder", "--ip-adapter", file]
    for more in ([], ["--dry-run"]):
        refused(1, ["for 3 cross-attentions", "has 4", "--ip-adapter"], *words, *more)
    lacking = {key: tensor for key, tensor in tensors.items() if "image_proj.proj.bias" not in key}
    factories.save_tensors(lacking, file)
    refused(1, ["lacks 1 weights", "--ip-adapter"], *words)
    assert not (tmp_path / "b").exists()


def test_other_kinds_are_refused_by_name(published, sd15_checkpoint, tmp_path):
    tensors = load_file(published / "models/base_sd15.safetensors")
    layers = {key: tensor for key, tensor in tensors.items() if key.startswith("ip_adapter.")}
    face = {
        f"image_proj.{key}": torch.zeros(4, 4) for key in ("proj.0.weight", "proj.2.weight", "norm.weight")
    }
    face_plus = {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(4, 4)}
    lora = {"ip_adapter.0.to_k_lora.down.weight": torch.zeros(4, 4)}
    for name, content, told in (
        ("face", {**layers, **face}, "is a FaceID IP-Adapter.*insightface"),
        ("face-plus", {**layers, **face_plus}, "is a FaceID IP-Adapter"),
        ("lora", {**tensors, **lora}, "has ip_adapter.0.to_k_lora"),
        ("none", {"a.weight": torch.zeros(1)}, "is no IP-Adapter"),
        ("no-layers", {k: t for k, t in tensors.items() if k not in layers}, "is no IP-Adapter: it has no"),
        ("no-norm", {k: t for k, t in tensors.items() if "norm" not in k}, "lacks a part of its projection"),
    ):
        path = factories.save_tensors(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=told):
            opened(sd15_checkpoint, path)
    with pytest.raises(UsageError, match="does not exist"):
        opened(sd15_checkpoint, tmp_path / "missing.safetensors")
    with pytest.raises(UsageError, match=r"has 6 files \(face-plus"):
        opened(sd15_checkpoint, tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        opened(sd15_checkpoint, published / "models/base_sd15.safetensors", tmp_path / "missing")


def test_the_key_has_the_adapter_its_encoder_and_its_weight(published, sd15_checkpoint, tmp_path):
    root = shutil.copytree(published / "models", tmp_path / "models")
    file = root / "base_sd15.safetensors"

    def key(*adapter):
        spec = BuildSpec(
            str(sd15_checkpoint),
            no_lcm=True,
            backend="onnxruntime",
            ip_adapter=IpAdapterSpec.parse(adapter[0]) if adapter else None,
        )
        assert not adapter or f"--ip-adapter {spec.ip_adapter.source}:" in spec.command()
        return make_plan(spec).key

    def differing(other):
        return {name for name in one if one[name] != other[name]}

    none, one = key(), key(str(file))
    assert none.items() <= one.items()
    assert {"IP-Adapter weight", "base image_encoder/config.json", "precision of ip-image"} < one.keys()
    assert differing(key(f"{file}:0.5")) == {"IP-Adapter weight"}
    factories.write_ip_adapter(sd15_checkpoint, file, seed=8)
    assert differing(key(str(file))) == {"base image_projection/file", "base ip_layers/file"}
    shutil.copy(published / "models/base_sd15.safetensors", file)
    factories.write_image_encoder(root / "image_encoder", seed=8)
    assert differing(key(str(file))) == {"base image_encoder/model.safetensors"}


def test_bad_options(published, sd15_checkpoint, refused, tmp_path):
    file = published / "models/base_sd15.safetensors"
    words = ["build", "--base", sd15_checkpoint, "--gpu", "cpu", "--no-lcm", "--out", tmp_path / "b"]
    refused(2, "is not a number", *words, "--ip-adapter", f"{file}:strong")
    refused(2, "is not finite", *words, "--ip-adapter", f"{file}:nan")
    refused(2, "--whole-loop", *words, "--ip-adapter", file, "--whole-loop")
    refused(2, "2 IP-Adapters are given, and a bundle has one", *words, *["--ip-adapter", file] * 2)
    refused(2, "without the IP-Adapter", *words, "--ip-encoder", published / "models/image_encoder")
    assert not (tmp_path / "b").exists()
