"""The API of A1111's web UI, by a client of it and by the bodies that others send."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import webuiapi
from factories import painting
from PIL import Image

from lcm_compile import load


@pytest.fixture(scope="module")
def client(served):
    return webuiapi.WebUIApi(host="127.0.0.1", port=served.port)


@pytest.fixture(scope="module")
def pipeline(small):
    with load(small) as pipeline:
        yield pipeline


def same(image, other):
    return bool((np.asarray(image.convert("RGB")) == np.asarray(other)).all())


def test_txt2img(client, pipeline):
    answer = client.txt2img(prompt="a (red:1.3) star", negative_prompt="blue", seed=7, batch_size=2, steps=4)
    assert answer.info["all_seeds"] == [7, 8]
    for seed, image in zip((7, 8), answer.images, strict=True):
        expected = pipeline("a (red:1.3) star", negative_prompt="blue", seed=seed, prompt_syntax="webui")
        assert same(image, expected[0])
    assert "Seed: 8" in answer.info["infotexts"][1]


def test_img2img_and_masks(client, pipeline):
    image, mask = painting(), Image.fromarray(np.repeat(np.uint8([[255] * 32 + [0] * 32]), 64, 0))
    answer = client.img2img([image], prompt="a star", seed=2, steps=8, denoising_strength=0.5, cfg_scale=1)
    assert same(answer.image, pipeline("a star", seed=2, image=image, strength=0.5, steps=8)[0])
    answer = client.img2img(
        [image], prompt="a star", seed=2, steps=4, denoising_strength=1, cfg_scale=1, mask_image=mask
    )
    assert same(answer.image, pipeline("a star", seed=2, image=image, mask=mask)[0])


def test_loras_are_named_in_the_prompt(client, pipeline, lora_files):
    answer = client.txt2img(prompt="a star <lora:style:0.9>, <lora:zebra:0.7>", seed=2, steps=4, cfg_scale=1)
    zebra = lora_files / "slots/zebra.safetensors"
    expected = pipeline(
        "a star ,", seed=2, lora_weights={"style": 0.9}, loras=[f"{zebra}:0.7"], prompt_syntax="webui"
    )
    assert same(answer.image, expected[0])
    assert [lora["name"] for lora in client.get_loras()] == ["style", "zebra"]


# As these clients send them, whatever the model is.
LIBRECHAT = {
    "prompt": "a star",
    "negative_prompt": "blurred",
    "cfg_scale": 4.5,
    "steps": 22,
    "width": 1024,
    "height": 1024,
}
SILLYTAVERN = {
    "prompt": "a star",
    "negative_prompt": "blurred",
    "sampler_name": "Euler a",
    "scheduler": "automatic",
    "steps": 20,
    "cfg_scale": 7,
    "width": 768,
    "height": 512,
    "seed": -1,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "denoising_strength": 0.7,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
OPEN_WEBUI = {"prompt": "a star", "batch_size": 1, "width": 512, "height": 512, "steps": 50}


@pytest.mark.parametrize(
    ("body", "size"),
    [(LIBRECHAT, (64, 64)), (SILLYTAVERN, (96, 64)), (OPEN_WEBUI, (64, 64))],
    ids=["LibreChat", "SillyTavern", "Open WebUI"],
)
def test_what_a_model_can_not_take_becomes_what_it_has(served, body, size):
    answer = served.client.post("/sdapi/v1/txt2img", json=body).json()
    info = json.loads(answer["info"])
    assert Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).size == size
    assert (info["width"], info["height"]) == size
    assert (info["steps"], info["cfg_scale"], info["sampler_name"]) == (4, 1.0, "LCM")
    assert info["seed"] >= 0 and "Steps: 4, Sampler: LCM, CFG scale: 1.0" in info["infotexts"][0]


def test_what_it_can_take_is_kept(served):
    body = {
        "prompt": "a star",
        "steps": 6,
        "cfg_scale": 1.5,
        "sampler_name": "TCD",
        "width": 96,
        "height": 64,
    }
    info = json.loads(served.client.post("/sdapi/v1/txt2img", json=body).json()["info"])
    assert (info["steps"], info["cfg_scale"], info["sampler_name"], info["width"]) == (6, 1.5, "TCD", 96)


def test_models_are_chosen_by_the_title_that_is_listed(client):
    titles = [model["title"] for model in client.get_sd_models()]
    try:
        client.set_options({"sd_model_checkpoint": titles[1], "other": 1})
        assert client.get_options()["sd_model_checkpoint"] == titles[1]
        assert client.txt2img(prompt="a star").info["sd_model_name"] == "pairs"
    finally:
        client.set_options({"sd_model_checkpoint": titles[0]})
    answer = client.txt2img(prompt="a star", override_settings={"sd_model_checkpoint": "pairs"})
    assert answer.info["sd_model_name"] == "pairs"
    assert client.txt2img(prompt="a star").info["sd_model_name"] == "small"


def test_what_clients_ask_when_they_connect(client):
    assert "LCM" in [sampler["name"] for sampler in client.get_samplers()]
    assert [one["name"] for one in client.get_schedulers()] == ["automatic", "karras"]
    assert [one["name"] for one in client.get_upscalers()] == ["None", "Lanczos"]
    assert [one["name"] for one in client.get_latent_upscale_modes()] == ["Latent"]
    assert client.get_sd_vae() == []
    assert client.get_progress()["state"]["job_count"] == 0
    assert client.get_embeddings()["loaded"] == {}


def test_a_picture_tells_its_settings(client):
    image = client.txt2img(prompt="a star", seed=4).image
    assert "Seed: 4" in client.png_info(image).info
    assert client.png_info(painting()).info == ""


def test_bad_bodies_are_told_as_the_web_ui_tells_them(served):
    answer = served.client.post("/sdapi/v1/txt2img", json={"prompt": "a star", "steps": "many"})
    assert answer.status_code == 422 and "steps" in answer.json()["detail"]
    answer = served.client.post("/sdapi/v1/img2img", json={"prompt": "a star"})
    assert answer.status_code == 400 and "init_images" in answer.json()["detail"]
