"""Random weights of a family's architecture, which need no download and draw noise."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from factories import SMALL_TEXT, SMALL_UNET, SMALL_VAE, load_modules
from PIL import Image
from tokenizers import Tokenizer

from lcm_compile.checkpoint.empty_modules import empty_module
from lcm_compile.checkpoint.families import FAMILIES, detect_family
from lcm_compile.checkpoint.load import load_component, load_tokenizer
from lcm_compile.checkpoint.random_weights import open_random
from lcm_compile.errors import UsageError
from lcm_compile.spec import REWRITES, BuildSpec, Shape
from lcm_compile.stages.contracts import make_contracts
from lcm_compile.stages.stage import make_stages


def shrink(family, monkeypatch):
    """A family of SD1.5's layout a thousand times smaller, and no hub."""
    changed = {"unet": SMALL_UNET, "vae": SMALL_VAE, "text_encoder": SMALL_TEXT}
    row = FAMILIES[family]
    models = {name: {**config, **changed.get(name, {})} for name, config in row.models.items()}
    monkeypatch.setitem(FAMILIES, family, replace(row, models=models))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return open_random(family, 0)


@pytest.fixture
def small(monkeypatch):
    return shrink("sd15", monkeypatch)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_a_seed_gives_the_same_weights_and_another_seed_others(small, name):
    one, two = (load_component(small, name).state_dict() for _ in "ab")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    other = load_component(open_random("sd15", 1), name).state_dict()
    assert not any(torch.equal(one[key], other[key]) for key in one if one[key].is_floating_point())


def test_signals_neither_vanish_nor_explode(small):
    unet, vae = load_component(small, "unet"), load_component(small, "vae")
    states = load_component(small, "text_encoder")(torch.arange(77)[None])[0]
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = unet(latent, torch.tensor([500.0]), states).sample
    picture = vae.decode(latent / vae.config.scaling_factor).sample
    for signal in (states, noise, picture):
        assert 0.05 < signal.std() < 5


def test_a_stand_in_tokenizer_tells_texts_apart(small):
    files = load_tokenizer(small, "tokenizer")
    tokenizer = Tokenizer.from_str(files.json)
    red, blue = (tokenizer.encode(f"a {colour} star").ids for colour in ("red", "blue"))
    assert red != blue and {red[0], blue[0]} == {49406} and {red[-1], blue[-1]} == {49407}
    assert (files.max_length, files.pad_token_id) == (77, 49407)


def test_what_is_built_is_labelled(small, command, tmp_path):
    words = ("--base", "sd15", "--weights", "random:3", "--gpu", "cpu", "--out", tmp_path / "b")
    code, _, err = command("build", *words)
    assert code == 0, err
    assert "hit" in command("build", *words)[2]
    assert "miss" in command("build", *words[:3], "random:4", *words[4:], "--dry-run")[1]
    code, _, err = command("run", "a star", "--engine", tmp_path / "b", "--out", tmp_path / "star.png")
    assert code == 0 and "random:3 weights" in err
    assert json.loads(Image.open(tmp_path / "star.png").text["lcm-compile"])["weights"] == "random:3"
    assert "random:3" in command("inspect", tmp_path / "b")[1]


FULL_LCMS = {"lcm-sdxl": "sdxl", "lcm-ssd-1b": "ssd-1b", "lcm-dreamshaper": "sd15"}


@pytest.mark.parametrize("family", FULL_LCMS)
def test_a_full_lcm_at_full_size(family, monkeypatch, command):
    """Its UNet is that of the family it was made of, with an embedding of the guidance scale."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint, origin = open_random(family, 0), open_random(FULL_LCMS[family], 0)
    assert detect_family(checkpoint.unet).name == family
    shapes, plain = (
        {name: weight.shape for name, weight in empty_module(base.components["unet"]).named_parameters()}
        for base in (checkpoint, origin)
    )
    assert shapes == {**plain, "time_embedding.cond_proj.weight": (320, 256)}
    height, width = checkpoint.default_size
    assert f"{height}×{width}" in FAMILIES[family].description
    shape = Shape(1, height, width)
    for rewrites, stage in ((REWRITES, "context"), ((), "step")):
        inputs = {spec.name: spec.shape for spec in make_contracts(checkpoint, shape, rewrites)[stage].inputs}
        assert inputs["guidance"] == (1,)
        assert "guidance" not in {s.name for s in make_contracts(origin, shape, rewrites)[stage].inputs}
    words = ("build", "--base", family, "--weights", "random", "--gpu", "cpu", "--dry-run", "--json")
    code, out, err = command(*words)
    assert code == 0, err
    plan = json.loads(out)
    assert (plan["hit"], plan["loras"]) == (False, []) and plan["estimate"]["bundle_bytes"] > 4e9


def test_a_full_lcm_predicts_by_its_guidance(monkeypatch):
    checkpoint = shrink("lcm-dreamshaper", monkeypatch)
    stages = make_stages(checkpoint, load_modules(checkpoint).named(), Shape(1, 64, 64))
    step = next(stage for stage in stages if stage.name == "step")
    generator = torch.Generator().manual_seed(0)
    given = {s.name: torch.randn(s.shape, generator=generator) for s in step.contract.inputs}
    given["timestep"] = torch.tensor([500.0])
    with torch.no_grad():
        one, other = (step.module(*{**given, "guidance": torch.tensor([w])}.values()) for w in (0.0, 7.0))
    assert (one - other).abs().max() > 0.01 * one.abs().max()


@pytest.mark.parametrize("weights", ["randm", "random:", "random:x", "random:-1", ""])
def test_senseless_weights(weights):
    with pytest.raises(UsageError, match="--weights is"):
        BuildSpec("sd15", weights=weights)


def test_a_base_without_a_family(refused, tmp_path):
    refused(2, ["demo", "sd15"], "build", "--base", "demo", "--weights", "random", "--gpu", "cpu")
