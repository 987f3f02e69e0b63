"""Folders that are written open in old and new versions of diffusers and transformers alike."""

from __future__ import annotations

import json
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTokenizer

from lcm_compile import BuildSpec
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.lora.fuse import fuse

# The last versions of diffusers and transformers 4 that were tried with each other.
OLD = ("diffusers==0.35.2", "transformers==4.57.3", "huggingface_hub==0.36.2", "tokenizers==0.22.2")


def keys_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as handle:
        return set(handle.keys())


def test_the_demos_text_encoders_have_the_hubs_names():
    for name in ("text_encoder", "text_encoder_2"):
        keys = keys_of(Path(FAMILIES["demo"].base) / name) - {"text_projection.weight"}
        assert all(key.startswith("text_model.") for key in keys)


@pytest.fixture(scope="module")
def folders(sdxl_checkpoint, sd15_checkpoint, tmp_path_factory):
    """The demo, and what `fuse` writes of each architecture and of a base that transformers 5 saved."""
    to = tmp_path_factory.mktemp("written")
    saved = shutil.copytree(sd15_checkpoint, to / "saved")
    shutil.rmtree(saved / "tokenizer")
    CLIPTokenizer.from_pretrained(sd15_checkpoint / "tokenizer").save_pretrained(saved / "tokenizer")
    assert not (saved / "tokenizer/vocab.json").exists()
    bases = {"sdxl": sdxl_checkpoint, "sd15": sd15_checkpoint, "of-saved": saved}
    for name, base in bases.items():
        fuse(BuildSpec(base=str(base), no_lcm=True, few_step="lcm"), to / name, "fp32")
    return {"demo": Path(FAMILIES["demo"].base), **{name: to / name for name in bases}}


def test_what_is_written_has_the_hubs_names_and_files(folders, sd15_checkpoint):
    for name in ("sdxl", "sd15", "of-saved"):
        for encoder in folders[name].glob("text_encoder*"):
            keys = keys_of(encoder) - {"text_projection.weight"}
            assert all(key.startswith("text_model.") for key in keys)
            tokenizer = folders[name] / encoder.name.replace("text_encoder", "tokenizer")
            assert {"vocab.json", "merges.txt"} <= {path.name for path in tokenizer.iterdir()}
    own, written = (folder / "tokenizer" for folder in (sd15_checkpoint, folders["of-saved"]))
    assert json.loads((own / "vocab.json").read_text()) == json.loads((written / "vocab.json").read_text())
    assert (own / "merges.txt").read_text() == (written / "merges.txt").read_text()


DRAW = """
import sys, numpy, torch, diffusers
torch.set_num_threads(1)
for folder, picture in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a large red star", num_inference_steps=4, guidance_scale=1.0, height=64, width=64,
                 generator=torch.Generator().manual_seed(3), output_type="np").images[0]
    numpy.save(picture, drawn)
print(diffusers.__version__)
"""


@pytest.mark.slow
def test_old_and_new_versions_draw_the_same_pictures(folders, tmp_path):
    """In an environment with the old pair, and this one's torch and other packages."""
    venv.create(tmp_path / "old", with_pip=True)
    python = tmp_path / "old/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *OLD], check=True)
    (own,) = (tmp_path / "old/lib").glob("python*/site-packages")
    (own / "others.pth").write_text(
        "\n".join([str(Path(torch.__file__).parents[1]), *site.getsitepackages()])
    )
    pictures = {}
    for name, interpreter in (("old", python), ("new", sys.executable)):
        words = [w for key, path in folders.items() for w in (path, tmp_path / f"{name}-{key}.npy")]
        done = subprocess.run([interpreter, "-c", DRAW, *words], check=True, capture_output=True, text=True)
        assert (done.stdout.strip() == diffusers.__version__) == (name == "new")
        pictures[name] = {key: np.load(tmp_path / f"{name}-{key}.npy") for key in folders}
    for key in folders:
        assert pictures["new"][key].std() > 0.02, key
        assert np.abs(pictures["old"][key] - pictures["new"][key]).max() < 1e-3, key
