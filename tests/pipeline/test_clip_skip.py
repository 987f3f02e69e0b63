"""`--clip-skip`: pictures of text states of earlier layers, against diffusers and transformers."""

from __future__ import annotations

import json

import pytest
from diffusers_reference import FLOOR, reference
from prompt_reference import encode, picture, psnr

from lcm_compile import BuildSpec, build, load
from lcm_compile.checkpoint.open import open_base
from lcm_compile.errors import UsageError

PROMPT = "a large red star on white"


@pytest.mark.parametrize("skip", [1, 2])
def test_sdxl_is_diffusers(sdxl_checkpoint, tmp_path, skip):
    spec = BuildSpec(str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="torchscript", clip_skip=skip)
    theirs = reference(sdxl_checkpoint)
    states = theirs.encode_prompt(PROMPT, clip_skip=skip, do_classifier_free_guidance=False)
    with load(build(spec, tmp_path / "bundle")) as ours:
        assert psnr(ours, PROMPT, picture(theirs, (states[0], states[2]))) >= FLOOR
        assert psnr(ours, PROMPT, picture(theirs, encode(theirs, [[(PROMPT, 1)]]))) < FLOOR - 10


@pytest.mark.parametrize("skip", [1, 3])
def test_sd15_is_an_earlier_layer_through_the_final_norm(sd15_checkpoint, command, tmp_path, skip):
    """Diffusers' own option raises with transformers 5, whose text encoder has no `text_model`."""
    words = ["build", "--base", sd15_checkpoint, "--gpu", "cpu", "--no-lcm", "--backend", "torchscript"]
    words += ["--out", tmp_path / "bundle", "--prompt-tokens", 154, "--clip-skip", skip]
    code, _, err = command(*words)
    assert code == 0, err
    theirs = reference(sd15_checkpoint)
    chunks = [[("red " * 75, 1)], [(PROMPT, 1)]]
    prompt = "red " * 75 + PROMPT
    with load(tmp_path / "bundle") as ours:
        assert psnr(ours, prompt, picture(theirs, encode(theirs, chunks, clip_skip=skip))) >= FLOOR
        assert psnr(ours, prompt, picture(theirs, encode(theirs, chunks))) < FLOOR - 10
    assert json.loads(command("inspect", tmp_path / "bundle", "--json")[1])["clip_skip"] == skip
    plan = json.loads(command(*words, "--dry-run", "--json")[1])
    assert plan["hit"] and plan["clip_skip"] == skip
    plan = json.loads(command(*words[:-2], "--dry-run", "--json")[1])
    assert not plan["hit"] and any("clip skip is gone" in reason for reason in plan["reasons"])


def test_skipping_none_is_the_same_build(sd15_checkpoint):
    base = str(sd15_checkpoint)
    assert BuildSpec(base, clip_skip=0).graph_inputs == BuildSpec(base).graph_inputs


@pytest.mark.parametrize(("family", "most"), [("sd15", 3), ("sdxl", 2)])
def test_more_layers_than_there_are(sd15_checkpoint, sdxl_checkpoint, refused, family, most):
    base = {"sd15": sd15_checkpoint, "sdxl": sdxl_checkpoint}[family]
    assert open_base(BuildSpec(str(base), clip_skip=most), half=False).clip_skip == most
    words = ["build", "--base", base, "--gpu", "cpu", "--no-lcm", "--dry-run", "--clip-skip", most + 1]
    refused(2, [f"--clip-skip {most + 1}", "text_encoder", f"{most} layers"], *words)


def test_a_negative_number():
    with pytest.raises(UsageError, match="clip skip must be 0 or more"):
        BuildSpec("demo", clip_skip=-1)
