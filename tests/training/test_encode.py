"""What the UNet is told, and the latents it is trained on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from runs import PIPELINES, write_pictures

from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.stages.stage import Decode
from lcm_compile.training import encode
from lcm_compile.training.data import open_data
from lcm_compile.training.encode import Encoder, encoded, with_no_prompt

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["sdxl", "sd15", "sdxl with an encoded empty prompt"])
def test_conditioning_is_the_pipelines(kind, bases, tmp_path):
    architecture, *other = kind.split(" ", 1)
    folder = bases[architecture]
    if other:
        folder = shutil.copytree(folder, tmp_path / "base")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    pipe = PIPELINES[architecture].from_pretrained(folder)
    prompts = ["a large red star", "small " * 100]
    encoder = Encoder(open_checkpoint(str(folder)), CPU)
    ours = with_no_prompt(encoder.prompts(prompts), encoder.no_prompt())
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    torch.testing.assert_close(ours["encoder_hidden_states"], torch.cat(encoded[:2]))
    if architecture == "sdxl":
        torch.testing.assert_close(ours["text_embeds"], torch.cat(encoded[2:]))
        assert ours["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 4


@pytest.mark.parametrize(
    "statistics", [{}, {"latents_mean": [1.0, 2, 3, 4], "latents_std": [0.5, 1, 2, 4]}], ids=["plain", "mean"]
)
def test_latents_are_what_decode_undoes(statistics, bases, tmp_path):
    folder = shutil.copytree(bases["sdxl"], tmp_path / "base")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, **statistics}))
    checkpoint = open_checkpoint(str(folder))
    vae = load_component(checkpoint, "vae")
    picture, _ = open_data("demo", 64, 64, 0).sample(0)
    pixels = torch.from_numpy(picture)[None].permute(0, 3, 1, 2) / 127.5 - 1
    decode = Decode(vae)
    latents = Encoder(checkpoint, CPU).latents(picture[None])
    torch.testing.assert_close(latents * decode.scale + decode.shift, vae.encode(pixels).latent_dist.mode())


def test_a_small_folder_is_encoded_once(bases, tmp_path, monkeypatch):
    encoder = Encoder(open_checkpoint(str(bases["sdxl"])), CPU)
    folder = write_pictures(tmp_path / "pictures", 3)
    data = open_data(str(folder), 64, 64, 0)
    kept = encoded(data, encoder, CPU)
    monkeypatch.setattr(encode, "KEPT", 2)
    afresh = encoded(data, encoder, CPU)
    numbers = range(2, 6)
    torch.testing.assert_close(kept(numbers), afresh(numbers), rtol=1e-4, atol=1e-4)
    shutil.rmtree(folder)
    kept(numbers)
    with pytest.raises(Exception, match="can't be read"):
        afresh(numbers)
