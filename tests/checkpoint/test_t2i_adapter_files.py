"""T2I-Adapters as they are published: folders and files, and those that do not fit the base."""

from __future__ import annotations

import factories
import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file

from lcm_compile import BuildSpec
from lcm_compile.builder.plan import make_plan
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.checkpoint.t2i_adapter import shown_by, todays_names, with_t2i_adapters
from lcm_compile.errors import CheckpointError, UsageError
from lcm_compile.spec import T2IAdapterSpec

KINDS = {
    "full_adapter": {"channels": [32, 64, 64]},
    "light_adapter": {"channels": [32, 64], "num_res_blocks": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return factories.write_sd15(tmp_path_factory.mktemp("deep") / "base", **factories.DEEP_SD15)


@pytest.fixture(scope="module", params=KINDS)
def adapter(request, tmp_path_factory):
    """The folder of a T2I-Adapter of each kind for SD1.5's architecture."""
    folder = tmp_path_factory.mktemp("adapter") / request.param
    return factories.write_t2i_adapter(folder, adapter_type=request.param, **KINDS[request.param])


def opened(base, source):
    return with_t2i_adapters(open_checkpoint(str(base)), [str(source)], half=False)


@pytest.mark.parametrize("layout", ["folder", "diffusers file", "original file"])
def test_every_layout_gives_the_same_model(base, adapter, layout, tmp_path):
    source = adapter
    if layout == "diffusers file":
        source = adapter / "diffusion_pytorch_model.safetensors"
    elif layout == "original file":
        source = factories.write_original_t2i_adapter(adapter, tmp_path / "adapter.pth")
        assert not any(key.startswith("adapter.") for key in torch.load(source))
    found = load_component(opened(base, source), "t2i-adapter")
    theirs = T2IAdapter.from_pretrained(adapter)
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(found(picture), theirs(picture), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("kind", "channels", "settings"),
    [
        # What TencentARC's t2iadapter_canny_sd15v2.pth and t2iadapter_color_sd14v1.pth have, and SDXL's.
        ("full_adapter", [320, 640, 1280, 1280], {"in_channels": 1}),
        ("light_adapter", [320, 640, 1280], {"num_res_blocks": 4}),
        ("full_adapter_xl", [320, 640, 1280, 1280], {"downscale_factor": 16}),
    ],
)
def test_the_settings_of_published_files_are_shown_by_their_shapes(kind, channels, settings):
    with torch.device("meta"):
        model = T2IAdapter(channels=channels, adapter_type=kind, **settings)
    shown = shown_by({key: tuple(weight.shape) for key, weight in model.state_dict().items()})
    assert {key: model.config[key] for key in shown} == shown


def test_the_originals_names_are_those_of_its_code():
    """github.com/TencentARC/T2I-Adapter, ldm/modules/encoders/adapter.py: Adapter and Adapter_light."""
    assert todays_names({"conv_in.bias": 1, "body.5.block1.weight": 2, "body.4.in_conv.bias": 3}) == {
        "adapter.conv_in.bias": 1,
        "adapter.body.2.resnets.1.block1.weight": 2,
        "adapter.body.2.in_conv.bias": 3,
    }
    light = {"body.0.out_conv.weight": 1, "body.3.body.2.block1.weight": 2, "body.1.in_conv.bias": 3}
    assert todays_names(light) == {
        "adapter.body.0.out_conv.weight": 1,
        "adapter.body.3.resnets.2.block1.weight": 2,
        "adapter.body.1.in_conv.bias": 3,
    }


def test_two_are_components_of_their_own_and_in_the_key(base, adapter):
    def key(*adapters):
        specs = tuple(T2IAdapterSpec.parse(text) for text in adapters)
        spec = BuildSpec(str(base), no_lcm=True, backend="onnxruntime", t2i_adapters=specs)
        assert " ".join(f"--t2i-adapter {one.source}:{one.weight!r}" for one in specs) in spec.command()
        return make_plan(spec).key

    none, one, other = key(), key(str(adapter)), key(f"{adapter}:0.5")
    added = one.keys() - none.keys()
    assert {"base t2i-adapter/config.json", "T2I-Adapter 1 weight", "precision of t2i-adapter"} < added
    assert {name for name in one if one[name] != other[name]} == {"T2I-Adapter 1 weight"}
    assert {"base t2i-adapter-2/config.json"} < key(str(adapter), str(adapter)).keys() - one.keys()


def test_those_that_do_not_fit_are_told(base, tmp_path):
    def refused(told, **config):
        folder = factories.write_t2i_adapter(tmp_path / told[:5], **config)
        with pytest.raises(CheckpointError, match=told):
            opened(base, folder)

    refused("are 32×1, 64×2, 48×4; the base takes 32×1, 64×2, 64×4, 64×4", channels=[32, 64, 48])
    refused("for another base", channels=[32, 64, 64], adapter_type="full_adapter_xl")
    refused("reads 4 channels", channels=[32, 64, 64], in_channels=4)


def test_a_side_that_it_can_not_divide(refused, tmp_path):
    deep = factories.write_sdxl(tmp_path / "xl", factor=8, **factories.DEEP_SDXL)
    options = {"channels": [32, 64, 64, 64], "adapter_type": "full_adapter_xl", "downscale_factor": 16}
    folder = factories.write_t2i_adapter(tmp_path / "adapter", **options)
    words = ["build", "--base", deep, "--gpu", "cpu", "--out", tmp_path / "b", "--t2i-adapter", folder]
    refused(2, ["height 72 is not a multiple of 16", "--height 64"], *words, "--height", 72)
    refused(2, "T2I-Adapter weight 'x'", *words[:-1], f"{folder}:x")
    assert not (tmp_path / "b").exists()


def test_other_kinds_are_refused_by_name(base, adapter, tmp_path):
    path = factories.write_original_t2i_adapter(adapter, tmp_path / "adapter.pth")
    tensors, one = torch.load(path), torch.zeros(1)
    for key, told in {
        "task_embedding": "is the fuser of CoAdapters",
        "style_embedding": "is a style adapter",
        "body.2.down_opt.op.weight": "of the first version, whose downsampling",
        "body.0.skep.weight": "of the first version, whose shortcuts",
    }.items():
        torch.save(tensors | {key: one}, path)
        with pytest.raises(CheckpointError, match=told):
            opened(base, path)
    torch.save({"a.weight": one}, path)
    with pytest.raises(CheckpointError, match="is no T2I-Adapter"):
        opened(base, path)
    net = factories.write_controlnet(base, tmp_path / "net")
    with pytest.raises(CheckpointError, match="is a ControlNetModel, and a T2IAdapter is needed"):
        opened(base, net)
    with pytest.raises(UsageError, match=r"--t2i-adapter .*missing does not exist"):
        opened(base, tmp_path / "missing")
    short = load_file(adapter / "diffusion_pytorch_model.safetensors")
    short.pop("adapter.body.1.in_conv.bias")
    factories.save_tensors(short, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        load_component(opened(base, tmp_path / "short.safetensors"), "t2i-adapter")
