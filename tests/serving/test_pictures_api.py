"""Pictures for ControlNets, T2I-Adapters and IP-Adapters, by clients of both APIs."""

from __future__ import annotations

import base64
import io

import factories
import numpy as np
import openai
import pytest
import webuiapi
from conftest import Served
from factories import outline, painting
from test_openai_api import same

from lcm_compile import BuildSpec, build, load
from lcm_compile.spec import ControlNetSpec, IpAdapterSpec, T2IAdapterSpec

EDGES, GREY, PHOTO = outline((80, 96), 1), outline((64, 64), 2), painting(80, 56)


@pytest.fixture(scope="module")
def guided(sd15_checkpoint, tmp_path_factory):
    """The folder of a bundle with a ControlNet, a T2I-Adapter and an IP-Adapter."""
    folder = tmp_path_factory.mktemp("guided")
    net = factories.write_controlnet(sd15_checkpoint, folder / "canny")
    adapter = factories.write_t2i_adapter(folder / "sketch")
    ip = factories.write_ip_adapter(sd15_checkpoint, folder / "ip/models/ip-adapter.safetensors")
    factories.write_image_encoder(folder / "ip/models/image_encoder")
    spec = BuildSpec(
        str(sd15_checkpoint),
        no_lcm=True,
        few_step="lcm",
        backend="onnxruntime",
        image=True,
        controlnets=(ControlNetSpec(str(net), 0.9),),
        t2i_adapters=(T2IAdapterSpec(str(adapter), 0.8),),
        ip_adapter=IpAdapterSpec(str(ip), 0.7),
    )
    return build(spec, folder / "bundle").folder


@pytest.fixture(scope="module")
def server(guided, small):
    with Served(f"guided={guided}", f"small={small}") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pipeline(guided):
    with load(guided) as pipeline:
        yield pipeline


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def text(image):
    return base64.b64encode(png(image)).decode()


BOTH = {"control": [text(EDGES), f"data:image/png;base64,{text(GREY)}"]}
CONTROL = {"control": [EDGES, GREY]}


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (BOTH, CONTROL),
        ({**BOTH, "control_weight": [0.4, 1.2]}, {**CONTROL, "control_weight": [0.4, 1.2]}),
        ({**BOTH, "control_weight": 0.5}, {**CONTROL, "control_weight": 0.5}),
        (
            {**BOTH, "control_start": 0.25, "control_end": [0.75, 1]},
            {**CONTROL, "control_start": 0.25, "control_end": [0.75, 1.0]},
        ),
        (
            {**BOTH, "control_detector": ["canny:50,150", "none"]},
            {**CONTROL, "control_detector": ["canny:50,150", "none"]},
        ),
        ({**BOTH, "ip_image": text(PHOTO)}, {**CONTROL, "ip_image": PHOTO}),
        (
            {**BOTH, "ip_image": text(PHOTO), "ip_weight": 0.2},
            {**CONTROL, "ip_image": PHOTO, "ip_weight": 0.2},
        ),
    ],
    ids=["both", "weights", "one weight", "span", "detector", "ip", "ip weight"],
)
def test_a_generation(client, pipeline, body, options):
    answer = client.images.generate(model="guided", prompt="a star", extra_body={"seed": 2, **body})
    assert same(answer.data[0].b64_json, pipeline("a star", seed=2, **options)[0])


def test_an_edit_takes_them_as_texts(client, pipeline):
    body = {**BOTH, "control_weight": [0.4, 1.2], "ip_image": text(PHOTO), "ip_weight": 0.2, "seed": 2}
    answer = client.images.edit(model="guided", image=png(painting()), prompt="a star", extra_body=body)
    options = {**CONTROL, "control_weight": [0.4, 1.2], "ip_image": PHOTO, "ip_weight": 0.2}
    assert same(answer.data[0].b64_json, pipeline("a star", seed=2, image=painting(), **options)[0])


