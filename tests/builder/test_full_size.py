"""SD1.5 and SDXL at full size: random weights in the real layouts, no GPU. `make test-slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import torch
from factories import save_tensors
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.lora.guess_base import empty_modules
from lcm_compile.training.adapters import ADAPTED

pytestmark = [pytest.mark.slow, pytest.mark.alone]

GIB = 1 << 30
# Seconds and GiB of anonymous memory over the process tree that a build for an A10 may take on 2 cores.
LIMITS = {"sd15": (3 * 60, 7), "sdxl": (7 * 60, 13)}
MILLIONS = {"sd15": 67.5, "sdxl": 197}  # LCM-LoRA, arXiv 2311.05556, Table 1


def lcm_compile(*words, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "lcm_compile", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_lcm_lora(family, path, seed=0):
    """Rank 64, fp16, on the modules and in the layout of the published ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in empty_modules(FAMILIES[family], {"unet"})["unet"].named_modules():
        if f".{name}".endswith(tuple(f".{ending}" for ending in ADAPTED)) and hasattr(layer, "weight"):
            key = f"lora_unet_{name.replace('.', '_')}"
            out, *ins = layer.weight.shape
            down = torch.randn(64, *ins, generator=generator) * 1e-3
            up = torch.randn(out, 64, *(1 for _ in ins[1:]), generator=generator) * 1e-3
            tensors |= {f"{key}.lora_down.weight": down.half(), f"{key}.lora_up.weight": up.half()}
            tensors[f"{key}.alpha"] = torch.tensor(64.0).half()
    count = sum(t.numel() for t in tensors.values() if t.ndim)
    assert count / 1e6 == pytest.approx(MILLIONS[family], rel=0.004)
    return save_tensors(tensors, path)


def shard(unet):
    """Splits a large UNet's file as diffusers does, with an index; one shard at a time is in memory."""
    whole = unet / "diffusion_pytorch_model.safetensors"
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(load_file(whole), unet, filename_pattern=pattern, max_shard_size="2GB")


@contextmanager
def disk_peak(folder):
    """Within it, a list whose one entry becomes the most bytes that `folder` held; links count once."""
    peak, ended = [0], threading.Event()

    def sample():
        while True:
            files = {}
            for path in folder.rglob("*"):
                with suppress(FileNotFoundError):  # builds clear up after themselves
                    status = path.lstat()
                    files[status.st_ino] = status.st_blocks * 512
            peak[0] = max(peak[0], sum(files.values()))
            if ended.wait(0.5):
                return

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("family", LIMITS)
def test_a_local_folder_becomes_engines_for_an_a10(family, tmp_path, home):
    pytest.importorskip("tensorrt_rtx")
    base, lora = tmp_path / family, write_lcm_lora(family, tmp_path / "lcm.safetensors")
    lcm_compile("fuse", "--base", family, "--weights", "random", "--out", base)
    shard(base / "unet")
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted(path.name for path in (base / "unet").glob("*.safetensors"))
    assert index.is_file() == (family == "sdxl")
    assert len(shards) == {"sdxl": 3, "sd15": 1}[family]
    out = tmp_path / "out" / "bundle"
    out.parent.mkdir()
    words = ("build", "--base", base, "--lcm-lora", lora, "--gpu", "a10", "--out", out)
    told = json.loads(lcm_compile(*words, "--dry-run", "--json"))["estimate"]
    start = time.monotonic()
    with disk_peak(out.parent) as disk:
        lcm_compile(*words)
    seconds = time.monotonic() - start
    manifest, _ = read_manifest(out)
    memory = max(cost.memory_bytes for cost in manifest.costs.values())
    print(json.dumps({name: [c.seconds, c.memory_bytes] for name, c in manifest.costs.items()}, indent=1))
    print(json.dumps({"disk": disk[0], "told": told}))
    assert told["disk_bytes"] == pytest.approx(disk[0], rel=0.3)
    most_seconds, most_gib = LIMITS[family]
    assert memory <= most_gib * GIB
    assert seconds <= most_seconds
    assert all(figure.passed for figure in manifest.parity.values())
    twins = {name for name, figure in manifest.parity.items() if "twin" in figure.checked}
    assert twins == {"context", "step", "decode", "picture"}  # the encoders' graphs are checked themselves
    assert manifest.loras[0]["modules"] > 200
    lcm_compile(*words, "--json")  # digests of the files are remembered from here on
    start = time.monotonic()
    assert json.loads(lcm_compile(*words, "--json"))["hit"] is True
    assert time.monotonic() - start < 3
    style, other = write_lcm_lora(family, tmp_path / "style.safetensors", seed=1), out.with_name("style")
    start = time.monotonic()
    lcm_compile(*words[:-1], other, "--lora", style)
    print(json.dumps({"first": seconds, "another style": time.monotonic() - start}))
    engines = [{p.name: p.stat().st_ino for p in (folder / "engines").iterdir()} for folder in (out, other)]
    same = {name for name, inode in engines[0].items() if engines[1][name] == inode}
    assert same == {"encode.engine", "decode.engine"}
