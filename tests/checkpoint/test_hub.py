"""The hub out of reach: said within seconds, with both ways out; what is cached is used without it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.hub import SECONDS

ONLINE = {"HF_HUB_OFFLINE": "0"}


def cli(*words, **environment):
    """Runs the command in a process of its own; returns what it did, and the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lcm_compile", *map(os.fsencode, words)],
        capture_output=True,
        env={k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | ONLINE | environment,
        timeout=120,
    )
    return done, done.stderr.decode(), time.perf_counter() - start


NO_NETWORK = {
    "offline": {"HF_HUB_OFFLINE": "1"},
    "unreachable": {"HF_ENDPOINT": "http://127.0.0.1:9"},
    "proxy gone": {"HTTPS_PROXY": "http://127.0.0.1:9"},
}


@pytest.mark.parametrize("network", NO_NETWORK)
def test_hub_base_without_a_network(tmp_path, network):
    environment = NO_NETWORK[network] | {"HF_HOME": str(tmp_path)}
    done, err, seconds = cli("build", "--base", "sdxl", "--gpu", "cpu", **environment)
    assert (done.returncode, done.stdout) == (1, b"")
    assert "stabilityai/stable-diffusion-xl-base-1.0" in err and "--base" in err
    assert "Traceback" not in err and "internal error" not in err
    assert seconds < 20


def test_a_network_that_never_answers_is_given_up(tmp_path):
    """A proxy that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        script = (
            "import lcm_compile.checkpoint.hub as h; h.SECONDS = 1; from lcm_compile.cli import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, "build", "--base", "sdxl", "--gpu", "cpu"],
            capture_output=True,
            text=True,
            env=os.environ | ONLINE | {"HTTPS_PROXY": proxy, "NO_PROXY": "", "HF_HOME": str(tmp_path)},
            timeout=60,
        )
    assert done.returncode == 1
    assert "timed out" in done.stderr and "Traceback" not in done.stderr
    assert SECONDS <= 10


def cached(cache, repository, *files, channels=32):
    """A repository in a hub cache, with these files; returns the folder of its snapshot.

    Each LoRA among them changes one layer of a UNet whose first block has so many channels.
    """
    folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("b" * 40)
    for path, text in [(folder / "refs/main", "b" * 40), *((snapshot / file, file) for file in files)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.suffix == ".safetensors":
            name = "lora_unet_time_embedding_linear_1"
            down, up = torch.ones(1, channels), torch.ones(4 * channels, 1)
            save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    return snapshot


@pytest.fixture
def looks_like_sdxl(sdxl_checkpoint, tmp_path):
    """A folder whose UNet config is SDXL's."""
    folder = shutil.copytree(sdxl_checkpoint, tmp_path / "base")
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | FAMILIES["sdxl"].models["unet"]))
    return folder


def test_the_lcm_lora_of_a_family(looks_like_sdxl, tmp_path):
    """Not to be had: both ways out are named. In the hub's cache: it is used without a network."""
    words = ("build", "--base", looks_like_sdxl, "--gpu", "cpu", "--dry-run", "--json")
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done, err, _ = cli(*words, **environment)
    assert (done.returncode, done.stdout) == (1, b"")
    for told in ("latent-consistency/lcm-lora-sdxl", "--lcm-lora", "--no-lcm"):
        assert told in err
    file = "pytorch_lora_weights.safetensors"
    path = cached(tmp_path / "hf", "latent-consistency/lcm-lora-sdxl", file, channels=320) / file
    done, err, _ = cli(*words, **environment)
    assert done.returncode == 0, err
    assert json.loads(done.stdout)["loras"] == [
        {"role": "few-step", "path": str(path), "weight": 1.0, "strengths": {}}
    ]


@pytest.fixture
def planned(sdxl_checkpoint, tmp_path):
    """Plans with a LoRA, from an offline hub cache; returns its path and weight, or the error."""

    def run(lora):
        words = (
            "build",
            "--base",
            sdxl_checkpoint,
            "--no-lcm",
            "--gpu",
            "cpu",
            "--dry-run",
            "--json",
            "--lora",
        )
        done, err, _ = cli(*words, lora, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
        if done.returncode:
            assert (done.returncode, done.stdout) == (1, b"") and "Traceback" not in err and "try: " in err
            return err
        (found,) = json.loads(done.stdout)["loras"]
        return found["path"], found["weight"]

    return run


def test_a_lora_by_its_hub_id(planned, tmp_path):
    """The default file or a named one, each with and without a weight; what is not there is named."""
    names = "pytorch_lora_weights.safetensors", "sub/style-v1.0.safetensors"
    snapshot = cached(tmp_path / "hf", "some.one/a-style", *names)
    for text, file, weight in [
        ("some.one/a-style", names[0], 1.0),
        ("some.one/a-style:-0.5", names[0], -0.5),
        (f"some.one/a-style:{names[1]}", names[1], 1.0),
        (f"some.one/a-style:{names[1]}:0.8", names[1], 0.8),
    ]:
        assert planned(text) == (str(snapshot / file), weight)
    assert "has no other.safetensors" in planned("some.one/a-style:other.safetensors")
    cached(tmp_path / "hf", "some.one/empty", "README.md")
    assert "neither pytorch_lora_weights.safetensors" in planned("some.one/empty:0.5")
    err = planned("some.one/else")
    assert "some.one/else is neither a path nor in the hub cache" in err and "HF_HOME" in err


def test_a_textual_inversion_by_its_hub_id(sdxl_checkpoint, tmp_path):
    """The usual file or a named one; what is not there is named."""
    snapshot = cached(tmp_path / "hf", "some.one/cat", "README.md")
    for name in ("learned_embeds.safetensors", "cat.safetensors"):
        save_file({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)}, snapshot / name)
    words = ["build", "--base", sdxl_checkpoint, "--no-lcm", "--gpu", "cpu", "--dry-run", "--json"]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    asked = ["some.one/cat", "some.one/cat:cat.safetensors:kitty"]
    done, err, _ = cli(*words, "--embedding", asked[0], "--embedding", asked[1], **environment)
    assert done.returncode == 0, err
    assert json.loads(done.stdout)["embeddings"] == asked
    for missing, told in (("some.one/cat:dog.pt", "has no dog.pt"), ("some.one/dog", "can't be downloaded")):
        done, err, _ = cli(*words, "--embedding", missing, **environment)
        assert done.returncode == 1 and told in err and "Traceback" not in err


def test_a_path_wins_over_a_hub_id(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "pytorch_lora_weights.safetensors", "style.safetensors"
    theirs = cached(tmp_path / "hf", "owner/name", *names)
    folder = tmp_path / "owner/name"
    folder.mkdir(parents=True)
    for text in ("owner/name:style.safetensors", "owner/missing.safetensors", "./owner/nobody"):
        assert f"LoRA {text} does not exist" in planned(text)
    shutil.copy(theirs / names[0], folder / names[0])
    assert planned("owner/name:0.5") == (str(Path("owner/name", names[0])), 0.5)
    shutil.copy(theirs / names[1], "owner/name:style.safetensors")
    assert planned("owner/name:style.safetensors:2") == ("owner/name:style.safetensors", 2.0)
