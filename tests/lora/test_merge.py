"""LoRA files against PEFT's own merge; layouts; refusals that name keys are in test_bad_loras."""

from __future__ import annotations

import json

import factories
import pytest
import torch
from diffusers import UNet2DConditionModel
from factories import fuse_loras, load_modules
from peft import LoraConfig
from safetensors.torch import save_file

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.errors import LoraError
from lcm_compile.lora.read import read_lora
from lcm_compile.spec import LoraSpec


@pytest.fixture
def modules(sdxl_checkpoint):
    return load_modules(open_checkpoint(str(sdxl_checkpoint)))


def weights(module):
    return {name: p.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("alpha", [None, 1.0, 4.0, 8.0])
def test_fuse_is_exact(modules, tmp_path, layout, alpha):
    """W + λ·(α/r)·B·A in float64, for every weight; others untouched."""
    path = factories.write_lora(Pipe(modules), tmp_path / "lora.safetensors", layout, rank=4, alpha=alpha)
    before = {c: weights(m) for c, m in modules.named().items()}
    used = fuse_loras(modules.named(), [(read_lora(path), LoraSpec(str(path), -0.7))])
    scale = -0.7 * (1.0 if alpha is None or layout == "peft" else alpha / 4)
    generator = torch.Generator().manual_seed(0)
    updated = set()
    for component, name, layer in factories.lora_modules(Pipe(modules), text=True):
        old = before[component][f"{name}.weight"]
        down = torch.randn(4, *old.shape[1:], generator=generator) * 0.2
        up = torch.randn(old.shape[0], 4, *(1 for _ in old.shape[2:]), generator=generator) * 0.2
        delta = (up.double().flatten(1) @ down.double().flatten(1)).reshape(old.shape)
        torch.testing.assert_close(layer.weight.double(), old.double() + scale * delta, rtol=1e-6, atol=1e-6)
        updated.add((component, f"{name}.weight"))
    assert used[0].modules == len(updated)
    for component, module in modules.named().items():
        for name, parameter in module.named_parameters():
            if (component, name) not in updated:
                assert torch.equal(parameter, before[component][name]), name


class Pipe:
    """Just enough of a pipeline for the factories."""

    def __init__(self, modules):
        self.__dict__.update(modules.named())


def test_two_loras_add_up_in_any_order(modules, sdxl_checkpoint, tmp_path):
    paths = [
        factories.write_lora(Pipe(modules), tmp_path / f"{i}.safetensors", layout, seed=i)
        for i, layout in enumerate(("kohya", "peft"))
    ]
    other = load_modules(open_checkpoint(str(sdxl_checkpoint)))
    pairs = [(read_lora(p), LoraSpec(str(p), w)) for p, w in zip(paths, (1.0, -0.4), strict=True)]
    fuse_loras(modules.named(), pairs)
    fuse_loras(other.named(), pairs[::-1])
    torch.testing.assert_close(weights(modules.unet), weights(other.unet), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_settings_that_diffusers_writes(modules, tmp_path, rslora):
    """α, α patterns and rank-stabilised scaling from the metadata, against PEFT's own merge."""
    unet = UNet2DConditionModel.from_config(modules.unet.config)
    unet.load_state_dict(modules.unet.state_dict())
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "conv1"],
        alpha_pattern={"conv1": 3},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    unet.add_adapter(config)
    tensors = {
        "unet." + name.replace(".default", ""): p.detach().clone()
        for name, p in unet.named_parameters()
        if ".lora_" in name
    }
    settings = {f"unet.{k}": v for k, v in config.to_dict().items() if not isinstance(v, set)}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, default=str)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    fuse_loras(modules.named(), [(read_lora(tmp_path / "lora.safetensors"), LoraSpec("x"))])
    unet.fuse_lora()
    theirs = {n.replace(".base_layer", ""): p for n, p in unet.named_parameters() if ".lora_" not in n}
    for name, parameter in modules.unet.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)


def test_linear_update_of_a_1x1_convolution(sd15_checkpoint, tmp_path):
    """SD1.5's proj_in is a convolution; kohya files store such updates as 1×1 kernels or as matrices."""
    modules = load_modules(open_checkpoint(str(sd15_checkpoint)))
    name = "down_blocks.0.attentions.0.proj_in"
    layer = modules.unet.get_submodule(name)
    before = layer.weight.clone()
    down, up = torch.randn(2, before.shape[1]), torch.randn(before.shape[0], 2)
    key = "lora_unet_" + name.replace(".", "_")
    path = tmp_path / "lora.safetensors"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, path)
    fuse_loras(modules.named(), [(read_lora(path), LoraSpec("x"))])
    torch.testing.assert_close(layer.weight[:, :, 0, 0], before[:, :, 0, 0] + up @ down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".pth"])
def test_a_colon_in_a_name_is_no_weights(suffix):
    assert LoraSpec.parse(f"a:b{suffix}") == LoraSpec(f"a:b{suffix}")
    assert LoraSpec.parse(f"a:b{suffix}:0.5") == LoraSpec(f"a:b{suffix}", 0.5)


def test_nothing_is_fused_when_one_of_two_does_not_fit(modules, tmp_path):
    good = factories.write_lora(Pipe(modules), tmp_path / "good.safetensors", "peft")
    bad = factories.save_tensors(
        {
            "lora_unet_nowhere.lora_down.weight": torch.ones(1, 4),
            "lora_unet_nowhere.lora_up.weight": torch.ones(4, 1),
        },
        tmp_path / "bad.safetensors",
    )
    before = weights(modules.unet)
    with pytest.raises(LoraError, match="lora_unet_nowhere"):
        fuse_loras(modules.named(), [(read_lora(p), LoraSpec(str(p))) for p in (good, bad)])
    assert all(torch.equal(p, before[n]) for n, p in modules.unet.named_parameters())


def test_a_lora_that_changes_nothing_is_refused(modules, tmp_path):
    key = "lora_unet_down_blocks_1_attentions_0_proj_in"
    width = modules.unet.get_submodule("down_blocks.1.attentions.0.proj_in").weight.shape[0]
    path = factories.save_tensors(
        {f"{key}.lora_down.weight": torch.ones(2, width), f"{key}.lora_up.weight": torch.zeros(width, 2)},
        tmp_path / "zero.safetensors",
    )
    with pytest.raises(LoraError, match="changes nothing"):
        fuse_loras(modules.named(), [(read_lora(path), LoraSpec("x"))])
