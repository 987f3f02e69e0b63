"""Programs that are rewritten for GPUs: what they compute, which parts, and that torch compiles them so."""

from __future__ import annotations

import contextlib
import re
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from factories import load_modules
from torch.export import passes
from torch.nn.functional import scaled_dot_product_attention

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.engines import aotinductor, gpu_rewrites
from lcm_compile.engines.gpu_rewrites import join_upsampling, split_group_norm, split_wide_attention
from lcm_compile.export import export_stage
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import snr_db
from lcm_compile.spec import Shape
from lcm_compile.stages.rewrites import Upsampling
from lcm_compile.stages.stage import make_stages, rewrite_modules
from lcm_compile.targets import find_target

H200 = find_target("h200")


class Attention(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return scaled_dot_product_attention(query, key, value, **self.options)


def arrays(width, queries=48, keys=32, heads=(1, 2), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*heads, tokens, width, generator=generator).to(dtype) for tokens in (queries, keys, keys)
    ]


def exported(given, **options):
    return torch.export.export(Attention(options).eval(), tuple(given))


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.float64, 280), (torch.float32, 120), (torch.float16, 60)]
)
def test_it_computes_attention(options, dtype, floor):
    given = arrays(512, dtype=dtype)
    program = exported(given, **options)
    assert split_wide_attention(program, H200) == 1
    found = program.module()(*given)
    expected = scaled_dot_product_attention(*(array.double() for array in given), **options)
    assert found.dtype == dtype and snr_db(expected.numpy(), found.numpy()) > floor


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (arrays(256), {}),  # FlashAttention computes it
        (arrays(512, dtype=torch.bfloat16), {}),  # 8 bits of mantissa are too few for scores
        (arrays(512, 32), {"is_causal": True}),
        (arrays(512), {"attn_mask": torch.zeros(48, 32)}),
    ],
)
def test_what_it_does_not_compute_is_left_as_it_is(given, options):
    program = exported(given, **options)
    before = program.graph_module.code
    assert split_wide_attention(program, H200) == 0 and program.graph_module.code == before


def test_scores_for_which_a_gpu_has_no_room_are_not_made():
    program = exported(arrays(512, 4096, 4096, (2, 1)))
    needed = 2 * 2 * 4096 * 4096 * 4
    small = replace(H200, memory_bytes=int(needed / gpu_rewrites.MOST_MEMORY) - 1)
    assert split_wide_attention(program, small) == 0
    assert split_wide_attention(program, replace(small, memory_bytes=small.memory_bytes + 1)) == 1


class Norm(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.GroupNorm(4, 32, eps=1e-6)
        for parameter in self.norm.parameters():
            torch.nn.init.normal_(parameter)
        self.to(dtype)

    def forward(self, x):
        return torch.nn.functional.silu(self.norm(x))


def maps(dtype):
    """Channels of means and contrasts of their own, in two pictures."""
    generator = torch.Generator().manual_seed(1)
    means, contrasts = torch.randn(2, 2, 32, 1, 1, generator=generator) * 5
    return (torch.randn(2, 32, 12, 20, generator=generator) * contrasts + means).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.float32, 115), (torch.float16, 60), (torch.bfloat16, 45)]
)
def test_it_computes_group_normalisation(monkeypatch, dtype, floor):
    monkeypatch.setattr(gpu_rewrites, "LARGE", 0)
    module, x = Norm(dtype).eval(), maps(dtype)
    program = torch.export.export(module, (x,))
    assert split_group_norm(program) == 1
    with torch.no_grad():
        found, expected = program.module()(x), module.double()(x.double())
    assert found.dtype == dtype and snr_db(expected.numpy(), found.double().numpy()) > floor


def test_maps_that_a_cache_holds_are_normalised_as_before():
    x = torch.randn(1, 32, 512, 512)
    program = torch.export.export(Norm(torch.float32).eval(), (x[..., :256],))
    before = program.graph_module.code
    assert split_group_norm(program) == 0 and program.graph_module.code == before
    assert split_group_norm(torch.export.export(Norm(torch.float32).eval(), (x,))) == 1


@pytest.fixture(scope="module")
def decode_graph(sdxl_checkpoint, tmp_path_factory):
    """The decoder as it is exported; the attention of its VAE is as wide as its widest map."""
    checkpoint = open_checkpoint(str(sdxl_checkpoint))
    decode = make_stages(checkpoint, load_modules(checkpoint).named(), Shape(1, 64, 64))[2]
    folder = tmp_path_factory.mktemp("decode")
    return export_stage(decode, aotinductor.GRAPH_FORMAT, Precision.FP32, folder)


@pytest.mark.parametrize("target", ["h200", "cpu"])
def test_what_is_compiled_for_a_gpu_is_rewritten_and_in_fp32(decode_graph, target, tmp_path, monkeypatch):
    """By what torch's compiler is given, and what it may do then."""
    given = []

    def compile_module(module, inputs, options):
        given.append((module.code, torch.backends.cudnn.allow_tf32))
        return [{}]  # no files, and no weights

    monkeypatch.setattr(gpu_rewrites, "WIDEST", 8)
    monkeypatch.setattr(gpu_rewrites, "LARGE", 0)
    monkeypatch.setattr(torch._inductor, "aot_compile", compile_module)
    monkeypatch.setattr("torch._inductor.package.package_aoti", lambda path, files: None)
    monkeypatch.setattr(passes, "move_to_device_pass", lambda program, device: program)
    monkeypatch.setattr(aotinductor, "toolkit_for_torch", lambda scratch: contextlib.nullcontext())
    aotinductor.build(decode_graph, find_target(target), tmp_path, {})
    [(code, tf32)] = given
    assert ("scaled_dot_product_attention" in code) == (target == "cpu") == tf32
    assert ("var_mean" in code) == (target == "h200")