def test_an_edit_takes_them_as_files_larger_than_a_form_usually_has(server, pipeline):
    """A text of a form is read up to a megabyte by default, and a picture in base64 may be more."""
    noise = factories.Image.fromarray(np.random.default_rng(1).integers(0, 256, (700, 700, 3), np.uint8))
    assert len(text(noise)) > 1 << 20
    files = [("image", png(painting())), ("control", png(EDGES)), ("ip_image", png(PHOTO))]
    fields = {"model": "guided", "prompt": "a star", "seed": "2", "control": text(noise)}
    answer = server.client.post("/v1/images/edits", files=files, data=fields)
    assert answer.status_code == 200, answer.text
    # httpx sends the fields before the files.
    expected = pipeline("a star", seed=2, image=painting(), control=[noise, EDGES], ip_image=PHOTO)
    assert same(answer.json()["data"][0]["b64_json"], expected[0])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, ["a ControlNet and a T2I-Adapter", "no control picture", "a list of 2", "the field control"]),
        ({"control": text(EDGES)}, ["only one is given", "the field control"]),
        ({"control": [text(EDGES)] * 3}, ["3 are given"]),
        ({"control": ["!"] * 2}, ["control picture can't be read"]),
        ({**BOTH, "ip_image": "/etc/hostname"}, ["ip_image"]),
        ({**BOTH, "control_weight": [1, 2, 3]}, ["control weight"]),
        ({**BOTH, "control_detector": "depth"}, ["control detector", "canny"]),
        ({**BOTH, "model": "small"}, ["no ControlNet and no T2I-Adapter", "GET /v1/models"]),
        ({"ip_image": text(PHOTO), "model": "small"}, ["no IP-Adapter", "GET /v1/models"]),
    ],
    ids=lambda value: " " if isinstance(value, dict) else None,
)
def test_what_lacks_a_picture_or_has_too_many_is_told(server, body, told):
    answer = server.client.post(
        "/v1/images/generations", json={"model": "guided", "prompt": "a star", **body}
    )
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert all(words in message for words in told) and "--" not in message, message
    assert "/" not in message.replace("GET /v1/models", "")  # no folder of the server


def test_the_command_that_builds_a_model_for_images_tells_no_folder(sdxl_checkpoint, batched):
    with Served(f"pairs={batched}") as server:
        answer = server.client.post(
            "/v1/images/edits", files={"image": png(painting())}, data={"prompt": "a star"}
        )
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert f"build --base {sdxl_checkpoint.name} " in message and "/" not in message, message


def test_models_tell_what_they_read(client):
    model = client.models.retrieve("guided")
    assert model.control == [
        {"kind": "ControlNet", "name": "canny", "weight": 0.9},
        {"kind": "T2I-Adapter", "name": "sketch", "weight": 0.8},
    ]
    assert model.ip_weight == 0.7
    model = client.models.retrieve("small")
    assert (model.control, model.ip_weight) == ([], None)


@pytest.fixture(scope="module")
def webui(server):
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port)


OWN = {"prompt": "a star", "seed": 2, "steps": 4, "cfg_scale": 1}


def unit(image, **options):
    return webuiapi.ControlNetUnit(image=image, **options)


@pytest.mark.parametrize(
    ("units", "options"),
    [
        (
            [unit(EDGES, weight=0.4), unit(GREY, weight=1.2, guidance_start=0.25, guidance_end=0.75)],
            {
                "control": [EDGES, GREY],
                "control_weight": [0.4, 1.2],
                "control_start": [0.0, 0.25],
                "control_end": [1.0, 0.75],
            },
        ),
        # By their names, as model_list has them or with a hash, whatever their order.
        (
            [unit(GREY), unit(EDGES, weight=0.4, model="Canny [0123abcd]")],
            {"control": [EDGES, GREY], "control_weight": [0.4, 1.0]},
        ),
        (
            [unit(EDGES, module="canny", threshold_a=50, threshold_b=150), unit(GREY)],
            {**CONTROL, "control_weight": 1.0, "control_detector": ["canny:50,150", "none"]},
        ),
        (
            [unit(EDGES, module="canny", threshold_a=-1, threshold_b=-1, model="canny")],
            {"control": [EDGES, GREY], "control_weight": [1.0, 0.0], "control_detector": ["canny", "none"]},
        ),
        # One that is not enabled, or is not sent, has no effect.
        (
            [unit(EDGES, enabled=False), unit(GREY, model="sketch")],
            {"control": [EDGES, GREY], "control_weight": [0.0, 1.0]},
        ),
        ([], {**CONTROL, "control_weight": 0.0}),
        (
            [unit(PHOTO, module="ip-adapter-auto", model="ip-adapter", weight=0.2)],
            {**CONTROL, "control_weight": 0.0, "ip_image": PHOTO, "ip_weight": 0.2},
        ),
    ],
    ids=["two", "named", "canny", "usual thresholds", "one", "none", "ip"],
)
def test_controlnet_units(webui, pipeline, units, options):
    answer = webui.txt2img(**OWN, override_settings={"sd_model_checkpoint": "guided"}, controlnet_units=units)
    expected = pipeline("a star", seed=2, prompt_syntax="webui", **options)
    assert (np.asarray(answer.image) == np.asarray(expected[0])).all()


