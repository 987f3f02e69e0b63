"""One bundle with everything that is not fused: a LoRA at run time, a ControlNet and an encoder of images."""

from __future__ import annotations

import factories
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetImg2ImgPipeline
from diffusers_reference import SCHEDULERS
from factories import outline, painting
from PIL import Image

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import ControlNetSpec


@pytest.mark.parametrize("sampler", ["lcm", "euler"])
def test_they_draw_together_what_diffusers_draws(sd15_checkpoint, together, sampler):
    bundle, lora, net = together
    theirs = StableDiffusionControlNetImg2ImgPipeline.from_pretrained(
        sd15_checkpoint, controlnet=ControlNetModel.from_pretrained(net), safety_checker=None
    )
    theirs.load_lora_weights(lora, adapter_name="style")
    theirs.set_adapters(["style"], [0.6])
    theirs.scheduler = SCHEDULERS[sampler](theirs.scheduler.config)
    drawn = theirs(
        "a red star",
        image=painting(),
        control_image=outline((64, 64)),
        strength=0.6,
        num_inference_steps=8,
        guidance_scale=2.0,
        controlnet_conditioning_scale=0.7,
        control_guidance_end=0.5,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    ).images
    with load(bundle) as ours:
        [picture] = ours(
            "a red star",
            seed=7,
            sampler=sampler,
            steps=8,
            guidance_scale=2.0,
            image=painting(),
            strength=0.6,
            control=outline((64, 64)),
            control_weight=0.7,
            control_end=0.5,
            lora_weights={"style": 0.6},
        )
    assert psnr_db(eight_bits(drawn)[0], np.asarray(picture)) >= 60


def test_they_are_drawn_again_from_their_files(command, together, tmp_path):
    bundle = together[0].folder
    painting().save(tmp_path / "in.png")
    outline((64, 64)).save(tmp_path / "lines.png")
    words = ["--image", tmp_path / "in.png", "--strength", 0.6, "--control", tmp_path / "lines.png"]
    words += ["--lora-weight", "style=0.6", "--seed", 7, "--steps", 8]
    command("run", "a red star", "--bundle", bundle, *words, "--out", tmp_path / "a.png")
    command("run", "--again", tmp_path / "a.png", "--bundle", bundle, "--out", tmp_path / "b.png")
    first, again = (Image.open(tmp_path / name).tobytes() for name in ("a.png", "b.png"))
    assert first == again


@pytest.fixture(scope="module")
def together(sd15_checkpoint, tmp_path_factory):
    """The bundle, the LoRA's file and the ControlNet's folder."""
    folder = tmp_path_factory.mktemp("together")
    pipe = DiffusionPipeline.from_pretrained(sd15_checkpoint)
    lora = factories.write_lora(pipe, folder / "style.safetensors", "kohya")
    net = factories.write_controlnet(sd15_checkpoint, folder / "net")
    spec = BuildSpec(
        str(sd15_checkpoint),
        no_lcm=True,
        few_step="lcm",
        backend="torchscript",
        loras=(LoraSpec.parse(f"{lora}:runtime"),),
        controlnets=(ControlNetSpec(str(net)),),
        image=True,
    )
    return build(spec, folder / "bundle"), lora, net
