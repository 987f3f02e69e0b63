"""OpenAI's images API, by OpenAI's own client, against the pictures that the pipeline draws."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import openai
import pytest
from factories import painting
from PIL import Image

from lcm_compile import load
from lcm_compile.output.picture_settings import read_origin


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline(small):
    with load(small) as pipeline:
        yield pipeline


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def same(text, image):
    return bool((pixels(text) == np.asarray(image)).all())


def test_pictures_are_the_pipelines(client, pipeline):
    answer = client.images.generate(
        model="small", prompt="a red star", n=2, response_format="b64_json", extra_body={"seed": 7}
    )
    assert [one.seed for one in answer.data] == [7, 8]
    for seed, one in zip((7, 8), answer.data, strict=True):
        assert same(one.b64_json, pipeline("a red star", seed=seed)[0])
    assert (answer.size, answer.output_format) == ("64x64", "png")


def test_a_batch_of_the_engines_draws_what_each_draws_alone(client, batched):
    answer = client.images.generate(model="pairs", prompt="a blue ring", n=3, extra_body={"seed": 1})
    with load(batched) as pipeline:
        for seed, one in zip((1, 2, 3), answer.data, strict=True):
            alone = np.asarray(pipeline("a blue ring", seed=seed)[0])
            assert np.abs(pixels(one.b64_json).astype(int) - alone).max() <= 1


@pytest.mark.parametrize(
    "names",
    [
        {"steps": 3, "guidance_scale": 1.5, "sampler": "euler", "seed": 5},
        {"num_inference_steps": 3, "cfg_scale": 1.5, "sampler_name": "euler", "rng_seed": 5},
    ],
)
def test_fields_have_their_usual_names(client, pipeline, names):
    body = {
        **names,
        "negative_prompt": "blue",
        "quality": "hd",
        "background": "auto",
        "user": "x",
        "style": None,
    }
    answer = client.images.generate(prompt="a star", extra_body=body)
    expected = pipeline(
        "a star", negative_prompt="blue", seed=5, steps=3, guidance_scale=1.5, sampler="euler"
    )
    assert same(answer.data[0].b64_json, expected[0])


def test_sizes_are_width_by_height(client, small):
    answer = client.images.generate(prompt="a star", size="96x64", extra_body={"seed": 3})
    with load(small, width=96) as wide:
        assert same(answer.data[0].b64_json, wide("a star", seed=3)[0])
    with pytest.raises(openai.BadRequestError, match="64x64, 96x64"):
        client.images.generate(prompt="a star", size="1024x1024")


LORA_FORMS = [
    {"model": "small+style:0.9"},
    {"loras": {"style": 0.9}},
    {"loras": ["style:0.9"]},
    {"loras": [{"name": "style", "multiplier": 0.9}]},
    {"loras": json.dumps({"style": 0.9})},
]


@pytest.mark.parametrize("form", LORA_FORMS)
def test_a_lora_of_the_bundle(client, pipeline, form):
    answer = client.images.generate(prompt="a star", extra_body={"seed": 2, **form})
    assert same(answer.data[0].b64_json, pipeline("a star", seed=2, lora_weights={"style": 0.9})[0])


def test_a_lora_of_the_folder(client, pipeline, lora_files, tmp_path):
    answer = client.images.generate(model="small+zebra:0.8+style:0", prompt="a star", extra_body={"seed": 2})
    file = lora_files / "slots/zebra.safetensors"
    expected = pipeline("a star", seed=2, lora_weights={"style": 0.0}, loras=[f"{file}:0.8"])
    assert same(answer.data[0].b64_json, expected[0])
    (tmp_path / "a.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
    [lora] = read_origin(tmp_path / "a.png").request.loras
    assert (lora.source, lora.weight) == ("zebra.safetensors", 0.8)  # no folder of the server


@pytest.mark.parametrize("name", ["../built/style", "/etc/passwd", "nothing", "zebra.safetensors"])
def test_only_names_of_the_folder_are_loras(client, name):
    with pytest.raises(openai.NotFoundError, match="zebra"):
        client.images.generate(prompt="a star", extra_body={"loras": {name: 1}})


def test_a_picture_may_be_fetched_from_a_url(client, served, pipeline):
    answer = client.images.generate(
        prompt="a star", response_format="url", extra_body={"seed": 2, "output_format": "webp"}
    )
    file = served.client.get(answer.data[0].url)
    assert file.headers["content-type"] == "image/webp"
    image = Image.open(io.BytesIO(file.content))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(pipeline("a star", seed=2)[0])).mean() < 12
    assert served.client.get("/files/other.png").status_code == 404


def test_a_stream_shows_what_steps_foresee(client, pipeline):
    kinds, shown = [], []
    for event in client.images.generate(
        prompt="a star", stream=True, partial_images=2, extra_body={"seed": 2}
    ):
        kinds.append((event.type, getattr(event, "partial_image_index", None)))
        shown.append(event.b64_json)
    partial = "image_generation.partial_image"
    assert kinds == [(partial, 0), (partial, 1), ("image_generation.completed", None)]
    seen = {}
    from lcm_compile import Request

    drawing = pipeline.draw(
        Request("a star", 2),
        previews={step: lambda p, step=step: seen.update({step: p[0]}) for step in (2, 3)},
    )
    assert same(shown[0], seen[2]) and same(shown[1], seen[3]) and same(shown[2], drawing.pictures[0])


def file_of(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def half_mask():
    """Repaints the left half: 0 in its alpha, as OpenAI's clients draw masks."""
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:, :32] = 0
    return Image.merge("RGBA", [Image.new("L", (64, 64))] * 3 + [Image.fromarray(alpha)])