def test_the_decoder_gives_diffusers_picture(decode_graph, sdxl_checkpoint, monkeypatch):
    monkeypatch.setattr(gpu_rewrites, "WIDEST", 8)
    monkeypatch.setattr(gpu_rewrites, "LARGE", 0)
    split = torch.export.load(decode_graph.path)
    norms = split.graph_module.code.count("group_norm.default(")
    assert split_wide_attention(split, H200) == 1
    assert split_group_norm(split) == norms - 1 > 5  # that of the attention is of tokens, not of a map
    assert "scaled_dot_product_attention" not in split.graph_module.code
    vae = AutoencoderKL.from_pretrained(sdxl_checkpoint / "vae")
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        picture = vae.decode(latent / vae.config.scaling_factor).sample
        found = split.module()(latent)
    expected = (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert snr_db(expected.numpy(), found.numpy()) > 100


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "splits"), [(torch.float16, True), (torch.float16, False), (torch.float32, True)]
)
def test_torchs_compiler_does_not_make_one_attention_of_it_again(dtype, splits, tmp_path):
    """It looks for such products, and replaces those that it recognises."""
    program = exported(arrays(512, heads=(1, 1), dtype=dtype))
    if splits:
        split_wide_attention(program, H200)
    path = str(tmp_path / "attention.pt2")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    with zipfile.ZipFile(path) as package:
        [source] = [name for name in package.namelist() if name.endswith("wrapper.cpp")]
        code = package.read(source).decode()
    assert bool(re.search(r"aoti_torch_cpu\w*attention", code)) == (not splits)


class Doubling(torch.nn.Module):
    """What the rewrite `upsampling` makes of a doubled map and the convolution after it."""

    def __init__(self, bias=True, dtype=torch.float64):
        super().__init__()
        self.conv = torch.nn.Conv2d(6, 10, 3, padding=1, bias=bias, dtype=dtype).requires_grad_(False)
        self.four = Upsampling(self.conv)

    def forward(self, x):
        return torch.nn.functional.silu(self.four(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 4)])
def test_a_doubled_map_is_one_transposed_convolution(size, bias):
    """The same numbers at every pixel, in fp64, as doubling and convolving 3×3."""
    torch.manual_seed(1)
    module, x = Doubling(bias).eval(), torch.randn(2, 6, *size, dtype=torch.float64)
    program = torch.export.export(module, (x,))
    assert join_upsampling(program) == 1
    aten = torch.ops.aten
    assert len(gpu_rewrites.nodes_of(program, aten.conv_transpose2d.input)) == 1
    for gone in (aten.conv2d.default, aten.pad.default, aten.pixel_shuffle.default):
        assert not gpu_rewrites.nodes_of(program, gone)
    doubled = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = torch.nn.functional.silu(module.conv(doubled))
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=1e-13)


class Others(Doubling):
    """Four convolutions that are interleaved in another order, or of maps that are padded otherwise."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        pads = [(1 - i % 2, i % 2, 1 - i // 2, i // 2) for i in range(4)]
        convolutions = list(self.four.corners)
        if self.how == "order":
            convolutions.reverse()
            pads.reverse()
        value = 1.0 if self.how == "value" else 0.0
        padded = [torch.nn.functional.pad(x, pad, value=value) for pad in pads]
        if self.how == "maps":
            padded[3] = padded[3] * 2
        parts = [conv(one) for conv, one in zip(convolutions, padded, strict=True)]
        batch, _, height, width = x.shape
        return torch.nn.functional.pixel_shuffle(torch.stack(parts, 2).reshape(batch, -1, height, width), 2)


@pytest.mark.parametrize("how", ["order", "value", "maps"])
def test_four_convolutions_that_double_no_map_stay(how):
    program = torch.export.export(Others(how).eval(), (torch.randn(1, 6, 4, 4, dtype=torch.float64),))
    assert join_upsampling(program) == 0 and "conv_transpose2d" not in program.graph_module.code


def test_a_decoder_doubles_its_maps_so_and_draws_the_same(sd15_checkpoint, tmp_path):
    checkpoint = open_checkpoint(str(sd15_checkpoint))
    modules = rewrite_modules(load_modules(checkpoint).named(), ("upsampling",), [Shape(1, 64, 64)], 4)
    stage = make_stages(checkpoint, modules, Shape(1, 64, 64), ("upsampling",))[-1]
    graph = export_stage(stage, aotinductor.GRAPH_FORMAT, Precision.FP32, tmp_path)
    program = torch.export.load(graph.path)
    before = len(gpu_rewrites.nodes_of(program, torch.ops.aten.pixel_shuffle.default))
    x = [torch.randn(spec.shape) for spec in stage.contract.inputs]
    expected = program.module()(*x)
    assert join_upsampling(program) == before > 0
    assert snr_db(expected[0].numpy(), program.module()(*x)[0].numpy()) > 110


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_torch_compiles_the_transposed_convolution(tmp_path):
    module, x = Doubling(dtype=torch.float32).eval(), torch.randn(1, 6, 8, 8)
    program = torch.export.export(module, (x,))
    join_upsampling(program)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "small.pt2"))
    found = torch._C._aoti.AOTIModelPackageLoader(path, "model", True, 1, -1).run([x])[0]
    assert snr_db(module(x).numpy(), found.numpy()) > 110
