"""ControlNets as they are published: folders and files, and those that do not fit the base."""

from __future__ import annotations

import json
import os
from pathlib import Path

import factories
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.utils.state_dict_utils import convert_sai_sd_control_lora_state_dict_to_peft
from safetensors.torch import load_file

from lcm_compile import BuildSpec
from lcm_compile.builder.plan import make_plan
from lcm_compile.checkpoint.controlnet import original_keys, with_controlnets
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.checkpoint.random_weights import open_random
from lcm_compile.errors import CheckpointError, UsageError
from lcm_compile.spec import ControlNetSpec


@pytest.fixture(scope="module")
def nets(sd15_checkpoint, sdxl_checkpoint, tmp_path_factory):
    """Each family's base and a ControlNet for it."""
    folder = tmp_path_factory.mktemp("nets")
    return {
        "sd15": (sd15_checkpoint, factories.write_controlnet(sd15_checkpoint, folder / "sd15")),
        "sdxl": (sdxl_checkpoint, factories.write_controlnet(sdxl_checkpoint, folder / "sdxl")),
    }


def opened(base, *sources):
    return with_controlnets(open_checkpoint(str(base)), [str(source) for source in sources], half=False)


@pytest.mark.parametrize("layout", ["folder", "diffusers file", "control_model.", ""])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_layout_gives_the_same_weights(nets, family, layout, tmp_path):
    base, folder = nets[family]
    path = tmp_path / "net.safetensors"
    if layout == "folder":
        path = folder
    elif layout == "diffusers file":
        path.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    else:
        factories.write_original_controlnet(folder, path, layout.strip(), torch.float32)
    found = load_component(opened(base, path), "control")
    theirs = ControlNetModel.from_pretrained(folder)
    ignored = {"_name_or_path", "_use_default_values", "_class_name", "_diffusers_version"}
    for key, value in theirs.config.items():
        if key not in ignored and layout == "folder":
            assert found.config[key] == value, key
    weights = found.state_dict()
    for key, weight in theirs.state_dict().items():
        assert torch.equal(weights[key], weight), key


def test_a_file_in_fp16_of_a_checkpoint_with_its_base(nets, tmp_path):
    base, folder = nets["sd15"]
    path = factories.write_original_controlnet(folder, tmp_path / "net.safetensors")
    tensors = load_file(path) | {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    factories.save_tensors(tensors, path)
    torch.save(tensors, pickle := tmp_path / "net.pth")
    for file in (path, pickle):
        found = load_component(opened(base, file), "control").state_dict()
        for key, weight in ControlNetModel.from_pretrained(folder).state_dict().items():
            assert torch.equal(found[key], weight.half().float()), key


def test_the_originals_names_are_those_that_diffusers_converts(tmp_path):
    """Of a UNet of four blocks with two layers each, as SD1.5's, since diffusers' tables are for those."""
    net = ControlNetModel(
        block_out_channels=(8, 16, 16, 16), attention_head_dim=2, norm_num_groups=4, cross_attention_dim=8
    )
    names = dict(original_keys(net))
    tensors = {f"control_model.{names[key]}": weight for key, weight in net.state_dict().items()}
    theirs = convert_controlnet_checkpoint(tensors, FrozenDict({**net.config, "num_class_embeds": None}))
    assert theirs.keys() == net.state_dict().keys()
    for key, weight in net.state_dict().items():
        assert torch.equal(theirs[key], weight), key


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_control_lora_is_the_unet_changed(nets, family, tmp_path):
    base, _ = nets[family]
    path = factories.write_control_lora(base, tmp_path / "whole", tmp_path / "lora.safetensors")
    found = load_component(opened(base, path), "control").state_dict()
    whole = ControlNetModel.from_pretrained(tmp_path / "whole").state_dict()
    assert found.keys() == whole.keys()
    for key, weight in whole.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-5)


def test_a_control_loras_names_are_those_that_diffusers_converts(tmp_path):
    """Of a UNet of four blocks with two layers each, as SD1.5's, since diffusers' tables are for those.

    What its `load_lora_adapter` makes of them would lack the biases.
    """
    small = {**factories.SMALL_UNET, "layers_per_block": 2}
    types = {"down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")}
    types["up_block_types"] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    base = factories.write_sd15(tmp_path / "base", **small, **types)
    path = factories.write_control_lora(base, tmp_path / "whole", tmp_path / "lora.safetensors")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()
    theirs = convert_sai_sd_control_lora_state_dict_to_peft(load_file(path))
    ours = load_component(opened(base, path), "control").state_dict()
    assert len(theirs) > len(ours)
    for key, weight in ours.items():
        layer = key.removesuffix(".weight")
        if f"{layer}.lora_B.weight" in theirs:
            up, down = (theirs[f"{layer}.lora_{one}.weight"].flatten(1) for one in "BA")
            expected = unet[key] + (up @ down).reshape(weight.shape)
        else:
            expected = theirs[key]
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)


