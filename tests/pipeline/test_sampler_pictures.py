"""Pictures of the ordinary samplers, against diffusers with its own schedulers and the same weights."""

from __future__ import annotations

import json
from dataclasses import replace

import factories
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers_reference import SCHEDULERS, reference
from PIL import Image

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.builder.export import export
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db
from lcm_compile.samplers import SAMPLERS

FLOOR = 60  # dB


@pytest.fixture(scope="module")
def ordinary(sd15_checkpoint, sdxl_checkpoint, tmp_path_factory):
    """A bundle of each base without an LCM-LoRA, and the base, which does not clip, as published ones."""
    folder, made = tmp_path_factory.mktemp("ordinary"), {}
    for name, checkpoint in ("sd15", sd15_checkpoint), ("sdxl", sdxl_checkpoint):
        base = factories.with_scheduler(checkpoint, folder / f"{name}-base", clip_sample=False)
        spec = BuildSpec(str(base), no_lcm=True, backend="torchscript")
        made[name] = build(spec, folder / name).folder, base
    return made


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def opened(request, ordinary):
    """Our pipeline of a bundle without an LCM-LoRA, and diffusers' of the same base."""
    bundle, base = ordinary[request.param]
    with load(bundle) as ours:
        yield ours, DiffusionPipeline.from_pretrained(base)


@pytest.fixture
def pair(opened):
    """The two pipelines. What a test changes of them is put back."""
    ours, theirs = opened
    settings, scheduler = ours.settings, theirs.scheduler
    yield ours, theirs
    ours.settings, theirs.scheduler = settings, scheduler


