"""Wide attention as two products and a softmax: what it computes, where, and that torch compiles it so."""

from __future__ import annotations

import re
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from factories import load_modules
from torch.nn.functional import scaled_dot_product_attention

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.engines import aotinductor, wide_attention
from lcm_compile.engines.wide_attention import split_wide_attention
from lcm_compile.export import export_stage
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import snr_db
from lcm_compile.spec import Shape
from lcm_compile.stages.stage import make_stages
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
    small = replace(H200, memory_bytes=int(needed / wide_attention.MOST_MEMORY) - 1)
    assert split_wide_attention(program, small) == 0
    assert split_wide_attention(program, replace(small, memory_bytes=small.memory_bytes + 1)) == 1


@pytest.fixture(scope="module")
def program(sdxl_checkpoint, tmp_path_factory):
    """The decoder as it is exported; the attention of its VAE is as wide as its widest map."""
    checkpoint = open_checkpoint(str(sdxl_checkpoint))
    decode = make_stages(checkpoint, load_modules(checkpoint).named(), Shape(1, 64, 64))[2]
    folder = tmp_path_factory.mktemp("decode")
    graph = export_stage(decode, aotinductor.GRAPH_FORMAT, Precision.FP32, folder)
    return lambda: torch.export.load(graph.path)


def test_the_decoder_gives_diffusers_picture(program, sdxl_checkpoint, monkeypatch):
    monkeypatch.setattr(wide_attention, "WIDEST", 8)
    split = program()
    assert split_wide_attention(split, H200) == 1
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
