"""A LoRA's strength by part: the notation, and the pictures' models against diffusers' set_adapters."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import factories
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from factories import fuse_loras, load_modules
from safetensors.torch import load_file

from lcm_compile import BuildSpec, LoraSpec
from lcm_compile.builder.plan import make_plan
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.errors import LoraError, UsageError
from lcm_compile.lora.read import read_lora


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x@text=0.5", LoraSpec("x", 1.0, {"text": 0.5})),
        ("x:-0.8@unet=-1,text=0.5", LoraSpec("x", -0.8, {"unet": -1.0, "text": 0.5})),
        ("o/n:s.safetensors:2@mid_block=0", LoraSpec("o/n:s.safetensors", 2.0, {"mid_block": 0.0})),
        (
            r"C:\x.safetensors@down_blocks.1=1e-3",
            LoraSpec(r"C:\x.safetensors", 1.0, {"down_blocks.1": 0.001}),
        ),
        ("a@b/x.safetensors:0.5", LoraSpec("a@b/x.safetensors", 0.5)),
        ("x@text=1.safetensors", LoraSpec("x@text=1.safetensors")),
        ("v@1", LoraSpec("v@1")),
        ("odd@text=1:2", LoraSpec("odd@text=1", 2.0)),
        ("loras/style.safetensors:runtime", LoraSpec("loras/style.safetensors", 1.0, {}, "style")),
        ("x:0.5:runtime:mine@text=1", LoraSpec("x", 0.5, {"text": 1.0}, "mine")),
        (
            "me/cats/pytorch_lora_weights.safetensors:runtime",
            LoraSpec("me/cats/pytorch_lora_weights.safetensors", name="cats"),
        ),
        ("o/n:a.b.safetensors:2:runtime", LoraSpec("o/n:a.b.safetensors", 2.0, {}, "a.b")),
    ],
)
def test_notation(text, spec):
    assert LoraSpec.parse(text) == spec


def test_every_spec_is_read_back_from_what_it_prints():
    rng = random.Random(0)
    pieces = ["a", ":", "@", "=", "/", "\\", ",", ".", "1", "0.5", "unet", "text=2", ".safetensors", " ", "é"]
    parts = ["unet", "text", "text_encoder_2", "down_blocks.1", "mid_block", "up_blocks"]
    for _ in range(3000):
        source = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
        strengths = {part: rng.uniform(-2, 2) for part in rng.sample(parts, rng.randint(0, 3))}
        name = rng.choice([None, "x", "a b"])
        spec = LoraSpec(source, rng.choice([1.0, 0.0, -1e-9, 3e20]), strengths, name)
        assert LoraSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x@style=1", "'style', which is no part"),
        ("x@=1", "'', which is no part"),
        ("x@down_blocks.one=1", "'down_blocks.one'"),
        ("x@text=high", "'high' in 'x@text=high' is not a number"),
        ("x@text=1,unet", "weight '' in"),
        ("x@text=nan", "nan of LoRA x is not finite"),
        ("x@text=1,text=2", "two strengths for text"),
        ("x:high@text=1", "'high'"),
    ],
)
def test_what_is_no_strength(text, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        LoraSpec.parse(text)


@pytest.fixture(scope="module")
def lora(sdxl_checkpoint, tmp_path_factory):
    """For attention and text encoders alone: diffusers has no strengths for a block's other layers."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint)
    tensors = load_file(factories.write_lora(pipe, path, "peft", alpha=None))
    return factories.save_tensors({k: t for k, t in tensors.items() if "resnets" not in k}, path)


