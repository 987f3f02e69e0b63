"""Pictures that begin at a picture, with and without a mask, against diffusers with the same weights."""

from __future__ import annotations

from dataclasses import replace

import factories
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers_reference import SCHEDULERS
from factories import painting
from PIL import Image, ImageDraw

from lcm_compile import BuildSpec, build, load
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db
from lcm_compile.samplers import SAMPLERS

FLOOR = 60  # dB
SIDE = 64


def frame(width=SIDE, height=SIDE):
    """A mask that repaints the middle, whose edge lies inside the pixels of a latent."""
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((width // 5, height // 4, width * 4 // 5, height * 5 // 6), 255)
    return mask


@pytest.fixture(scope="module")
def ordinary(sd15_checkpoint, sdxl_checkpoint, tmp_path_factory):
    """A bundle of each base that reads pictures, without an LCM-LoRA, and the base, which does not clip."""
    folder, made = tmp_path_factory.mktemp("ordinary"), {}
    for name, checkpoint, backend in (
        ("sd15", sd15_checkpoint, "torchscript"),
        ("sdxl", sdxl_checkpoint, "onnxruntime"),
    ):
        base = factories.with_scheduler(checkpoint, folder / f"{name}-base", clip_sample=False)
        spec = BuildSpec(str(base), no_lcm=True, backend=backend, image=True, batch=2)
        made[name] = build(spec, folder / name).folder, base
    return made


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pair(request, ordinary):
    """Our pipeline, and diffusers' pipeline of the same base."""
    bundle, base = ordinary[request.param]
    with load(bundle) as ours:
        theirs = DiffusionPipeline.from_pretrained(base)
        theirs.config_of_scheduler = theirs.scheduler.config
        yield ours, theirs


def drawn_by_diffusers(kind, theirs, sampler, **options):
    pipe = kind.from_pipe(theirs)
    pipe.scheduler = SCHEDULERS[sampler](theirs.config_of_scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        "a red star",
        negative_prompt="blue",
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
        **options,
    ).images
    return eight_bits(images)


def worst(theirs, ours):
    assert len(theirs) == len(ours) and theirs.std() > 5
    return min(psnr_db(other, mine) for other, mine in zip(theirs, ours, strict=True))


CASES = [(sampler, *how) for sampler in SAMPLERS for how in ((5, 1.0, 0.5), (10, 7.5, 0.8))]
CASES += [(sampler, 6, 1.0, strength) for sampler in ("lcm", "euler", "dpm++2m") for strength in (0.2, 1.0)]


@pytest.mark.parametrize(("sampler", "steps", "scale", "strength"), CASES)
def test_image_to_image_is_that_of_diffusers(pair, sampler, steps, scale, strength):
    ours, theirs = pair
    drawn = drawn_by_diffusers(
        AutoPipelineForImage2Image,
        theirs,
        sampler,
        image=painting(),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=scale,
        num_images_per_prompt=3,
    )
    asked = {"sampler": sampler, "image": painting(), "strength": strength}
    pictures = ours.draw(Request("a red star", 7, "blue", steps, scale, 3, **asked)).pictures
    assert worst(drawn, pictures) >= FLOOR


@pytest.mark.parametrize(("steps", "scale", "strength"), [(4, 1.0, 1.0), (6, 7.5, 0.5)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_is_that_of_diffusers(pair, sampler, steps, scale, strength):
    ours, theirs = pair
    drawn = drawn_by_diffusers(
        AutoPipelineForInpainting,
        theirs,
        sampler,
        image=painting(),
        mask_image=frame(),
        height=SIDE,
        width=SIDE,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=scale,
        num_images_per_prompt=3,
    )
    asked = {"sampler": sampler, "image": painting(), "mask": frame(), "strength": strength}
    pictures = ours.draw(Request("a red star", 7, "blue", steps, scale, 3, **asked)).pictures
    assert worst(drawn, pictures) >= FLOOR


def test_a_tiny_autoencoder_encodes_without_a_draw(sd15_checkpoint, tmp_path):
    torch.manual_seed(7)
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(2, 2, 2, 1))
    factories.lively(vae, 1.5).save_pretrained(tmp_path / "vae")
    spec = BuildSpec(
        str(sd15_checkpoint),
        no_lcm=True,
        few_step="lcm",
        vae=str(tmp_path / "vae"),
        backend="torchscript",
        image=True,
    )
    theirs = DiffusionPipeline.from_pretrained(sd15_checkpoint, vae=vae)
    theirs.config_of_scheduler = theirs.scheduler.config
    with load(build(spec, tmp_path / "bundle")) as ours:
        [encoder] = [stage for name, stage in ours.runners.items() if name == "encode-image"]
        assert [spec.name for spec in encoder.contract.outputs] == ["mean"]
        for kind, mask in ((AutoPipelineForImage2Image, None), (AutoPipelineForInpainting, frame())):
            options = {"image": painting(), "strength": 0.75}
            masked = {} if mask is None else {"mask_image": mask, "height": SIDE, "width": SIDE}
            how = {"num_inference_steps": 4, "guidance_scale": 1.0}
            drawn = drawn_by_diffusers(kind, theirs, "lcm", **options, **masked, **how)
            pictures = ours.draw(Request("a red star", 7, "blue", 4, mask=mask, **options)).pictures
            assert worst(drawn, pictures) >= FLOOR


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def inpainting(request, tmp_path_factory):
    """Our pipeline of an inpainting model, whose UNet takes 9 channels, and diffusers'."""
    folder = tmp_path_factory.mktemp("inpainting")
    write, kind = {
        "sd15": (factories.write_sd15, StableDiffusionInpaintPipeline),
        "sdxl": (factories.write_sdxl, StableDiffusionXLInpaintPipeline),
    }[request.param]
    base = write(folder / "base", in_channels=9, out_channels=4)
    spec = BuildSpec(str(base), no_lcm=True, backend="torchscript", image=True, batch=2)
    with load(build(spec, folder / "bundle")) as ours:
        theirs = kind.from_pretrained(base)
        theirs.config_of_scheduler = {**theirs.scheduler.config, "clip_sample": False}
        scheduler = replace(ours.settings.scheduler, clip_sample=False)
        ours.settings = replace(ours.settings, scheduler=scheduler)
        yield ours, theirs


@pytest.mark.parametrize(
    ("sampler", "steps", "scale", "strength"),
    [("lcm", 4, 1.0, 1.0), ("lcm", 4, 1.5, 0.5), ("euler-a", 6, 7.5, 0.8), ("ddim", 6, 7.5, 1.0)],
)
def test_an_inpainting_model_is_told_what_it_repaints(inpainting, sampler, steps, scale, strength):
    ours, theirs = inpainting
    options = {"image": painting(), "strength": strength}
    drawn = drawn_by_diffusers(
        type(theirs),
        theirs,
        sampler,
        **options,
        mask_image=frame(),
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        guidance_scale=scale,
        num_images_per_prompt=3,
    )
    asked = Request("a red star", 7, "blue", steps, scale, 3, sampler=sampler, mask=frame(), **options)
    pictures = ours.draw(asked).pictures
    assert worst(drawn, pictures) >= FLOOR
    other = ours.draw(replace(asked, mask=frame().rotate(90))).pictures
    assert worst(drawn, other) < FLOOR


def test_an_inpainting_model_as_one_file(inpainting, tmp_path):
    ours, theirs = inpainting
    path = factories.write_original(theirs, tmp_path / "base.safetensors")
    spec = BuildSpec(
        str(path), no_lcm=True, config=str(theirs.config["_name_or_path"]), backend="torchscript", image=True
    )
    asked = Request("a red star", 7, sampler="ddim", image=painting(), mask=frame())
    with load(build(spec, tmp_path / "bundle")) as other:
        other.settings = replace(other.settings, scheduler=ours.settings.scheduler)
        assert worst(other.draw(asked).pictures, ours.draw(asked).pictures) >= FLOOR


@pytest.mark.parametrize("words", [["distill", "--data", "x"], ["train-lora", "--data", "x"]], ids=str)
def test_an_inpainting_model_is_not_trained(inpainting, refused, tmp_path, words):
    base = inpainting[1].config["_name_or_path"]
    refused(1, "is an inpainting model", *words, "--base", base, "--out", tmp_path / "lora.safetensors")
    refused(2, "add --image", "build", "--base", base, "--gpu", "cpu", "--no-lcm")


def test_an_inpainting_model_without_a_mask(inpainting):
    ours, _ = inpainting
    asked = {"seed": 7, "sampler": "lcm", "steps": 4, "guidance_scale": 1.0}
    [drawn] = ours("a red star", **asked)  # everything is repainted
    assert np.asarray(drawn).std() > 5
    with pytest.raises(UsageError, match="without a mask"):
        ours("a red star", image=painting(), **asked)


@pytest.mark.parametrize("steps", [4, 7])
def test_a_full_lcm_begins_at_a_picture(full_lcm, steps):
    """By the pipelines of other models, which leave out the first steps of the whole schedule."""
    ours, theirs = full_lcm
    how = {"image": painting(), "strength": 0.6}
    options = {"num_inference_steps": steps, "guidance_scale": 8.5, "num_images_per_prompt": 2}
    drawn = drawn_by_diffusers(StableDiffusionImg2ImgPipeline, theirs, "lcm", **how, **options)
    pictures = ours.draw(Request("a red star", 7, None, steps, 8.5, 2, **how)).pictures
    assert worst(drawn, pictures) >= FLOOR


@pytest.fixture(scope="module")
def full_lcm(tmp_path_factory):
    """Our pipeline of a UNet that takes the guidance scale, and diffusers'."""
    folder = tmp_path_factory.mktemp("full")
    base = factories.write_sd15(folder / "base", time_cond_proj_dim=16)
    with load(build(BuildSpec(str(base), backend="torchscript", image=True), folder / "bundle")) as ours:
        theirs = DiffusionPipeline.from_pretrained(base)
        theirs.config_of_scheduler = theirs.scheduler.config
        yield ours, theirs
