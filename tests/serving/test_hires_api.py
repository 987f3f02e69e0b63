"""The second pass of A1111's API, by a client of it, against the pipeline's own."""

from __future__ import annotations

import numpy as np
import pytest
import webuiapi

from lcm_compile import BuildSpec, build, load
from lcm_compile.builder.build import add_size


@pytest.fixture(scope="module")
def two_sizes(sd15_checkpoint, tmp_path_factory):
    """The folder of a bundle of 64×64 and 96×96 that reads pictures."""
    options = {"no_lcm": True, "few_step": "lcm", "backend": "onnxruntime", "image": True, "height": 64}
    bundle = build(BuildSpec(str(sd15_checkpoint), **options), tmp_path_factory.mktemp("two") / "bundle")
    add_size(bundle.folder, 96, 96)
    return bundle.folder


@pytest.fixture(scope="module")
def client(two_sizes, serve):
    with serve(two_sizes) as server:
        yield webuiapi.WebUIApi(host="127.0.0.1", port=server.port)


ASKED = {"prompt": "a red star", "seed": 7, "steps": 4, "cfg_scale": 1, "width": 64, "height": 64}


@pytest.mark.parametrize(
    ("second", "fields"),
    [
        ({"hr_scale": 2}, {"hires_upscaler": "latent"}),
        (
            {"hr_upscaler": "Lanczos", "hr_second_pass_steps": 6, "denoising_strength": 0.5, "hr_scale": 1.5},
            {"hires_upscaler": "lanczos", "hires_steps": 6, "hires_strength": 0.5},
        ),
        (
            {"hr_upscaler": "R-ESRGAN 4x+", "hr_resize_x": 96, "hr_resize_y": 96},
            {"hires_upscaler": "lanczos"},
        ),
    ],
    ids=["latent", "lanczos", "unknown"],
)
def test_a_second_pass_is_the_pipeline_s(client, two_sizes, second, fields):
    answer = client.txt2img(**ASKED, enable_hr=True, batch_size=2, **second)
    with load(two_sizes) as pipeline:
        strength = {"hires_strength": 0.7, **fields}  # which webuiapi sends
        expected = pipeline("a red star", seed=[7, 8], hires=1.5, **strength)
    for image, other in zip(answer.images, expected, strict=True):
        assert (np.asarray(image.convert("RGB")) == np.asarray(other)).all()
    assert (answer.info["width"], answer.info["denoising_strength"]) == (64, strength["hires_strength"])
    assert (
        "Size: 64x64," in answer.info["infotexts"][0] and "Hires upscale: 1.5" in answer.info["infotexts"][0]
    )


def test_a_model_without_a_larger_size_draws_one_pass(client):
    asked = {**ASKED, "width": 96, "height": 96}
    one, two = client.txt2img(**asked), client.txt2img(**asked, enable_hr=True)
    assert one.image.size == (96, 96) and one.image.tobytes() == two.image.tobytes()
