"""Pictures of two passes, against diffusers' pipelines used one after the other with the same weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import factories
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
)
from diffusers_reference import SCHEDULERS
from PIL import Image

from lcm_compile import BuildSpec, build, load
from lcm_compile.builder.build import add_size
from lcm_compile.errors import UsageError
from lcm_compile.output.picture_settings import read_origin
from lcm_compile.output.sheet import grid_sheet
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.hires import enlarged
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import ControlNetSpec

FLOOR = 60  # dB
LARGER = 96  # pixels on a side, of pictures that are 64 first
PROMPTS = {"prompt": "a red star", "negative_prompt": "blue"}


def build_two_sizes(folder, base, **options):
    """The folder of a bundle of 64×64 and 96×96, which reads images; its base does not clip."""
    base = factories.with_scheduler(base, folder / "base", clip_sample=False)
    spec = BuildSpec(str(base), no_lcm=True, few_step="lcm", image=True, height=64, width=64, **options)
    bundle = build(spec, folder / "bundle").folder
    add_size(bundle, LARGER, LARGER)
    return bundle, base


@pytest.fixture(scope="module")
def sd15(sd15_checkpoint, tmp_path_factory):
    """A bundle with a ControlNet and a slot for a LoRA, a picture at a time, and its base."""
    folder = tmp_path_factory.mktemp("sd15")
    net = ControlNetSpec(str(factories.write_controlnet(sd15_checkpoint, folder / "net")))
    options = {"backend": "torchscript", "controlnets": (net,), "lora_slots": 1, "lora_rank": 4}
    return *build_two_sizes(folder, sd15_checkpoint, **options), folder / "net"


@pytest.fixture(scope="module")
def sdxl(sdxl_checkpoint, tmp_path_factory):
    """A bundle that draws two pictures at a time, and its base."""
    return build_two_sizes(tmp_path_factory.mktemp("sdxl"), sdxl_checkpoint, backend="onnxruntime", batch=2)


def by_hand(text_to_image, image_to_image, upscaler, count, steps, scale, strength, control=None):
    """Pictures that diffusers draws, enlarges and draws on, each pass with a new generator of the seed."""

    def draw(pipe, prompts, output, **options):
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            **prompts,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=torch.Generator("cpu").manual_seed(7),
            output_type=output,
            **options,
        ).images

    one, other = ({}, {}) if control is None else ({"image": control}, {"control_image": control})
    other |= {"controlnet_conditioning_scale": 1.0} if other else {}  # which is 0.8 by default, and 1 before
    size = {"height": 64, "width": 64}
    kind = "latent" if upscaler == "latent" else "pil"
    first = draw(text_to_image, PROMPTS, kind, num_images_per_prompt=count, **size, **one)
    if upscaler == "latent":
        new = [side * LARGER // 64 for side in first.shape[2:]]
        first = torch.nn.functional.interpolate(first, size=new, mode="bilinear", antialias=False)
    else:
        first = [image.resize((LARGER, LARGER), Image.Resampling.LANCZOS) for image in first]
    prompts = {name: [text] * count for name, text in PROMPTS.items()}
    larger = {"height": LARGER, "width": LARGER} if control is not None else {}
    drawn = draw(image_to_image, prompts, "np", image=first, strength=strength, **larger, **other)
    return eight_bits(drawn)


def worst(theirs, ours):
    assert theirs.shape == ours.shape and theirs.std() > 5
    return min(psnr_db(other, mine) for other, mine in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
@pytest.mark.parametrize(("sampler", "steps", "scale"), [("lcm", 4, 1.5), ("dpm++2m", 6, 5.0)])
def test_two_passes_are_those_of_diffusers(sdxl, upscaler, sampler, steps, scale):
    bundle, base = sdxl
    theirs = DiffusionPipeline.from_pretrained(base)
    theirs.scheduler = SCHEDULERS[sampler](theirs.scheduler.config)
    later = AutoPipelineForImage2Image.from_pipe(theirs)
    expected = by_hand(theirs, later, upscaler, 3, steps, scale, 0.7)
    asked = Request(**PROMPTS, seed=7, steps=steps, guidance_scale=scale, num_images=3, sampler=sampler)
    asked = replace(asked, hires=LARGER / 64, hires_upscaler=upscaler)
    with load(bundle) as ours:
        reports = []
        drawing = ours.draw(asked, lambda done, total: reports.append((done, total)))
        assert worst(expected, drawing.pictures) >= FLOOR
        assert len(drawing.ms["step"]) == 2 * (steps + int(0.7 * steps))
        assert reports[-1] == (reports[0][1], reports[0][1])
        assert len({total for _, total in reports}) == 1
        [alone] = ours.draw(replace(asked, index=1)).pictures
        assert (alone == drawing.pictures[1]).all()
        [single] = ours.draw(replace(asked, num_images=1)).pictures
        [other] = ours.draw(replace(asked, num_images=1, hires_strength=0.4)).pictures
        assert psnr_db(single, other) < FLOOR


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_controlnets_guide_both_passes(sd15, upscaler):
    bundle, base, net = sd15
    theirs = DiffusionPipeline.from_pretrained(base)
    theirs.scheduler = SCHEDULERS["lcm"](theirs.scheduler.config)
    parts = {**theirs.components, "controlnet": ControlNetModel.from_pretrained(net)}
    first, later = (
        kind(**parts, requires_safety_checker=False)
        for kind in (StableDiffusionControlNetPipeline, StableDiffusionControlNetImg2ImgPipeline)
    )
    control = factories.outline((80, 80))
    expected = by_hand(first, later, upscaler, 1, 4, 2.0, 0.8, control)
    asked = {"hires": 1.5, "hires_upscaler": upscaler, "hires_strength": 0.8, "control": control}
    with load(bundle) as ours:
        drawn = ours(**PROMPTS, seed=7, guidance_scale=2.0, **asked)
    assert worst(expected, np.asarray(drawn[0])[None]) >= FLOOR


def test_lanczos_is_an_image_to_image_pass_of_its_own(sd15, tmp_path):
    """With a LoRA in a slot, and other steps in the second pass."""
    bundle, base, _ = sd15
    pipe = DiffusionPipeline.from_pretrained(base)
    lora = factories.write_lora(pipe, tmp_path / "x.safetensors", "kohya")
    own = {"control": factories.outline((64, 64)), "loras": [f"{lora}:0.7"], "seed": 3}
    with load(bundle) as small, load(bundle, height=LARGER, width=LARGER) as large:
        for loras in (own["loras"], []):
            own["loras"] = loras
            [first] = small("a red star", **own)
            [second] = large("a red star", image=first, strength=0.5, steps=6, **own)
            given = {"hires": 1.5, "hires_upscaler": "lanczos", "hires_strength": 0.5, "hires_steps": 6}
            [both] = small("a red star", **own, **given)
            assert (np.asarray(both) == np.asarray(second)).all()
        with pytest.raises(UsageError, match="height 128 and width 128"):
            small("a red star", hires=2, **own)
        kept = small.larger(Request("a red star", 1, hires=1.5))
        assert kept is small.larger(Request("a star", 2, hires=1.5))
    with pytest.raises(UsageError, match="closed"):
        kept("a red star")


@pytest.mark.parametrize("size", [(96, 96), (64, 160), (17, 65)])
def test_a_latent_is_enlarged_as_torch_does_it(size):
    latents = np.random.default_rng(1).standard_normal((2, 4, 16, 64), np.float32)
    size = max(16, size[0]), max(64, size[1])
    expected = torch.nn.functional.interpolate(torch.from_numpy(latents), size=size, mode="bilinear")
    found = enlarged(latents, *size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=5e-5)  # torch has places in float32


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_tells_its_second_pass_and_is_drawn_again(command, sdxl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", "a red star", "--bundle", sdxl[0], "--hires", 1.5]
    asked = ["--hires-upscaler", "lanczos", "--hires-steps", 5, "--hires-strength", 0.6]
    code, out, err = command(*words, *asked, "--seed", 5, "--num-images", 3, "--out", "all", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["hires"] == {"factor": 1.5, "upscaler": "lanczos", "strength": 0.6, "steps": 5}
    assert told["ms"]["encode-image"] > 0
    text = Image.open("all/001.png").text["parameters"]
    for part in ("Size: 64x64,", "Denoising strength: 0.6,", "Hires upscale: 1.5, Hires steps: 5,"):
        assert part in text
    assert "Hires upscaler: Lanczos," in text
    origin = read_origin(tmp_path / "all/001.png")
    assert origin.request.hires == 1.5 and origin.larger not in (None, origin.bundle)
    code, _, err = command("run", "--again", "all/001.png", "--bundle", sdxl[0], "--out", "b.png")
    assert code == 0 and "another bundle" not in err
    assert (pixels("b.png") == pixels("all/001.png")).all()
    code, _, err = command(
        "run", "--again", "b.png", "--bundle", sdxl[0], "--hires-upscaler", "latent", "--out", "c.png"
    )
    assert code == 0 and (pixels("c.png") != pixels("b.png")).any()

    grid = "--grid", "seed=5,6,steps=4", "--out", "sheet.png"
    assert command(*words, *grid)[0] == 0
    sheet = Image.open("sheet.png").convert("RGB")
    assert command(*words, "--seed", "5,6", "--out", "two")[0] == 0
    cells = [Image.open(f"two/a-red-star-{seed}.png") for seed in (5, 6)]
    own = grid_sheet(iter(cells), (96, 96), ["seed 5", "seed 6"], ["steps 4"], "x")
    below = own.height - 100
    assert (np.asarray(sheet)[-below:] == np.asarray(own.convert("RGB"))[-below:]).all()


def test_prompts_of_stdin(command, sdxl, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    monkeypatch.setattr("sys.stdin", (tmp_path / "prompts.txt").open())
    words = ["run", "--stdin", "--bundle", sdxl[0], "--hires", 1.5, "--seed", 5, "--out", tmp_path]
    code, out, err = command(*words)
    assert code == 0, err
    assert [Image.open(path).size for path in out.split("\n") if path] == [(96, 96)] * 2


def test_what_can_not_be_drawn_is_refused(command, refused, sdxl, sdxl_bundle, tmp_path):
    bundle, out = sdxl[0], tmp_path / "a.png"
    words = ["run", "a red star", "--out", out, "--bundle"]
    told = ["height 128 and width 128", "64x64, 96x96", f"build --into {bundle} --size 128x128"]
    refused(2, told, *words, bundle, "--hires", 2)
    refused(2, ["height 128", f"--into {sdxl_bundle} --size 128x128"], *words, sdxl_bundle, "--hires", 2)
    without = ["lanczos needs a bundle that encodes", "lcm-compile build", "--image", "latent needs none"]
    refused(2, without, *words, sdxl_bundle, "--hires", 2, "--hires-upscaler", "lanczos")
    refused(2, "above 1", *words, bundle, "--hires", 1)
    refused(2, "from 0 to 16", *words, bundle, "--hires", 17)
    refused(2, ["unknown hires upscaler", "latent, lanczos"], *words, bundle, *hires("--hires-upscaler", "x"))
    refused(2, ["hires strength of 0.1", "0.25"], *words, bundle, *hires("--hires-strength", 0.1))
    refused(2, "must be from", *words, bundle, *hires("--hires-steps", 0))
    refused(2, "without hires", *words, bundle, "--hires-steps", 4)
    factories.painting().save(tmp_path / "in.png")
    refused(2, "an image is given", *words, bundle, *hires("--image", tmp_path / "in.png"))
    assert not out.exists()


def hires(*words):
    return "--hires", 1.5, *words


def test_a_damaged_size_is_told_before_anything_is_drawn(refused, sdxl, tmp_path):
    bundle = shutil.copytree(sdxl[0], tmp_path / "bundle")
    (bundle / "sizes" / "96x96" / "engines" / "step.onnx").write_bytes(b"x")
    out = tmp_path / "a.png"
    refused(1, "is damaged", "run", "a star", "--bundle", bundle, "--hires", 1.5, "--out", out)
    assert not out.exists()
