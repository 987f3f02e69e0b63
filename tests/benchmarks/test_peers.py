"""Programs with a loop of their own draw the bundle's picture, from weights that are written for them."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace

import factories
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionXLPipeline

from lcm_compile import BuildSpec, LoraSpec
from lcm_compile.benchmarks.measure.report import read_report
from lcm_compile.benchmarks.measure.rivals import Setup, check_rivals, makers
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.engines import openvino
from lcm_compile.errors import UsageError
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import psnr_db
from lcm_compile.scheduler import SchedulerSettings
from lcm_compile.spec import Shape

PROMPT, SEED = "a red star", 7
SAME = 70  # dB: a pixel in a hundred is one level off
needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("openvino_genai") is None, reason="needs pip install 'lcm-compile[rivals]'"
)
needs_sd_cpp = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="needs pip install 'lcm-compile[rivals]'"
)


def setup_of(checkpoint, shape, precision="fp32", guidance_scale=1.0):
    scheduler = open_checkpoint(str(checkpoint)).scheduler
    drawing = PipelineSettings(shape, scheduler, (), True, PROMPT, guidance_scale=guidance_scale)
    return Setup(shape, precision, 1, False, drawing)


def diffusers_picture(checkpoint, setup, lora=None):
    """Diffusers' LCM picture as floats from 0 to 1."""
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    if lora is not None:
        pipe.load_lora_weights(lora)
    return draw_with(pipe, setup)


def draw_with(pipe, setup):
    return pipe(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=setup.pipeline.guidance_scale,
        num_images_per_prompt=setup.shape.batch,
        height=setup.shape.height,
        width=setup.shape.width,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
    ).images


def cut_off(picture):
    """A picture in 8 bits as GenAI makes them: it does not round."""
    return np.floor(255 * picture).astype(np.uint8)


def made(name, checkpoint, setup, lora=None):
    """What `makers` gives for one rival; the weights are there within the block."""
    chosen = {"no_lcm": True} if lora is None else {"lcm_lora": LoraSpec(str(lora))}
    spec = BuildSpec(str(checkpoint), height=setup.shape.height, width=setup.shape.width, **chosen)
    return makers({name: None}, spec, "torchscript", setup, lambda _: None)


@pytest.fixture(scope="module")
def lora(sdxl_checkpoint, tmp_path_factory):
    pipe = DiffusionPipeline.from_pretrained(sdxl_checkpoint)
    return factories.write_lora(
        pipe, tmp_path_factory.mktemp("lora") / "lcm.safetensors", "diffusers", seed=1
    )


@needs_genai
def test_genai_draws_diffusers_picture_with_the_lora_fused(sdxl_checkpoint, lora):
    setup = setup_of(sdxl_checkpoint, Shape(1, 64, 64))
    theirs = cut_off(diffusers_picture(sdxl_checkpoint, setup, lora))
    assert psnr_db(theirs, cut_off(diffusers_picture(sdxl_checkpoint, setup)), 255.0) < SAME - 40
    with made("openvino-genai", sdxl_checkpoint, setup, lora) as maker:
        draw = maker["openvino-genai"]()
    drawn = draw(PROMPT, SEED)
    assert psnr_db(theirs, drawn.pictures, 255.0) >= SAME
    assert drawn.stages["step"] > 1  # milliseconds
    assert psnr_db(theirs, draw("a blue circle", SEED).pictures, 255.0) < SAME - 20


@needs_genai
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "floor"), [("fp32", SAME), ("bf16", 40)])
def test_genai_draws_pairs_of_sd15_with_guidance(sd15_checkpoint, precision, floor):
    if reason := openvino.cannot_compute(Precision(precision)):
        pytest.skip(reason)
    setup = setup_of(sd15_checkpoint, Shape(2, 64, 64), precision, guidance_scale=1.5)
    theirs = cut_off(diffusers_picture(sd15_checkpoint, setup))
    with made("openvino-genai", sd15_checkpoint, setup) as maker:
        pictures = maker["openvino-genai"]()(PROMPT, SEED).pictures
    assert pictures.shape == (2, 64, 64, 3)
    assert psnr_db(theirs, pictures, 255.0) >= floor


@needs_genai
@pytest.mark.slow
def test_bench_tells_genais_time_memory_and_start(sdxl_bundle, command, tmp_path):
    words = ("--against", "openvino-genai", "--runs", 1, "--json", "--save", tmp_path / "report.json")
    code, out, err = command("bench", sdxl_bundle, *words, "--quiet")
    assert (code, err) == (0, "")
    cases = {case.name: case.rivals for case in read_report(tmp_path / "report.json").cases}
    timed = {name for name, rivals in cases.items() if rivals}
    assert timed == {"picture", "step", "cold start", "load", "first picture"}
    assert all(min(cases[name]["openvino-genai"].samples_ms) > 0 for name in timed)
    assert cases["picture"]["openvino-genai"].memory_bytes > 50e6
    ratio = json.loads(out)["summary"]["cases"]["picture"]["rivals"]["openvino-genai"]["ratio"]
    assert ratio > 0


