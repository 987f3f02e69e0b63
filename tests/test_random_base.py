"""Random weights of a family's architecture, which need no download and draw noise."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from lcm_compile import unet_configs
from lcm_compile.errors import UsageError
from lcm_compile.loading import load_component, load_tokenizer
from lcm_compile.model_configs import COMPONENTS
from lcm_compile.random_base import open_random
from lcm_compile.spec import BuildSpec

SMALL_UNET = {
    "block_out_channels": [32, 64, 64, 64],
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "sample_size": 8,
}
SMALL_VAE = {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1}
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def small(monkeypatch):
    """The family `sd15` a thousand times smaller, and no hub."""
    sd15 = COMPONENTS["sd15"]
    changed = {"unet": SMALL_UNET, "vae": SMALL_VAE, "text_encoder": SMALL_TEXT}
    parts = {name: {**config, **changed.get(name, {})} for name, config in sd15.items()}
    monkeypatch.setitem(COMPONENTS, "sd15", parts)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return open_random("sd15", 0)


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
    assert Image.open(tmp_path / "star.png").text["weights"] == "random:3"
    assert "random:3" in command("inspect", tmp_path / "b")[1]


@pytest.mark.parametrize("weights", ["randm", "random:", "random:x", "random:-1", ""])
def test_senseless_weights(weights):
    with pytest.raises(UsageError, match="--weights is"):
        BuildSpec("sd15", weights=weights)


def test_a_base_without_a_family(refused, tmp_path):
    refused(2, ["demo", "sd15"], "build", "--base", "demo", "--weights", "random", "--gpu", "cpu")


def test_the_families_unets_are_those_of_the_configs():
    assert all(COMPONENTS[family]["unet"] == config for family, config in unet_configs.UNETS.items())
