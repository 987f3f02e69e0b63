"""Every kind of update against PEFT's unmerged adapters, or against its published formula, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from factories import fuse_loras, save_tensors
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.nn import functional as F

from lcm_compile.errors import LoraError
from lcm_compile.lora.read import read_lora
from lcm_compile.spec import LoraSpec

RANK, ALPHA = 4, 6.0
NAMES = ["linear", "point", "kernel"]


class Layers(nn.Module):
    """One module of each sort that adapters are made for, side by side."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(24, 40)
        self.point = nn.Conv2d(24, 40, 1)
        self.kernel = nn.Conv2d(24, 40, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 24)

    def forward(self, pictures):  # (batch, 24, h, w)
        vectors = pictures.mean((2, 3))
        return {
            "linear": self.linear(vectors),
            "point": self.point(pictures),
            "kernel": self.kernel(pictures),
            "norm": self.norm(pictures),
        }


PICTURES = torch.randn(2, 24, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fused(*loras):
    """Copies of the layers with (tensors' path, λ) fused in fp32, to be run in float64."""
    layers = Layers()
    fuse_loras({"text_encoder": layers}, [(read_lora(path), LoraSpec("x", weight)) for path, weight in loras])
    return layers.double()


def assert_same(ours, theirs):
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-6, (name, float(error))


def adapted(config):
    """PEFT's adapters on the layers, with every factor drawn at random and every magnitude moved."""
    model = get_peft_model(Layers(), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
        elif any(part in name for part in ("lora_", "hada_", "lokr_")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def kohya_keys(state):
    """PEFT's keys as LyCORIS spells them; its DoRA column is PEFT's magnitude."""
    tensors = {}
    for key, tensor in state.items():
        module, _, part = key.removeprefix("base_model.model.").partition(".")
        part = part.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        if part == "lora_magnitude_vector":
            ones = [1] * (Layers().get_submodule(module).weight.ndim - 1)
            part, tensor = "dora_scale", tensor.reshape(-1, *ones)
        tensors[f"lora_te_{module}.{part}"] = tensor.contiguous()
        tensors[f"lora_te_{module}.alpha"] = torch.tensor(ALPHA)
    return tensors


TARGETS = {"target_modules": NAMES, "r": RANK}
CONFIGS = {
    "LoRA": LoraConfig(lora_alpha=ALPHA, **TARGETS),
    "DoRA": LoraConfig(lora_alpha=ALPHA, use_dora=True, **TARGETS),
    "LoHa": LoHaConfig(alpha=ALPHA, init_weights=False, **TARGETS),
    "LoHa, cores": LoHaConfig(alpha=ALPHA, use_effective_conv2d=True, init_weights=False, **TARGETS),
    "LoKr": LoKrConfig(alpha=ALPHA, init_weights=False, decompose_factor=2, **TARGETS),
    "LoKr, cores": LoKrConfig(
        alpha=ALPHA, use_effective_conv2d=True, init_weights=False, decompose_factor=2, **TARGETS
    ),
    "LoKr, both decomposed": LoKrConfig(
        alpha=ALPHA,
        decompose_both=True,
        decompose_factor=20,
        init_weights=False,
        target_modules=NAMES,
        r=1,
    ),
}
PARTS = {
    "LoRA": {"lora_down.weight", "lora_up.weight"},
    "DoRA": {"lora_down.weight", "lora_up.weight", "dora_scale"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "LoHa, cores": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    "LoKr": {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    "LoKr, cores": {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
    "LoKr, both decomposed": {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_outputs_are_pefts(kind, tmp_path):
    model = adapted(CONFIGS[kind])
    state = get_peft_model_state_dict(model)
    tensors = kohya_keys(state)
    assert {key.partition(".")[2] for key in tensors} == PARTS[kind] | {"alpha"}
    path = save_tensors(tensors, tmp_path / "lora.safetensors")
    with torch.no_grad():
        theirs = model.double()(PICTURES)
        assert_same(fused((path, 1.0))(PICTURES), theirs)
        plain = Layers().double()(PICTURES)
    assert all((theirs[name] - plain[name]).abs().max() > 0.01 for name in NAMES)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind.startswith("Lo")])
def test_pefts_own_keys(kind, tmp_path):
    """As PEFT saves them, α being the rank."""
    config = copy.deepcopy(CONFIGS[kind])
    setattr(config, "lora_alpha" if kind == "LoRA" else "alpha", config.r)
    model = adapted(config)
    tensors = {
        key.replace("base_model.model.", "base_model.model.text_encoder."): tensor
        for key, tensor in get_peft_model_state_dict(model).items()
    }
    path = save_tensors(tensors, tmp_path / "lora.safetensors")
    with torch.no_grad():
        assert_same(fused((path, 1.0))(PICTURES), model.double()(PICTURES))


def draw(**shapes):
    generator = torch.Generator().manual_seed(5)
    return {part: torch.randn(shape, generator=generator) * 0.3 for part, shape in shapes.items()}


def lora_file(path, module, parts):
    spelled = {part.replace("_weight", ".weight"): tensor for part, tensor in parts.items()}
    return save_tensors({f"lora_te_{module}.{part}": tensor for part, tensor in spelled.items()}, path)


def test_locon_is_three_convolutions_in_a_row(tmp_path):
    """LyCORIS trains `lora_mid` as a convolution between the other two: the core has the kernel."""
    parts = draw(
        lora_down_weight=(4, 24, 1, 1), lora_mid_weight=(4, 4, 3, 3), lora_up_weight=(40, 4, 1, 1), alpha=()
    )
    path = lora_file(tmp_path / "lora.safetensors", "kernel", parts)
    down, mid, up, alpha = (tensor.double() for tensor in parts.values())
    with torch.no_grad():
        base = Layers().double().kernel(PICTURES)
        change = F.conv2d(F.conv2d(F.conv2d(PICTURES, down), mid, stride=2, padding=1), up)
        expected = base - 0.6 * alpha / 4 * change
        assert_same({"kernel": fused((path, -0.6)).kernel(PICTURES)}, {"kernel": expected})


@pytest.mark.parametrize("shape", ["flat", "kernel"])
def test_lokr_in_full_has_no_alpha(shape, tmp_path):
    """Both matrices whole: LyCORIS's s is 1, whatever α the file has."""
    parts = draw(lokr_w1=(4, 3), lokr_w2=(10, 8, 3, 3), alpha=())
    w1, w2 = parts["lokr_w1"].double(), parts["lokr_w2"].double()
    delta = torch.einsum("ac,bdkl->abcdkl", w1, w2).reshape(40, 24, 3, 3)
    stored = {**parts, "lokr_w2": parts["lokr_w2"].flatten(1)} if shape == "flat" else parts
    path = lora_file(tmp_path / "lora.safetensors", "kernel", stored)
    expected = Layers().kernel.weight.double() + 0.5 * delta
    torch.testing.assert_close(fused((path, 0.5)).kernel.weight, expected, rtol=1e-6, atol=1e-7)


def dora(weight, delta, magnitude, axis):
    """The paper's equation 5, with its norm over every axis but one."""
    moved = weight + delta
    others = [n for n in range(weight.ndim) if n != axis]
    return magnitude * moved / moved.pow(2).sum(others, keepdim=True).sqrt()


INNER = {
    "LoRA": (
        {"lora_down_weight": (4, 24, 3, 3), "lora_up_weight": (40, 4, 1, 1)},
        lambda f: torch.einsum("orxy,rikl->oikl", f["lora_up_weight"], f["lora_down_weight"]),
    ),
    "LoHa": (
        {"hada_w1_a": (40, 4), "hada_w1_b": (4, 216), "hada_w2_a": (40, 4), "hada_w2_b": (4, 216)},
        lambda f: torch.einsum("or,ri,os,si->oi", *(f[f"hada_w{n}_{m}"] for n in "12" for m in "ab")).reshape(
            40, 24, 3, 3
        ),
    ),
    "LoKr": (
        {"lokr_w1": (2, 2), "lokr_w2_a": (20, 4), "lokr_w2_b": (4, 108)},
        lambda f: torch.einsum("ac,br,rdkl->abcdkl", *f.values()).reshape(40, 24, 3, 3),
    ),
}


def decomposed_file(path, kind, axis):
    shapes, make = INNER[kind]
    parts = draw(**shapes)
    double = {part: tensor.double() for part, tensor in parts.items()}
    if kind == "LoKr":
        double["lokr_w2_b"] = double["lokr_w2_b"].reshape(4, 12, 3, 3)
    magnitude = torch.rand([40 if axis == n == 0 else 24 if axis == n == 1 else 1 for n in range(4)]) + 0.5
    parts |= {"dora_scale": magnitude, "alpha": torch.tensor(2.0)}
    weight = Layers().kernel.weight.detach().double()
    return lora_file(path, "kernel", parts), dora(weight, make(double) * 2 / 4, magnitude.double(), axis)


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
@pytest.mark.parametrize("kind", INNER)
def test_magnitudes_on_every_kind_and_axis(kind, axis, tmp_path):
    path, expected = decomposed_file(tmp_path / "dora.safetensors", kind, axis)
    torch.testing.assert_close(fused((path, 1.0)).kernel.weight, expected, rtol=1e-5, atol=1e-6)


def test_doras_and_others_add_up(tmp_path):
    """W + Σ λ·(W' − W), each W' made of the base alone, in any order."""
    one, first = decomposed_file(tmp_path / "1.safetensors", "LoRA", 0)
    two, second = decomposed_file(tmp_path / "2.safetensors", "LoHa", 0)
    parts = draw(diff=(40, 24, 3, 3))
    three = lora_file(tmp_path / "3.safetensors", "kernel", parts)
    base = Layers().kernel.weight.detach().double()
    expected = base + 0.8 * (first - base) - 0.3 * (second - base) + 0.5 * parts["diff"].double()
    styles = [(one, 0.8), (two, -0.3), (three, 0.5)]
    for order in (styles, styles[::-1]):
        torch.testing.assert_close(fused(*order).kernel.weight, expected, rtol=1e-5, atol=1e-6)


def test_strength_zero_leaves_the_base(tmp_path):
    path, _ = decomposed_file(tmp_path / "dora.safetensors", "LoRA", 0)
    assert torch.equal(fused((path, 0.0)).kernel.weight.float(), Layers().kernel.weight)


@pytest.mark.parametrize(
    ("module", "weight", "bias"),
    [("linear", "diff", "diff_b"), ("kernel", "diff", "diff_b"), ("norm", "w_norm", "b_norm")],
)
def test_full_differences(module, weight, bias, tmp_path):
    """Of weights, biases and norms; α has no say."""
    base = copy.deepcopy(Layers().get_submodule(module)).double()
    parts = {**draw(**{weight: base.weight.shape, bias: base.bias.shape}), "alpha": torch.tensor(3.0)}
    ours = fused((lora_file(tmp_path / "lora.safetensors", module, parts), 0.7)).get_submodule(module)
    torch.testing.assert_close(ours.weight, base.weight + 0.7 * parts[weight].double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.bias, base.bias + 0.7 * parts[bias].double(), rtol=1e-6, atol=1e-7)


def test_a_bias_beside_a_lora_or_alone(tmp_path):
    parts = draw(lora_down_weight=(4, 24), lora_up_weight=(40, 4), diff_b=(40,))
    both = lora_file(tmp_path / "both.safetensors", "linear", parts)
    alone = lora_file(tmp_path / "alone.safetensors", "linear", {"diff_b": parts["diff_b"]})
    base = Layers().linear
    for path in (both, alone):
        expected = base.bias.double() + parts["diff_b"].double()
        torch.testing.assert_close(fused((path, 1.0)).linear.bias, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(fused((alone, 1.0)).linear.weight.float(), base.weight)


@pytest.mark.parametrize("module", ["linear", "point", "kernel"])
def test_pefts_bias_of_the_up_projection(module, tmp_path):
    """PEFT's `lora_bias`: its merge adds s times that bias to the layer's own."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_bias=True, target_modules=[module])
    model = adapted(config)
    state = {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()}
    assert {key.partition(".")[2] for key in state} == {"lora_A.weight", "lora_B.weight", "lora_B.bias"}
    tensors = {f"text_encoder.{key}": tensor for key, tensor in state.items()}
    tensors[f"text_encoder.{module}.alpha"] = torch.tensor(ALPHA)
    path = save_tensors(tensors, tmp_path / "lora.safetensors")
    with torch.no_grad():
        assert_same(fused((path, 1.0))(PICTURES), model.double()(PICTURES))


@pytest.mark.parametrize("module", ["point", "kernel"])
def test_loha_with_the_kernels_axes(module, tmp_path):
    """OneTrainer's: hada_w_a as a 1×1 convolution, hada_w_b as one with the layer's kernel."""
    side = {"point": 1, "kernel": 3}[module]
    ups, downs = (40, 4, 1, 1), (4, 24, side, side)
    parts = draw(hada_w1_a=ups, hada_w1_b=downs, hada_w2_a=ups, hada_w2_b=downs, alpha=())
    f = {name: tensor.double() for name, tensor in parts.items()}
    one, other = (torch.einsum("orxy,rikl->oikl", f[f"hada_w{n}_a"], f[f"hada_w{n}_b"]) for n in (1, 2))
    expected = Layers().get_submodule(module).weight.double() + one * other * f["alpha"] / 4
    ours = fused((lora_file(tmp_path / "lora.safetensors", module, parts), 1.0)).get_submodule(module)
    torch.testing.assert_close(ours.weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("names", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_ai_toolkits_magnitude(names, tmp_path):
    """A bare `.magnitude` of length out, beside either spelling of the factors."""
    down, up = draw(down=(4, 24), up=(40, 4)).values()
    weight = Layers().linear.weight.detach().double()
    magnitude = weight.norm(dim=1) * (0.5 + torch.rand(40, generator=torch.Generator().manual_seed(3)))
    key = "text_encoder.linear"
    tensors = {f"{key}.{names[0]}.weight": down, f"{key}.{names[1]}.weight": up}
    path = save_tensors({**tensors, f"{key}.magnitude": magnitude.float()}, tmp_path / "lora.safetensors")
    expected = dora(weight, up.double() @ down.double(), magnitude[:, None], 0)
    torch.testing.assert_close(fused((path, 1.0)).linear.weight, expected, rtol=1e-5, atol=1e-6)


LOHA = {"hada_w1_a": (40, 4), "hada_w1_b": (4, 24), "hada_w2_a": (40, 4), "hada_w2_b": (4, 24)}
LOKR = {"lokr_w1": (4, 3), "lokr_w2": (10, 8)}


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({**LOHA, "hada_w2_b": None}, r"factors that go with lora_te_linear.hada_w1_a"),
        ({**LOHA, "hada_t1": (4, 4, 3, 3)}, r"factors that go with .*hada_w1_a"),
        ({**LOKR, "lokr_w2": None}, r"factors that go with lora_te_linear.lokr_w1"),
        ({"lokr_w1": (4, 3), "lokr_w2_a": (10, 2)}, r"factors that go with .*lokr_w1"),
        ({"dora_scale": (40, 1)}, r"factors that go with lora_te_linear.dora_scale"),
        ({"alpha": ()}, r"factors that go with lora_te_linear.alpha"),
        ({**LOKR, **LOHA}, r"several kinds"),
        ({"diff": (40, 24), "dora_scale": (40, 1)}, r"several kinds"),
        ({**LOHA, "hada_w1_b": (4, 25)}, r"linear \(LoHa factors that don't fit each other: hada_w1_a"),
        ({**LOHA, "hada_w1_b": (3, 24)}, r"linear \(LoHa factors that don't fit each other: hada_w1_a"),
        ({**LOKR, "lokr_w2": (10, 9)}, r"linear \(LoKr update 40×27, weight 40×24\)"),
        ({"diff": (40, 25)}, r"linear \(difference update 40×25, weight 40×24\)"),
        ({"diff": (40, 24), "diff_b": (41,)}, r"linear \(bias update \[41\], bias \[40\]\)"),
        ({**LOHA, "dora_scale": (41, 1)}, r"linear \(DoRA magnitude \[41, 1\], weight 40×24\)"),
        ({**LOHA, "dora_scale": (1, 40)}, r"linear \(DoRA magnitude \[1, 40\], weight 40×24\)"),
        ({"lokr_w1": (4,), "lokr_w2": (10, 8)}, r"lokr_w1 has the shape \[4\]"),
    ],
)
def test_refused(shapes, told, tmp_path):
    """Parts that are missing, mixed or misshapen; the base is left as it was."""
    parts = draw(**{part: shape for part, shape in shapes.items() if shape is not None})
    path = lora_file(tmp_path / "lora.safetensors", "linear", parts)
    layers = Layers()
    with pytest.raises(LoraError, match=told):
        fuse_loras({"text_encoder": layers}, [(read_lora(path), LoraSpec("x"))])
    assert torch.equal(layers.linear.weight, Layers().linear.weight)


def test_a_zero_update_beside_another_leaves_the_base(tmp_path):
    good = lora_file(tmp_path / "good.safetensors", "linear", draw(**LOHA))
    empty = lora_file(tmp_path / "empty.safetensors", "linear", {"diff": torch.zeros(40, 24)})
    layers = Layers()
    with pytest.raises(LoraError, match=r"empty\.safetensors changes nothing"):
        fuse_loras({"text_encoder": layers}, [(read_lora(path), LoraSpec("x")) for path in (good, empty)])
    assert torch.equal(layers.linear.weight, Layers().linear.weight)
