"""Whole UNets adapted and written by LyCORIS: our fusion of its files is held to its own modules' outputs."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from factories import fuse_loras, save_tensors
from safetensors.torch import load_file

from lcm_compile.errors import LoraError
from lcm_compile.lora.read import read_lora
from lcm_compile.spec import LoraSpec

create_lycoris = pytest.importorskip("lycoris").create_lycoris
from lycoris.modules import ButterflyOFTModule, DiagOFTModule, GLoRAModule, IA3Module  # noqa: E402

LOCON = {"lora_down.weight", "lora_up.weight"}
LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LOKR = {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}
LOHA_CORES = {"hada_t1", "hada_t2"}
CORES, DORA = {"use_tucker": True}, {"dora_wd": True}
INPUTS = {"dora_wd": True, "wd_on_output": False}  # magnitudes of inputs
NORMS = {"w_norm", "b_norm"}

# What LyCORIS is asked for, and the parts of modules that its file then has.
CASES = {
    "LoCon": ({"algo": "locon"}, LOCON),
    "LoCon, scalar": ({"algo": "locon", "use_scalar": True}, LOCON),
    "LoCon, cores": ({"algo": "locon", **CORES}, {*LOCON, "lora_mid.weight"}),
    "LoHa": ({"algo": "loha"}, LOHA),
    "LoHa, scalar": ({"algo": "loha", "use_scalar": True}, LOHA),
    "LoHa, cores": ({"algo": "loha", **CORES}, LOHA | LOHA_CORES),
    "LoKr": ({"algo": "lokr", "factor": 4}, LOKR),
    "LoKr, scalar": ({"algo": "lokr", "factor": 4, "use_scalar": True}, LOKR),
    "LoKr, cores": ({"algo": "lokr", "factor": 4, **CORES}, {*LOKR, "lokr_t2"}),
    "LoKr, both decomposed": (
        {"algo": "lokr", "factor": 8, "decompose_both": True},
        {*LOKR, "lokr_w1_a", "lokr_w1_b"},
    ),
    "LoKr, whole": ({"algo": "lokr", "factor": 4, "full_matrix": True}, {"lokr_w1", "lokr_w2"}),
    "DoRA": ({"algo": "locon", **DORA}, {*LOCON, "dora_scale"}),
    "DoRA of LoCon, cores": ({"algo": "locon", **DORA, **CORES}, {*LOCON, "lora_mid.weight", "dora_scale"}),
    "DoRA of LoHa, cores": ({"algo": "loha", **DORA, **CORES}, LOHA | LOHA_CORES | {"dora_scale"}),
    "DoRA of LoKr": ({"algo": "lokr", "factor": 4, **DORA}, {*LOKR, "dora_scale"}),
    "DoRA of inputs": ({"algo": "locon", **INPUTS}, {*LOCON, "dora_scale"}),
    "DoRA of LoHa's inputs": ({"algo": "loha", **INPUTS}, {*LOHA, "dora_scale"}),
    "full": ({"algo": "full"}, {"diff", "diff_b"}),
}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=8,
    ).requires_grad_(False)


def adapted(base, multiplier, path, **options):
    """A copy of the UNet with LyCORIS's random adapters on every layer, in float64; its file is at `path`."""
    unet, generator = copy.deepcopy(base), torch.Generator().manual_seed(1)
    level, logger = logging.INFO, logging.getLogger("LyCORIS")
    logger.setLevel(logging.ERROR)
    network = create_lycoris(
        unet,
        multiplier,
        linear_dim=2,
        linear_alpha=1.5,
        conv_dim=3,
        conv_alpha=2.5,
        train_norm=True,
        **options,
    )
    logger.setLevel(level)
    for layer in network.loras:
        for name, parameter in layer.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter * (1 + 0.3 * drawn) if name == "dora_scale" else 0.3 * drawn
    network.apply_to()
    network.save_weights(str(path), None, {})
    network.double().eval()
    return unet.double().eval(), {layer.lora_name for layer in network.loras}


def calls(unet):
    """Each layer's input and output in one call of the UNet."""
    seen = {}

    def record(name):
        def hook(layer, given, made):
            seen[name] = given[0], made

        return hook

    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d | torch.nn.GroupNorm | torch.nn.LayerNorm):
            layer.register_forward_hook(record(name))
    generator = torch.Generator().manual_seed(2)
    latent, states = (torch.randn(s, generator=generator).double() for s in ((1, 4, 8, 8), (1, 5, 24)))
    with torch.no_grad():
        unet(latent, torch.tensor([500.0]).double(), states)
    return seen


# A DoRA at strength 1 alone: at others LyCORIS keeps ΔW whole and weakens its magnitude, so that 0 is not the
# base. We go from W to W' in a straight line, as ComfyUI does.
STRENGTHS = [(case, 1.0) for case in CASES] + [
    (c, -0.6) for c, (asked, _) in CASES.items() if "dora_wd" not in asked
]