def white_mask():
    return Image.fromarray(np.repeat(np.uint8([[255] * 32 + [0] * 32]), 64, 0))


def test_an_edit_begins_at_a_picture(client, pipeline):
    answer = client.images.edit(
        image=file_of(painting()), prompt="a star", extra_body={"seed": 2, "strength": 0.5, "steps": 8}
    )
    expected = pipeline("a star", seed=2, image=painting(), strength=0.5, steps=8)
    assert same(answer.data[0].b64_json, expected[0])


@pytest.mark.parametrize("mask", [half_mask(), white_mask()], ids=["alpha 0", "white"])
def test_a_mask_repaints(client, pipeline, mask):
    answer = client.images.edit(
        image=[file_of(painting())], mask=file_of(mask), prompt="a star", n=1, extra_body={"seed": 2}
    )
    assert same(answer.data[0].b64_json, pipeline("a star", seed=2, image=painting(), mask=white_mask())[0])


def test_what_is_transparent_in_the_picture_is_repainted(client, pipeline):
    image = painting().convert("RGBA")
    image.putalpha(half_mask().getchannel("A"))
    answer = client.images.edit(image=file_of(image), prompt="a star", extra_body={"seed": 2})
    assert same(answer.data[0].b64_json, pipeline("a star", seed=2, image=image, mask="alpha")[0])


def test_an_edit_is_streamed_by_its_own_events(client):
    events = client.images.edit(image=file_of(painting()), prompt="a star", stream=True, partial_images=1)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({"model": "nothing"}, 404, "small, pairs"),
        ({"n": 11}, 400, "from 1 to 10"),
        ({"prompt": "x" * 40_000}, 400, "32000"),
        ({"size": "big"}, 400, "WIDTHxHEIGHT"),
        ({"steps": 0}, 400, "steps"),
        ({"seed": 2**64}, 400, "seed"),
        ({"guidance_scale": "much"}, 400, "guidance_scale"),
        ({"sampler": "nothing"}, 400, "dpm++2m"),
        ({"output_format": "gif"}, 400, "output_format"),
        ({"prompt": "\ud800"}, 400, "Unicode"),
        ({"loras": 3}, 400, "loras"),
        ({"loras": {"style": "much"}}, 400, "loras"),
        ({"prompt": None}, 400, "prompt"),
    ],
)
def test_what_can_not_be_drawn_is_refused_before_it_waits(served, fields, status, told):
    body = json.dumps({"prompt": "a star", **fields})
    answer = served.client.post(
        "/v1/images/generations", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert told in error["message"] and error["type"] == "invalid_request_error"


def test_no_address_of_a_client_is_opened(served):
    for image in ("http://127.0.0.1:1/a.png", "file:///etc/hostname", "/etc/hostname"):
        answer = served.client.post("/sdapi/v1/img2img", json={"init_images": [image]})
        assert answer.status_code == 400, answer.text
    answer = served.client.post("/v1/images/edits", data={"prompt": "x", "image": "http://127.0.0.1:1/a.png"})
    assert answer.status_code == 400


def test_names_of_openais_own_models_mean_the_first(client):
    for name in ("dall-e-3", "gpt-image-1"):
        assert client.images.generate(model=name, prompt="a star").data[0].b64_json
    assert [model.id for model in client.models.list()] == ["small", "pairs"]
    assert client.models.retrieve("small").sizes == ["64x64", "96x64"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


# As these clients send them.
OPEN_WEBUI = {"model": "small", "prompt": "a star", "n": 1, "size": "64x64", "response_format": "b64_json"}
LIBRECHAT = {
    "model": "gpt-image-1",
    "prompt": "a star",
    "n": 1,
    "quality": "auto",
    "size": "auto",
    "background": "auto",
    "moderation": "auto",
    "output_format": "png",
    "user": "1234",
}


@pytest.mark.parametrize("body", [OPEN_WEBUI, LIBRECHAT], ids=["Open WebUI", "LibreChat"])
def test_bodies_of_clients(served, body):
    answer = served.client.post("/v1/images/generations", json=body).json()
    assert pixels(answer["data"][0]["b64_json"]).shape == (64, 64, 3)
