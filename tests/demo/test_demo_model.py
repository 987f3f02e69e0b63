"""The model that ships with the package: its layout, its size, and that it draws what it is asked for."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from lcm_compile import BuildSpec, build, load
from lcm_compile.benchmarks.pages import demo_sheet
from lcm_compile.benchmarks.quality.rows import TOGETHER, styled
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.demo import judge
from lcm_compile.demo.world import STYLE, held_out_prompts
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db

CHECKPOINT, LCM_LORA = FAMILIES["demo"].base, FAMILIES["demo"].lcm_lora


@pytest.fixture(scope="module")
def pipeline():
    with load(build(BuildSpec(base="demo"))) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def theirs():
    pipe = DiffusionPipeline.from_pretrained(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_diffusers_opens_the_folder_unchanged(theirs):
    assert type(theirs) is StableDiffusionXLPipeline
    assert theirs.unet.config.addition_embed_type == "text_time"
    assert theirs.tokenizer.pad_token != theirs.tokenizer_2.pad_token
    assert {m.dtype for m in (theirs.unet, theirs.vae, theirs.text_encoder, theirs.text_encoder_2)} == {
        torch.float32
    }


def test_lcm_lora_has_the_keys_of_lcm_lora_sdxl():
    tensors = load_file(LCM_LORA)
    assert all(
        re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", key) for key in tensors
    )
    modules = {key.split(".")[0] for key in tensors}
    assert len(tensors) == 3 * len(modules)
    assert {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"} <= modules


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_pictures_equal_diffusers(pipeline, guidance_scale):
    pipe = DiffusionPipeline.from_pretrained(CHECKPOINT)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(LCM_LORA)
    prompt = FAMILIES["demo"].sample_prompt
    theirs = pipe(
        prompt,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    ).images[0]
    ours = pipeline.draw(Request(prompt, 7, guidance_scale=guidance_scale)).pictures[0]
    assert psnr_db(eight_bits(theirs), ours) >= 65


def test_four_steps_obey_the_prompt(pipeline):
    """By the rule-based judge, on captions that training never saw."""
    prompts = held_out_prompts(100, seed=1)
    pictures = [np.asarray(pipeline(prompt, seed=i)[0]) for i, prompt in enumerate(prompts)]
    figures = judge.score(pictures, prompts)
    for name, floor in {"background": 0.97, "pattern": 0.95, "colour": 0.93, "size": 0.93}.items():
        assert figures[name] >= floor, figures
    assert figures["shape"] >= 0.87 and figures["binding"] >= 0.8, figures


def test_the_style_joins_the_lcm_lora_untrained(pipeline):
    """Stripes where the style is fused beside the LCM-LoRA, and none on the same prompts without it."""
    prompts = [text + STYLE for text in held_out_prompts(40, seed=1)]
    with load(build(styled(*TOGETHER))) as other:
        striped, plain = (
            judge.score([np.asarray(p(text, seed=i)[0]) for i, text in enumerate(prompts)], prompts)
            for p in (other, pipeline)
        )
    assert striped["stripes"] >= 0.8 and striped["colour"] >= 0.9 and striped["shape"] >= 0.7, striped
    assert plain["stripes"] <= 0.02, plain


def test_inspect_demo(command):
    code, out, _ = command("inspect", "demo", "--json")
    data = json.loads(out)
    assert (code, data["checkpoint"], data["lcm_lora"]) == (0, CHECKPOINT, LCM_LORA)
    assert data["bytes"] < 12_000_000


def test_a_copy_of_the_folder_finds_its_lcm_lora(tmp_path, command):
    """By the detected architecture."""
    import shutil

    base = shutil.copytree(CHECKPOINT, tmp_path / "copy")
    code, out, _ = command("build", "--base", base, "--gpu", "cpu", "--dry-run", "--json")
    assert code == 0
    assert [lora["path"] for lora in json.loads(out)["loras"]] == [LCM_LORA]


def test_the_sheet_of_make_demo(tmp_path, capsys):
    demo_sheet.main(["--out", str(tmp_path / "demo.png")], standalone_mode=False)
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "demo.png")
    assert "bundle" in err and "encode" in err and "decode" in err
    assert np.asarray(Image.open(tmp_path / "demo.png")).std() > 20