def test_controlnet_units_of_img2img_read_the_picture_that_it_begins_at(webui, pipeline):
    answer = webui.img2img(
        [painting()],
        **OWN,
        denoising_strength=0.8,
        controlnet_units=[unit(EDGES, weight=0.4, model="canny"), unit(None, model="sketch")],
    )
    own = {"control": [EDGES, painting()], "control_weight": [0.4, 1.0]}
    expected = pipeline("a star", seed=2, image=painting(), strength=0.8, prompt_syntax="webui", **own)
    assert (np.asarray(answer.image) == np.asarray(expected[0])).all()


FORMS = [
    {"input_image": text(EDGES)},
    {"image": f"data:image/png;base64,{text(EDGES)}"},
    {"image": {"image": text(EDGES), "mask": None}},
    {"image": [text(EDGES), None]},
]


@pytest.mark.parametrize("form", FORMS, ids=["input_image", "data", "mask", "list"])
def test_a_units_picture_has_the_extensions_forms(server, pipeline, form):
    args = [{"weight": 0.4, "guidance": 0.75, **form}, {"image": text(GREY), "enabled": False}]
    body = {**OWN, "alwayson_scripts": {"controlnet": {"args": args}, "other": {"args": [1]}}}
    answer = server.client.post("/sdapi/v1/txt2img", json=body)
    own = {"control": [EDGES, GREY], "control_weight": [0.4, 0.0], "control_end": [0.75, 1.0]}
    expected = pipeline("a star", seed=2, prompt_syntax="webui", **own)
    assert same(answer.json()["images"][0], expected[0])


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([{"image": text(EDGES), "module": "openpose"}], ["'openpose'", "canny"]),
        ([{"image": text(EDGES), "model": "depth"}], ["no ControlNet 'depth'", "canny", "sketch"]),
        ([{"image": text(EDGES), "model": "canny"}] * 2, ["more ControlNet units than one for canny"]),
        ([{"image": text(EDGES)}] * 3, ["more ControlNet units than guided has"]),
        ([{"image": text(PHOTO), "module": "ip-adapter-auto"}] * 2, ["two units for the IP-Adapter"]),
        ([{"image": text(PHOTO), "module": "ip-adapter-auto", "guidance_end": 0.5}], ["every step"]),
        ([{}], ["no image"]),
        ([{"image": "/etc/hostname"}], ["unit"]),
        ([{"image": text(EDGES), "weight": "much"}], ["weight"]),
        ([{"image": text(EDGES), "guidance_start": 0.5, "guidance_end": 0.5}], ["start 0.5 must be before"]),
        ([3], ["unit"]),
        (3, ["list of units"]),
    ],
    ids=lambda value: " " if isinstance(value, list) and isinstance(value[0], dict) else None,
)
def test_a_unit_that_can_not_be_drawn_with_is_told(server, args, told):
    body = {**OWN, "alwayson_scripts": {"ControlNet": {"args": args}}}
    answer = server.client.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 400, answer.text
    assert all(words in answer.json()["detail"] for words in told), answer.text


@pytest.mark.parametrize(("module", "told"), [("none", "no ControlNet"), ("ip-adapter-auto", "IP-Adapter")])
def test_a_unit_for_a_model_that_has_none_is_told(webui, module, told):
    with pytest.raises(RuntimeError, match=f"small has {told}|{told}.*small has none"):
        webui.txt2img(
            **OWN,
            override_settings={"sd_model_checkpoint": "small"},
            controlnet_units=[unit(EDGES, module=module)],
        )


def test_what_clients_of_the_extension_ask(webui, server):
    assert webui.controlnet_version() == 3
    assert webui.controlnet_model_list() == ["canny", "sketch", "ip-adapter"]
    assert webui.controlnet_module_list() == ["none", "canny", "ip-adapter-auto"]
    assert webui.has_controlnet and webui.get_scripts()["txt2img"] == ["controlnet", "controlnet m2m"]
    get = server.client.get
    assert get("/controlnet/settings").json() == {"control_net_unit_count": 3}
    kind = get("/controlnet/control_types").json()["control_types"]["All"]
    assert (kind["default_option"], kind["default_model"]) == ("none", "canny")
    try:
        webui.set_options({"sd_model_checkpoint": "small"})
        assert webui.controlnet_model_list() == [] and webui.controlnet_module_list() == ["none", "canny"]
    finally:
        webui.set_options({"sd_model_checkpoint": "guided"})