@pytest.mark.parametrize(("case", "strength"), STRENGTHS)
def test_every_layer_gives_what_lycoris_gives(base, case, strength, tmp_path):
    options, parts = CASES[case]
    path = tmp_path / "lora.safetensors"
    theirs, names = adapted(base, strength, path, **options)
    assert {key.partition(".")[2] for key in load_file(path)} - {"alpha"} == parts | NORMS
    ours = copy.deepcopy(base)
    (told,) = fuse_loras({"unet": ours}, [(read_lora(path), LoraSpec("x", strength))])
    ours.double()
    compared = 0
    for name, (given, expected) in calls(theirs).items():
        if f"lycoris_{name.replace('.', '_')}" in names:
            layer = ours.get_submodule(name)
            error = (layer(given) - expected).abs().max() / expected.abs().max()
            assert error < 1e-6, (name, float(error))
            assert not torch.equal(layer.weight, base.get_submodule(name).weight.double()), name
            compared += 1
    assert compared == len(names) == told.modules > 50


# A class of LyCORIS's modules, what it is asked for, and the parts that its file then has.
MULTIPLYING = {
    "OFT": (DiagOFTModule, {}, {"oft_blocks", "alpha"}),
    "OFT, constrained": (DiagOFTModule, {"constraint": 0.01}, {"oft_blocks", "alpha"}),
    "OFT, rescaled": (DiagOFTModule, {"rescaled": True}, {"oft_blocks", "alpha", "rescale"}),
    "BOFT": (ButterflyOFTModule, {}, {"oft_blocks", "alpha"}),
    "BOFT, constrained": (ButterflyOFTModule, {"constraint": 0.01}, {"oft_blocks", "alpha"}),
    "BOFT, rescaled": (ButterflyOFTModule, {"rescaled": True}, {"oft_blocks", "alpha", "rescale"}),
    "(IA)³": (IA3Module, {}, {"weight", "on_input"}),
    "(IA)³ of inputs": (IA3Module, {"train_on_input": True}, {"weight", "on_input"}),
    "GLoRA": (GLoRAModule, {"alpha": 2.5}, {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"}),
}
LAYERS = {"linear": torch.nn.Linear(24, 48), "kernel": torch.nn.Conv2d(24, 48, 3)}


def multiplied(case, name, strength):
    """LyCORIS's merged weight, and the tensors of its file."""
    kind, asked, parts = MULTIPLYING[case]
    torch.manual_seed(5)
    layer = copy.deepcopy(LAYERS[name]).requires_grad_(False)
    module = kind(f"lora_te_{name}", layer, strength, lora_dim=6, **asked)
    for part, parameter in module.named_parameters():
        parameter.data = (part == "rescale") + 0.3 * torch.randn(parameter.shape)
    tensors = {f"lora_te_{name}.{part}": t.detach() for part, t in module.state_dict().items()}
    assert {key.partition(".")[2] for key in tensors} == parts
    return module.get_merged_weight(strength)[0].detach(), tensors


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.6])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", MULTIPLYING)
def test_a_kind_that_multiplies_the_weight_is_merged_as_lycoris_does(case, name, strength, tmp_path):
    """OFT's strength is no factor of its change; LyCORIS inverts its matrices in fp32."""
    expected, tensors = multiplied(case, name, strength)
    path = save_tensors(tensors, tmp_path / "lora.safetensors")
    ours = torch.nn.ModuleDict(copy.deepcopy(LAYERS))
    lora = read_lora(path)
    fuse_loras({"text_encoder": ours}, [(lora, LoraSpec("x", strength))])
    assert [*lora.kinds] == [case.partition(",")[0].partition(" of")[0]]
    torch.testing.assert_close(ours[name].weight, expected, rtol=2e-6, atol=2e-6)
    assert (ours[name].weight - LAYERS[name].weight).abs().max() > 0.005


@pytest.mark.parametrize("case", MULTIPLYING)
def test_such_a_kind_for_another_layer_is_refused(case, tmp_path):
    """The base is left as it was; so it is by one without its other half, and at strength 0."""
    _, tensors = multiplied(case, "linear", 1.0)
    path = save_tensors(tensors, tmp_path / "lora.safetensors")
    for other in (torch.nn.Linear(12, 40), torch.nn.Linear(23, 47)):
        ours = torch.nn.ModuleDict({"linear": copy.deepcopy(other)})
        with pytest.raises(LoraError, match=r"linear \(.* update with .*, weight \d+×\d+\)"):
            fuse_loras({"text_encoder": ours}, [(read_lora(path), LoraSpec("x"))])
        assert torch.equal(ours["linear"].weight, other.weight)
    ours = torch.nn.ModuleDict(copy.deepcopy(LAYERS))
    fuse_loras({"text_encoder": ours}, [(read_lora(path), LoraSpec("x", 0.0))])
    assert torch.equal(ours["linear"].weight, LAYERS["linear"].weight)
    half = next(key for key in tensors if key.endswith((".on_input", ".b2.weight", ".oft_blocks")))
    del tensors[half]
    with pytest.raises(LoraError, match=r"lacks factors that go with|no LoRA layout"):
        read_lora(save_tensors(tensors, path))
