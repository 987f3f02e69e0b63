"""Few-step methods: pictures of bundles beside those that diffusers draws as the model cards say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import factories
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers_reference import FLOOR, SCHEDULERS
from PIL import Image
from safetensors.torch import save_file

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.builder.plan import make_plan
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.errors import LoraError, UsageError
from lcm_compile.lora.few_step import FEW_STEP, LICENCES, METHODS, defaults_of, find_few_step, licence_of
from lcm_compile.lora.fuse import fuse
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.proof.parity import psnr_db

TRAILING = {"timestep_spacing": "trailing"}
# What the model cards do with diffusers: the scheduler's settings and class, and the pipeline's options.
CARDS = {
    "lcm:4": ({}, "lcm", {}),
    "dmd2:4": ({}, "lcm", {}),
    "lightning:4": (TRAILING, "euler", {}),
    "hyper:4": (TRAILING, "ddim", {}),
    "hyper:1": ({}, "tcd", {"eta": 1.0}),
    "hyper:8-cfg": (TRAILING, "ddim", {"guidance_scale": 5.0}),
    "tcd:4": ({}, "tcd", {"eta": 0.3}),
    "pcm:4": ({**TRAILING, "clip_sample": False, "set_alpha_to_one": False}, "ddim", {}),
    "pcm:lcm": ({}, "lcm", {}),
    "flash:4": (TRAILING, "lcm", {}),
    "turbo:1": (TRAILING, "euler-a", {}),
}
DMD2 = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 8: [999, 874, 749, 624, 499, 374, 249, 124]}


@pytest.fixture(scope="module")
def fused(sd15_checkpoint, sdxl_checkpoint, tmp_path_factory):
    """For both architectures: the base, a LoRA, what diffusers makes of them, and a bundle with both.

    No engine depends on the method: a bundle's settings make it draw by another one.
    """
    folder, made = tmp_path_factory.mktemp("few-step"), {}
    for name, base in (("sd15", sd15_checkpoint), ("sdxl", sdxl_checkpoint)):
        theirs = DiffusionPipeline.from_pretrained(base)
        theirs.set_progress_bar_config(disable=True)
        lora = factories.write_lora(theirs, folder / f"{name}.safetensors", "kohya")
        theirs.load_lora_weights(lora)
        theirs.fuse_lora(lora_scale=0.5)
        weights = LoraSpec(str(lora), 0.5)
        spec = BuildSpec(str(base), lcm_lora=weights, backend="torchscript")
        made[name] = base, weights, theirs, build(spec, folder / f"{name}-bundle").folder
    return made


@pytest.mark.parametrize("method", CARDS)
@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
def test_pictures_are_those_of_the_model_card(fused, architecture, method):
    base, lora, theirs, bundle = fused[architecture]
    settings, sampler, options = CARDS[method]
    spec = BuildSpec(str(base), few_step=method, few_step_lora=lora, backend="torchscript")
    plan = make_plan(spec).export
    before = theirs.scheduler
    theirs.scheduler = SCHEDULERS[sampler]({**before.config, **settings})
    with load(bundle) as ours:
        defaults = vars(defaults_of(plan.few_step, plan.checkpoint))
        ours.settings = replace(ours.settings, scheduler=plan.checkpoint.scheduler, **defaults)
        for steps in (1, 2, 4, 8):
            timesteps = {"timesteps": DMD2[steps]} if method == "dmd2:4" else {}
            expected = theirs(
                "a red star",
                num_inference_steps=steps,
                **{"guidance_scale": 1.0, **options},
                **timesteps,
                generator=torch.Generator("cpu").manual_seed(7),
                output_type="np",
            ).images
            [found] = ours("a red star", seed=7, steps=steps)
            assert psnr_db(eight_bits(expected)[0], np.asarray(found)) >= FLOOR
    theirs.scheduler = before


def test_every_method_has_its_row_and_its_model_card():
    assert {row.method for row in FEW_STEP} == set(METHODS) == {name.partition(":")[0] for name in CARDS}
    for row in FEW_STEP:
        assert row.steps in row.made_for
        assert {*row.weights, *row.unets, *row.families} <= FAMILIES.keys()
    sources = {source for row in FEW_STEP for source in (*row.weights.values(), *row.unets.values())}
    unlicensed = {source for source in sources if ":" in source and licence_of(source) is None}
    assert {source.partition(":")[0] for source in unlicensed} == {"wangfuyun/PCM_Weights"}
    assert licence_of("stabilityai/sdxl-turbo") == LICENCES["stabilityai/sdxl-turbo"]
    assert find_few_step("turbo", "sd21").sampler == "euler"
    assert find_few_step("turbo", None).sampler == "euler-a"


@pytest.mark.parametrize(
    ("method", "predicted", "card", "options"),
    [
        ("lightning:1", "sample", ("euler", {**TRAILING, "prediction_type": "sample"}), {}),
        ("dmd2:1", "epsilon", ("lcm", {}), {"timesteps": [399]}),
        ("hyper:1-unet", "epsilon", ("lcm", {}), {"timesteps": [800]}),
    ],
)
def test_a_complete_unet_of_one_step(sd15_checkpoint, tmp_path, method, predicted, card, options):
    theirs = DiffusionPipeline.from_pretrained(sd15_checkpoint)
    theirs.set_progress_bar_config(disable=True)
    for weight in theirs.unet.parameters():
        weight.data *= 0.9
    file = tmp_path / "unet.safetensors"
    save_file({name: weight.contiguous() for name, weight in theirs.unet.state_dict().items()}, file)
    sampler, settings = card
    theirs.scheduler = SCHEDULERS[sampler]({**theirs.scheduler.config, **settings})
    expected = theirs(
        "a red star",
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
        **options,
    ).images
    spec = BuildSpec(
        str(sd15_checkpoint), few_step=method, few_step_lora=LoraSpec(str(file)), backend="torchscript"
    )
    bundle = build(spec, tmp_path / "bundle")
    assert bundle.manifest.pipeline.scheduler.prediction_type == predicted
    assert bundle.manifest.loras == ()
    with load(bundle) as ours:
        [found] = ours("a red star", seed=7)
    assert psnr_db(eight_bits(expected)[0], np.asarray(found)) >= FLOOR


def test_the_method_is_part_of_everything(fused, command, tmp_path):
    base, lora, _, _ = fused["sd15"]
    options = ["--base", base, "--gpu", "cpu", "--backend", "torchscript", "--few-step-lora", str(lora)]
    _, out, err = command("build", *options, "--few-step", "lightning:8", "--out", tmp_path / "bundle")
    again = BuildSpec(str(base), few_step="hyper", few_step_lora=lora, backend="torchscript")
    plan = make_plan(again, tmp_path / "bundle")
    assert "few-step method changed: lightning:8 → hyper:4" in plan.reasons
    _, out, err = command(
        *("run", "a star", "--bundle", tmp_path / "bundle", "--seed", 7, "--json"),
        *("--out", tmp_path / "a.png"),
    )
    told = json.loads(out)
    assert (told["sampler"], told["steps"], told["few_step"]) == ("euler", 8, "lightning:8")
    assert "hint" not in err
    texts = Image.open(tmp_path / "a.png").text
    assert "Few-step weights: lightning 8" in texts["parameters"]
    assert json.loads(texts["lcm-compile"])["few_step"] == "lightning:8"
    _, out, err = command(
        *("run", "a star", "--bundle", tmp_path / "bundle", "--steps", 4, "--sampler", "lcm"),
        *("--guidance-scale", 3, "--out", tmp_path / "b.png"),
    )
    for hint in ("made for 8 steps, not 4", "made for --sampler euler", "3 may oversaturate"):
        assert hint in err
    _, out, _ = command("inspect", tmp_path / "bundle", "--json")
    assert json.loads(out)["few_step"]["made_for"] == [8]


@pytest.mark.parametrize("out", ["folder", "file.safetensors"])
def test_what_fuse_wrote_draws_as_its_weights_do(fused, tmp_path, out):
    base, lora, theirs, _ = fused["sdxl"]
    fuse(BuildSpec(str(base), few_step="lightning:2", few_step_lora=lora), tmp_path / out, "fp32")
    config = None if out == "folder" else str(base)
    plan = make_plan(BuildSpec(str(tmp_path / out), config=config, backend="torchscript")).export
    assert (plan.few_step.name, plan.loras) == ("lightning:2", ())
    assert plan.checkpoint.scheduler.timestep_spacing == "trailing"
    if out == "folder":
        opened = DiffusionPipeline.from_pretrained(tmp_path / out)
        assert type(opened.scheduler).__name__ == "EulerDiscreteScheduler"
        assert opened.scheduler.config.timestep_spacing == "trailing"
        layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        expected = theirs.unet.get_submodule(layer).base_layer.weight
        found = opened.unet.get_submodule(layer).weight
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_lora_of_another_method_is_told(fused, command, tmp_path):
    base, lora, _, _ = fused["sd15"]
    named = shutil.copy(lora.source, tmp_path / "pcm_sd15_smallcfg_8step_converted.safetensors")
    words = ["build", "--base", base, "--gpu", "cpu", "--backend", "torchscript", "--dry-run"]
    _, _, err = command(*words, "--lcm-lora", named)
    assert "is a pcm LoRA" in err and "--few-step pcm:8 --few-step-lora" in err
    _, _, err = command(*words, "--no-lcm", "--lora", named)
    assert "is a pcm LoRA" in err
    _, out, err = command(*words, "--few-step", "pcm:8", "--few-step-lora", named)
    assert "is a pcm LoRA" not in err and "pcm:8" in out


def test_a_licence_that_forbids_commercial_use_is_told(fused, command, monkeypatch):
    base, lora, _, _ = fused["sd15"]
    monkeypatch.setitem(LICENCES, lora.source, "cc-by-nc-4.0")
    words = ["--base", base, "--gpu", "cpu", "--backend", "torchscript", "--dry-run"]
    _, out, err = command("build", *words, "--few-step", "flash", "--few-step-lora", str(lora))
    assert "cc-by-nc-4.0, not for commercial use" in err and "flash:4, licence cc-by-nc-4.0" in out


def test_an_ordinary_base_has_defaults_of_its_own(fused):
    for architecture, scale in (("sd15", 7.5), ("sdxl", 5.0)):
        spec = BuildSpec(str(fused[architecture][0]), no_lcm=True, backend="torchscript")
        plan = make_plan(spec).export
        own = defaults_of(plan.few_step, plan.checkpoint)
        assert (own.steps, own.guidance_scale, plan.few_step, plan.loras) == (25, scale, None, ())
        assert own.sampler == "euler"  # for PNDM, which is no sampler here, and for its own
    for config, sampler in (
        ({"_class_name": "DDIMScheduler"}, "ddim"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "euler-a"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpm++2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "dpm++2m-sde"),
    ):
        assert defaults_of(None, replace(plan.checkpoint, scheduler_config=config)).sampler == sampler


def test_what_is_refused(sd15_checkpoint, tmp_path):
    full_lcm = factories.write_sd15(tmp_path / "lcm", time_cond_proj_dim=16)
    base, lora = str(sd15_checkpoint), LoraSpec("x.safetensors")
    with pytest.raises(UsageError, match="few-step method 'lighting'"):
        make_plan(BuildSpec(base, few_step="lighting", backend="torchscript"))
    with pytest.raises(UsageError, match="no lightning of '3'") as error:
        make_plan(BuildSpec(base, few_step="lightning:3", backend="torchscript"))
    assert "lightning:4 or lightning:2" in error.value.hint
    with pytest.raises(UsageError, match="full LCM"):
        make_plan(BuildSpec(str(full_lcm), few_step="tcd", backend="torchscript"))
    with pytest.raises(UsageError, match="without its method"):
        BuildSpec(base, few_step_lora=lora)
    with pytest.raises(UsageError, match="is an LCM-LoRA"):
        BuildSpec(base, few_step="tcd", lcm_lora=lora)
    with pytest.raises(UsageError, match="--few-step-lora and --no-lcm"):
        BuildSpec(base, few_step="tcd", few_step_lora=lora, no_lcm=True)
    with pytest.raises(LoraError, match="no lightning:4 LoRA is published"):
        make_plan(BuildSpec("demo", few_step="lightning", backend="torchscript"))
    with pytest.raises(UsageError, match="--whole-loop draws in 4 steps"):
        make_plan(BuildSpec("demo", few_step="lightning:8", no_lcm=True, whole_loop=True))