@pytest.mark.parametrize(
    ("text", "adapters"),
    [
        (":0.7", 0.7),
        ("@unet=1,text=-0.5", {"unet": 1.0, "text_encoder": -0.5, "text_encoder_2": -0.5}),
        (
            ":0.3@unet=1,text_encoder_2=0,down_blocks.1=0.5,mid_block=-1,up_blocks.0=2",
            {
                "unet": {"down": {"block_1": 0.5}, "mid": -1.0, "up": {"block_0": 2.0}},
                "text_encoder": 0.3,
                "text_encoder_2": 0.0,
            },
        ),
        (
            ":0@unet=1,down_blocks=0,up_blocks.0=-0.4",
            {"unet": {"down": 0.0, "up": -0.4}, "text_encoder": 0.0, "text_encoder_2": 0.0},
        ),
    ],
)
def test_strengths_are_those_of_set_adapters(sdxl_checkpoint, lora, text, adapters):
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint)
    pipe.load_lora_weights(lora, adapter_name="style")
    pipe.set_adapters("style", adapters)
    modules = load_modules(open_checkpoint(str(sdxl_checkpoint)))
    plain = load_modules(open_checkpoint(str(sdxl_checkpoint)))
    (used,) = fuse_loras(modules.named(), [(read_lora(lora), spec := LoraSpec.parse(f"{lora}{text}"))])
    assert (used.weight, used.strengths) == (spec.weight, spec.strengths)
    tokens = torch.arange(77)[None]
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(1, 77, 80, generator=torch.Generator().manual_seed(1))
    added = {"text_embeds": torch.ones(1, 40), "time_ids": torch.ones(1, 6)}

    def outputs(models):
        with torch.no_grad():
            return [
                models.text_encoder(tokens).last_hidden_state,
                models.text_encoder_2(tokens).last_hidden_state,
                models.unet(latent, 499, hidden, added_cond_kwargs=added).sample,
            ]

    for ours, theirs in zip(outputs(modules), outputs(pipe), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (outputs(modules)[2] - outputs(plain)[2]).abs().max() > 1e-2


def test_a_block_that_the_base_lacks(refused, sdxl_checkpoint, sd15_checkpoint, lora, tmp_path):
    words = (
        "build",
        "--base",
        sdxl_checkpoint,
        "--no-lcm",
        "--gpu",
        "cpu",
        "--out",
        tmp_path / "b",
        "--lora",
    )
    refused(
        1, ["down_blocks.7", "this base lacks", "down_blocks.1, mid_block"], *words, f"{lora}@down_blocks.7=1"
    )
    assert not (tmp_path / "b").exists()
    modules = load_modules(open_checkpoint(str(sd15_checkpoint)))
    name = "down_blocks.0.attentions.0.proj_in"
    parts = {f"unet.{name}.lora_A.weight": torch.ones(1, 32), f"unet.{name}.lora_B.weight": torch.ones(32, 1)}
    one = factories.save_tensors(parts, tmp_path / "one.safetensors")
    with pytest.raises(LoraError, match="text_encoder_2, which this base lacks"):
        fuse_loras(modules.named(), [(read_lora(one), LoraSpec(str(one), 1.0, {"text_encoder_2": 1.0}))])


def test_the_key_holds_strengths_and_not_their_spelling(sdxl_checkpoint, lora):
    spec = BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm")

    def key(text):
        return make_plan(replace(spec, loras=(LoraSpec.parse(f"{lora}{text}"),))).key

    same = [
        [":0.5", ":0.5@unet=0.5", ":1@unet=0.5,text=0.5", ":0.5@mid_block=0.5,text_encoder=0.5"],
        [":0.5@text=1", ":1@unet=0.5", "@unet=0.5,text=1,up_blocks.0=0.5"],
        [
            ":0.5@up_blocks.0=0,mid_block=1",
            ":0.5@mid_block=1,up_blocks.0=0",
            "@mid_block=1,up_blocks.0=0,unet=0.5,text=0.5",
        ],
    ]
    keys = [[key(text) for text in spellings] for spellings in same]
    for spellings in keys:
        assert all(found == spellings[0] for found in spellings)
    whole = replace(spec, loras=(LoraSpec(str(lora), 1, {"text": 0}),))
    assert make_plan(whole).key == key(":1.0@text=0.0")  # numbers of Python's, without a point
    assert len({str(spellings[0]) for spellings in keys} | {str(key(":0.5@up_blocks.0=0"))}) == 4
