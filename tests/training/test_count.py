"""--dry-run: parameters counted without weights and without a network."""

from __future__ import annotations

import subprocess
import sys

import pytest
from peft import LoraConfig, get_peft_model
from runs import losses_of, settings_for
from safetensors.torch import load_file

from lcm_compile.checkpoint.families import FAMILIES, detect_family
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.training.adapters import ADAPTED, ATTENTION
from lcm_compile.training.count import count_full, count_lora

# LCM-LoRA (arXiv 2311.05556), Table 1: trainable parameters in millions.
TABLE_1 = {"sdxl": 197, "ssd-1b": 105, "sd15": 67.5}
UNET = {"sdxl": 2567.5, "ssd-1b": 1331.3, "sd15": 859.5, "sd21": 865.9}

NO_NETWORK = """
import socket, sys

def refuse(*_, **__):
    raise AssertionError("it asked for the network")

socket.socket.connect = socket.getaddrinfo = refuse
from lcm_compile.cli import cli

for base in sys.argv[1:]:
    cli.main(["distill", "--base", base, "--dry-run"], standalone_mode=False)
"""


@pytest.mark.parametrize("base", TABLE_1)
def test_the_reports_table(base):
    size = count_lora(base, 64, ADAPTED)
    assert size.trainable_parameters / 1e6 == pytest.approx(TABLE_1[base], rel=0.004)


@pytest.mark.parametrize("base", UNET)
def test_unets_are_the_families(base):
    assert count_lora(base, 1, ATTENTION).unet_parameters / 1e6 == pytest.approx(UNET[base], abs=0.1)
    assert detect_family(FAMILIES[base].models["unet"]).name == base


def test_without_a_network(tmp_path):
    words = [sys.executable, "-c", NO_NETWORK, *TABLE_1]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "trainable parameters" in line]
    assert told == [f"{size} M trainable parameters" for size in ("196.8", "104.9", "67.3")]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("endings", [ADAPTED, ATTENTION], ids=["all", "attention"])
@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_peft_counts_the_same(kind, endings, bases):
    size = count_lora(str(bases[kind]), 3, endings)
    unet = load_component(open_checkpoint(str(bases[kind])), "unet")
    assert size.unet_parameters == unet.num_parameters()
    model = get_peft_model(unet, LoraConfig(r=3, target_modules=list(endings)))
    assert size.trainable_parameters == model.get_nb_trainable_parameters()[0]
    assert size.modules == len(model.targeted_module_names)


def test_the_file_is_as_large_as_was_said(bases, tmp_path):
    losses_of(settings_for(bases["sd15"], steps=1, rank=3), tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    held = sum(t.nbytes for name, t in tensors.items() if not name.endswith("alpha"))
    assert count_lora(str(bases["sd15"]), 3, ADAPTED).file_bytes == held
    losses_of(settings_for(bases["sd15"], steps=1, full=True), tmp_path / "lcm")
    tensors = load_file(tmp_path / "lcm" / "unet" / "diffusion_pytorch_model.safetensors")
    size = count_full(str(bases["sd15"]))
    assert size.file_bytes == sum(t.nbytes for t in tensors.values())
    assert size.trainable_parameters == sum(t.numel() for t in tensors.values())