def test_sd_cpp_is_given_the_weights_with_the_lora_fused(sdxl_checkpoint, lora):
    setup = setup_of(sdxl_checkpoint, Shape(1, 64, 64))
    theirs = diffusers_picture(sdxl_checkpoint, setup, lora)
    with made("sd-cpp", sdxl_checkpoint, setup, lora) as maker:
        file, _ = maker["sd-cpp"].args
        pipe = StableDiffusionXLPipeline.from_single_file(
            str(file), config=str(sdxl_checkpoint), local_files_only=True
        )
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    assert psnr_db(theirs, draw_with(pipe, setup), 1.0) >= 40  # the file is in fp16


@needs_sd_cpp
@pytest.mark.slow
def test_sd_cpp_draws_the_picture_of_a_full_size_sd15():
    shape = Shape(1, 128, 128)
    spec = BuildSpec("sd15", weights="random", no_lcm=True, few_step="lcm", height=128, width=128)
    scheduler = SchedulerSettings(timestep_spacing="leading", steps_offset=1)
    setup = Setup(shape, "fp32", 2, False, PipelineSettings(shape, scheduler, (), True, PROMPT))
    rivals = dict.fromkeys(("eager", "sd-cpp", "sd-cpp-q8_0"))
    with makers(rivals, spec, "torchscript", setup, lambda _: None) as made:
        # Random weights have a stand-in tokenizer, and sd.cpp has CLIP's: they agree on no words alone.
        theirs = made["eager"]()("", SEED).pictures
        draw = made["sd-cpp"]()
        assert psnr_db(theirs, draw("", SEED).pictures, 255.0) >= 50
        assert psnr_db(theirs, draw(PROMPT, SEED).pictures, 255.0) < 40
        del draw
        assert 40 <= psnr_db(theirs, made["sd-cpp-q8_0"]()("", SEED).pictures, 255.0) < 58


@pytest.mark.parametrize("name", ["sd-cpp", "sd-cpp-q8_0"])
def test_sd_cpp_refuses_bases_of_other_widths_by_name(sdxl_bundle, refused, name):
    base = open_bundle(sdxl_bundle).manifest.spec.base
    told = [
        f"the rival {name} reads UNets whose first level is 320 wide",
        f"{base} is 32",
        f"leave out --against {name}",
    ]
    refused(2, told, "bench", sdxl_bundle, "--against", name)


def changed(bundle, spec=None, **settings):
    """A bundle whose manifest has another spec or other settings of the pipeline."""
    manifest = bundle.manifest
    pipeline = replace(manifest.pipeline, **settings)
    return replace(bundle, manifest=replace(manifest, pipeline=pipeline, spec=spec or manifest.spec))


@pytest.mark.parametrize("name", ["openvino-genai", "sd-cpp"])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sampler": "euler"}, "LCM's usual steps alone, and this bundle draws with euler"),
        ({"timesteps": (999, 749, 499, 249)}, "lcm at timesteps of its own"),
        ({"prediction_type": "v_prediction"}, "this one predicts v_prediction"),
        ({"thresholding": True}, "does not clip the predicted picture"),
    ],
)
def test_what_a_peer_would_draw_otherwise_is_refused(sdxl_bundle, name, settings, told):
    bundle = open_bundle(sdxl_bundle)
    if "sampler" not in settings:
        settings = {"scheduler": replace(bundle.manifest.pipeline.scheduler, **settings)}
    with pytest.raises(UsageError, match=f"the rival {name} .*{told}") as error:
        check_rivals((name,), changed(bundle, **settings))
    assert error.value.hint == f"leave out --against {name}"


def test_a_noise_schedule_that_sd_cpp_does_not_have_is_refused(sdxl_bundle):
    bundle = open_bundle(sdxl_bundle)
    scheduler = replace(bundle.manifest.pipeline.scheduler, beta_end=0.02)
    with pytest.raises(UsageError, match=r"sd-cpp has beta_end 0\.012 as a constant.* 0\.02"):
        check_rivals(("sd-cpp",), changed(bundle, scheduler=scheduler))


@pytest.mark.parametrize(
    ("name", "package"),
    [("openvino-genai", "openvino_genai"), ("sd-cpp", "cyllama"), ("sd-cpp-q8_0", "cyllama")],
)
def test_a_missing_package_is_named_with_its_extra(sdxl_bundle, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)  # Python's own mark for a module that can't be imported
    # With a tiny autoencoder, in whose place rivals have the base's own.
    full = changed(open_bundle(sdxl_bundle), BuildSpec("sd15", weights="random", no_lcm=True, vae="taesd"))
    full = replace(full, manifest=replace(full.manifest, lossy={"decode": "taesd"}))
    with pytest.raises(UsageError, match=f"{name} needs the package {package}") as error:
        check_rivals((name,), full)
    assert error.value.hint == "pip install 'lcm-compile[rivals]'"