def test_a_control_lora_that_does_not_fit(nets, tmp_path):
    base, _ = nets["sd15"]
    path = factories.write_control_lora(base, tmp_path / "whole", tmp_path / "lora.safetensors")
    tensors = load_file(path)
    with pytest.raises(CheckpointError, match="random ones are asked for"):
        with_controlnets(open_random("sd15", 0), [str(path)], half=False)
    with pytest.raises(CheckpointError, match="is a ControlNet, not a base"):
        open_checkpoint(str(path))

    def load(told, **changes):
        changed = {key: t for key, t in {**tensors, **changes}.items() if t is not None}
        file = factories.save_tensors(changed, tmp_path / "changed.safetensors")
        with pytest.raises(CheckpointError, match=told):
            load_component(opened(base, file), "control")

    load("has no place for 1 weights", **{"time_embed.0.down": None})
    load("another shape of 1 weights", **{"input_blocks.0.0.down": torch.zeros(4, 9, 3, 3)})
    load("lacks 1 weights", **{"zero_convs.0.0.weight": None})
    wider = {k: t[..., :16] for k, t in tensors.items() if k.endswith("attn2.to_k.down")}
    load("is for a model with text states of 16", **wider)


def test_two_are_components_of_their_own_and_in_the_key(nets):
    base, folder = nets["sd15"]
    assert {"control", "control-2"} < opened(base, folder, folder).components.keys()

    def key(*controlnets):
        specs = tuple(ControlNetSpec.parse(text) for text in controlnets)
        spec = BuildSpec(str(base), no_lcm=True, backend="onnxruntime", controlnets=specs)
        assert " ".join(f"--controlnet {net.source}:{net.weight!r}" for net in specs) in spec.command()
        return make_plan(spec).key

    none, one, other = key(), key(str(folder)), key(f"{folder}:0.5")
    added = one.keys() - none.keys()
    assert {"base control/config.json", "ControlNet 1 weight", "precision of control"} < added
    assert {name: one[name] for name in none} == none
    assert {name for name in one if one[name] != other[name]} == {"ControlNet 1 weight"}


def test_those_that_do_not_fit_are_told(nets, tmp_path):
    sd15, net15 = nets["sd15"]
    sdxl, netxl = nets["sdxl"]
    file = factories.write_original_controlnet(netxl, tmp_path / "xl.safetensors")
    for source in (netxl, file):
        with pytest.raises(CheckpointError, match=r"is for SDXL.* cross_attention_dim 80.*the base has.* 32"):
            opened(sd15, source)
    with pytest.raises(CheckpointError, match="is for a model with text states of 32"):
        opened(sdxl, net15)
    narrow = factories.write_controlnet(sd15, tmp_path / "narrow", block_out_channels=(16, 64))
    with pytest.raises(CheckpointError, match=r"block_out_channels \[16, 64\]; the base has .*\[32, 64\]"):
        opened(sd15, narrow)


def changed(folder, to, **config):
    """A copy of a ControlNet's folder with another config."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    own = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(own | config))
    return to


def test_other_kinds_are_refused_by_name(nets, tmp_path):
    base, folder = nets["sd15"]
    pools = changed(folder, tmp_path / "pools", global_pool_conditions=True)
    union = changed(folder, tmp_path / "union", _class_name="ControlNetUnionModel")
    reads = changed(folder, tmp_path / "reads", conditioning_channels=4)
    path = factories.write_original_controlnet(folder, tmp_path / "net.safetensors")
    tensors = load_file(path)
    part = factories.save_tensors(tensors | {"difference": torch.zeros(0)}, tmp_path / "part.safetensors")
    none = factories.save_tensors({"a.weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    pickle = tmp_path / "net.pth"
    torch.save({"net": ControlNetModel}, pickle)
    for source, told in (
        (pools, "guess mode"),
        (union, "is a ControlNetUnionModel"),
        (reads, "reads 4 channels"),
        (part, "difference"),
        (none, "is no ControlNet"),
        (pickle, "is not a pickle of weights only"),
    ):
        with pytest.raises(CheckpointError, match=told):
            opened(base, source)
    with pytest.raises(UsageError, match="does not exist"):
        opened(base, tmp_path / "missing")
    short = dict(list(tensors.items())[:-1])
    factories.save_tensors(short, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        load_component(opened(base, tmp_path / "short.safetensors"), "control")


def test_a_file_of_a_hub_repository(nets):
    base, folder = nets["sd15"]
    snapshot = Path(os.environ["HF_HOME"]) / "hub/models--someone--nets/snapshots" / ("b" * 40)
    (snapshot / "rank128").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("b" * 40)
    factories.write_original_controlnet(folder, snapshot / "rank128/canny.safetensors")
    spec = ControlNetSpec.parse("someone/nets:rank128/canny.safetensors:0.5")
    assert (spec.source, spec.weight) == ("someone/nets:rank128/canny.safetensors", 0.5)
    component = opened(base, spec.source).components["control"]
    assert component.files == (snapshot / "rank128/canny.safetensors",)
    with pytest.raises(CheckpointError, match=r"someone/nets has no depth\.pth on the hub"):
        opened(base, "someone/nets:depth.pth")
    with pytest.raises(CheckpointError, match="neither a path nor in the hub cache"):
        opened(base, "someone/else:depth.pth")


def test_bad_options(nets, refused, tmp_path):
    base, folder = nets["sd15"]
    words = ["build", "--base", base, "--gpu", "cpu", "--no-lcm", "--out", tmp_path / "b", "--controlnet"]
    refused(2, "is not a number", *words, f"{folder}:strong")
    refused(2, "is not finite", *words, f"{folder}:nan")
    refused(2, "--whole-loop", *words, folder, "--whole-loop")
    refused(2, "4 at most", *words, *[folder, "--controlnet"] * 4, folder)
    assert not (tmp_path / "b").exists()