@pytest.mark.parametrize(("steps", "scale"), [(4, 1.0), (25, 7.5)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_are_those_of_diffusers(pair, sampler, steps, scale):
    ours, theirs = pair
    theirs.scheduler = SCHEDULERS[sampler](theirs.scheduler.config)
    drawn = theirs(
        "a red star",
        negative_prompt="blue",
        num_inference_steps=steps,
        guidance_scale=scale,
        num_images_per_prompt=2,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    ).images
    pictures = ours.draw(Request("a red star", 7, "blue", steps, scale, 2, sampler=sampler)).pictures
    for mine, other in zip(pictures, eight_bits(drawn), strict=True):
        assert psnr_db(other, mine) >= FLOOR


@pytest.mark.parametrize("options", [{"guidance_rescale": 0.7}, {"eta": 0.6}], ids=str)
def test_rescale_and_eta_are_those_of_diffusers(pair, options):
    ours, theirs = pair
    theirs.scheduler = SCHEDULERS["ddim"](theirs.scheduler.config)
    drawn = theirs(
        "a red star",
        negative_prompt="blue",
        num_inference_steps=10,
        guidance_scale=20.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
        **options,
    ).images
    asked = {"negative_prompt": "blue", "sampler": "ddim", "steps": 10, "guidance_scale": 20, **options}
    [found] = ours("a red star", seed=7, **asked)
    assert psnr_db(eight_bits(drawn)[0], np.asarray(found)) >= FLOOR


@pytest.mark.parametrize("sampler", ["ddim", "lcm"])
def test_a_scheduler_that_clips(pair, sampler):
    ours, theirs = pair
    theirs.scheduler = SCHEDULERS[sampler]({**theirs.scheduler.config, "clip_sample": True})
    drawn = theirs(
        "a red star",
        num_inference_steps=6,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    ).images
    scheduler = replace(ours.settings.scheduler, clip_sample=True)
    ours.settings = replace(ours.settings, scheduler=scheduler)
    [found] = ours("a red star", seed=7, sampler=sampler, steps=6, guidance_scale=1.0)
    ours.settings = replace(ours.settings, scheduler=replace(scheduler, clip_sample=False))
    [plain] = ours("a red star", seed=7, sampler=sampler, steps=6, guidance_scale=1.0)
    assert (
        psnr_db(eight_bits(drawn)[0], np.asarray(found))
        >= FLOOR
        > psnr_db(np.asarray(plain), np.asarray(found))
    )


@pytest.fixture(scope="module")
def thresholding(sd15_checkpoint, tmp_path_factory):
    """What is built of a base whose scheduler thresholds, its ONNX graphs, and diffusers' pictures."""
    folder = tmp_path_factory.mktemp("thresholding")
    asked = {"thresholding": True, "sample_max_value": 1.5, "clip_sample": False}
    base = factories.with_scheduler(sd15_checkpoint, folder / "base", **asked)
    spec = BuildSpec(str(base), no_lcm=True, backend="torchscript", batch=2)
    export(replace(spec, precision="fp32"), folder / "graphs")
    theirs = DiffusionPipeline.from_pretrained(base)
    config, drawn = theirs.scheduler.config, {}
    for sampler in SAMPLERS:
        theirs.scheduler = SCHEDULERS[sampler](config)
        for scale in (1.0, 7.5):
            drawn[sampler, scale] = theirs(
                "a red star",
                num_inference_steps=6,
                guidance_scale=scale,
                num_images_per_prompt=2,
                generator=torch.Generator("cpu").manual_seed(7),
                output_type="np",
            ).images
    return spec, folder / "graphs", drawn


@pytest.mark.parametrize("backend", ["onnxruntime", "torchscript", "openvino"])
def test_a_scheduler_that_thresholds(thresholding, tmp_path, backend):
    """In the graph where one pass draws, and outside where another guides it."""
    spec, graphs, drawn = thresholding
    if backend == spec.backend:
        bundle = build(spec, tmp_path / "bundle")
    else:
        _, bundle = factories.build_from(graphs, "cpu", backend, tmp_path / "bundle")
    with load(bundle) as ours:
        for (sampler, scale), theirs in drawn.items():
            pictures = ours.draw(Request("a red star", 7, "", 6, scale, 2, sampler=sampler)).pictures
            for mine, other in zip(pictures, eight_bits(theirs), strict=True):
                assert psnr_db(other, mine) >= FLOOR, (sampler, scale)


def test_one_graph_for_the_complete_picture(ordinary, tmp_path):
    bundle, base = ordinary["sd15"]
    spec = BuildSpec(str(base), no_lcm=True, backend="torchscript", whole_loop=True)
    with load(build(spec, tmp_path / "bundle")) as ours, load(bundle) as staged:
        for sampler in SAMPLERS:
            asked = {"seed": 7, "sampler": sampler, "steps": 4, "guidance_scale": 1.0}
            one, other = (p("a red star", **asked)[0] for p in (ours, staged))
            assert psnr_db(np.asarray(one), np.asarray(other)) >= FLOOR


def test_run_tells_the_sampler(ordinary, command, refused, tmp_path):
    words = ["run", "a star", "--bundle", ordinary["sd15"][0], "--seed", 7, "--out", tmp_path / "a.png"]
    _, out, err = command(*words, "--sampler", "euler-a", "--guidance-scale", 1, "--json")
    assert json.loads(out)["sampler"] == "euler-a" and "needs guidance: 7.5 by default" in err
    assert "Sampler: Euler a" in Image.open(tmp_path / "a.png").text["parameters"]
    first = Image.open(tmp_path / "a.png").tobytes()
    command("run", "--again", tmp_path / "a.png", "--out", tmp_path / "b.png")
    assert Image.open(tmp_path / "b.png").tobytes() == first
    command(*words[:-1], tmp_path / "c.png", "--sampler", "ddim", "--eta", 0.5, "--steps", 4)
    again = "run", "--again", tmp_path / "c.png", "--out", tmp_path / "d.png"
    assert command(*again, "--sampler", "euler", "--json")[0] == 0
    refused(2, ["unknown sampler 'eulr'", "euler"], *words, "--sampler", "eulr")
    refused(2, "from 1 to 50", *words, "--sampler", "lcm", "--steps", 51)
    refused(2, "euler has no eta", *words, "--sampler", "euler", "--eta", 0.5)
    refused(2, "guidance rescale must be from 0 to 1", *words, "--guidance-rescale", 1.5)
    refused(2, "from 1 to 1000", *words, "--sampler", "ddim", "--steps", 1001)
    with pytest.raises(UsageError, match="sampler"):
        Request("a star", 1, sampler=None)


def test_a_bundle_with_an_lcm_lora_is_told_to_be_for_lcm(sd15_checkpoint, command, tmp_path):
    lora = factories.write_lora(reference(sd15_checkpoint), tmp_path / "lcm.safetensors", "kohya")
    spec = BuildSpec(str(sd15_checkpoint), lcm_lora=LoraSpec(str(lora)), backend="torchscript")
    bundle = build(spec, tmp_path / "bundle").folder
    _, _, err = command(
        "run", "a star", "--bundle", bundle, "--sampler", "euler", "--out", tmp_path / "a.png"
    )
    assert "made for --sampler lcm" in err and err.count("hint") == 1
