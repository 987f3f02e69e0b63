"""Pictures that an IP-Adapter's picture guides, against diffusers' pipelines with the same files."""

from __future__ import annotations

import json
from dataclasses import dataclass

import factories
import numpy as np
import pytest
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers_reference import least_psnr
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.ip_image import clip_pixels
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.source_picture import source_picture
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import ControlNetSpec, IpAdapterSpec

FLOOR = 60  # dB
WEIGHT = 0.7  # the bundles' own
PHOTO = factories.painting(80, 56)


@dataclass
class Pair:
    """Our pipeline of a bundle with an IP-Adapter, and diffusers'."""

    ours: Pipeline
    theirs: DiffusionPipeline
    folder: str

    def psnr(self, sampler="lcm", steps=4, scale=1.0, weight=None, mine=None, theirs=None, **options):
        """The least PSNR of two pictures; `mine` and `theirs` are options of one pipeline."""
        self.theirs.set_ip_adapter_scale(WEIGHT if weight is None else weight)
        others = {"ip_adapter_image": PHOTO, **({"height": 64, "width": 64} if theirs is None else theirs)}
        own = {"ip_image": PHOTO, "ip_weight": weight, **(mine or {})}
        return least_psnr(self.ours, self.theirs, sampler, steps, scale, own, others, **options)


def make_pair(base, folder, kind, pipeline, options, **models):
    """A bundle of a base and a random IP-Adapter, and diffusers' pipeline of them."""
    base = factories.with_scheduler(base, folder / "base", clip_sample=False)
    adapter = factories.write_ip_adapter(base, folder / "ip/models/ip-adapter.safetensors", kind)
    factories.write_image_encoder(folder / "ip/models/image_encoder")
    ip_adapter = IpAdapterSpec(str(adapter), WEIGHT)
    bundle = build(
        BuildSpec(str(base), no_lcm=True, few_step="lcm", ip_adapter=ip_adapter, **options), folder / "bundle"
    )
    theirs = pipeline.from_pretrained(base, **models)
    theirs.load_ip_adapter(str(folder / "ip"), subfolder="models", weight_name=adapter.name)
    theirs.set_progress_bar_config(disable=True)
    return Pair(load(bundle), theirs, bundle.folder)


@pytest.fixture(scope="module")
def sd15_base(sd15_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15-base")
    pair = make_pair(sd15_checkpoint, folder, "base", StableDiffusionPipeline, {"backend": "onnxruntime"})
    with pair.ours:
        yield pair


@pytest.fixture(scope="module")
def sd15_plus(sd15_checkpoint, tmp_path_factory):
    """The step itself computes the keys and values."""
    folder, options = (
        tmp_path_factory.mktemp("sd15-plus"),
        {"backend": "torchscript", "without": ("context",)},
    )
    pair = make_pair(sd15_checkpoint, folder, "plus", StableDiffusionPipeline, options)
    with pair.ours:
        yield pair


@pytest.fixture(scope="module")
def sdxl_base(sdxl_checkpoint, tmp_path_factory):
    folder, options = tmp_path_factory.mktemp("sdxl-base"), {"backend": "torchscript"}
    pair = make_pair(sdxl_checkpoint, folder, "base", StableDiffusionXLPipeline, options)
    with pair.ours:
        yield pair


@pytest.fixture(scope="module")
def sdxl_plus(sdxl_checkpoint, tmp_path_factory):
    """Two pictures at a time."""
    folder, options = tmp_path_factory.mktemp("sdxl-plus"), {"backend": "torchscript", "batch": 2}
    pair = make_pair(sdxl_checkpoint, folder, "plus", StableDiffusionXLPipeline, options)
    with pair.ours:
        yield pair


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": 0.0},
        {"weight": 1.0, "scale": 3.0, "negative_prompt": "blue"},
        {"weight": 0.6, "sampler": "ddim", "steps": 5, "scale": 5.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("pair", ["sd15_base", "sd15_plus", "sdxl_base", "sdxl_plus"])
def test_pictures_are_those_of_diffusers(request, pair, options):
    assert request.getfixturevalue(pair).psnr(**options) >= FLOOR


def test_with_a_controlnet_a_lora_and_another_picture(sd15_checkpoint, tmp_path):
    """Of an adapter for a face's complete picture, whose tokens are as many as the picture has parts."""
    plain = StableDiffusionPipeline.from_pretrained(sd15_checkpoint)
    lora = factories.write_lora(plain, tmp_path / "style.safetensors", "diffusers", text=False)
    net = factories.write_controlnet(sd15_checkpoint, tmp_path / "net")
    options = {
        "backend": "torchscript",
        "image": True,
        "controlnets": (ControlNetSpec(str(net)),),
        "loras": (LoraSpec(str(lora), 0.5, name="style"),),
    }
    model = ControlNetModel.from_pretrained(net)
    pipeline = StableDiffusionControlNetImg2ImgPipeline
    pair = make_pair(sd15_checkpoint, tmp_path / "all", "full", pipeline, options, controlnet=model)
    pair.theirs.load_lora_weights(str(lora))
    pair.theirs.fuse_lora(lora_scale=0.5)
    begun, outline = factories.painting(64, 64).rotate(90), factories.outline((64, 64))
    with pair.ours:
        mine = {"image": begun, "control": outline}
        theirs = {"image": begun, "control_image": outline, "controlnet_conditioning_scale": 1.0}
        for scale in (1.0, 3.0):
            assert pair.psnr(scale=scale, strength=0.75, mine=mine, theirs=theirs) >= FLOOR


def test_the_picture_matters_and_without_it_nothing_is_added(sd15_base):
    def draw(image=None, weight=None):
        return np.asarray(sd15_base.ours("a star", seed=1, ip_image=image, ip_weight=weight)[0])

    none = draw()
    assert psnr_db(draw(PHOTO), none) < 35
    assert psnr_db(draw(PHOTO), draw(factories.outline((64, 64)))) < 45
    assert psnr_db(draw(PHOTO), draw(PHOTO, 0.3)) < 45
    np.testing.assert_array_equal(draw(PHOTO, 0), none)
    np.testing.assert_array_equal(draw(), none)


def test_a_known_picture_is_not_encoded_again(sd15_base):
    def passes(image, weight=None, scale=1.0):
        totals = []
        request = Request("a blue star", 1, ip_image=image, ip_weight=weight, guidance_scale=scale)
        sd15_base.ours.draw(request, lambda done, total: totals.append((done, total)))
        assert totals[-1][0] == totals[-1][1]
        return len(totals)

    other = factories.outline((40, 40), seed=9)
    without = passes(None)
    assert passes(other) == without + 1
    assert passes(other) == passes(other, 0.2) == without
    guided = passes(None, scale=2.0)
    assert passes(factories.outline((40, 40), seed=10), scale=2.0) <= guided + 2
    assert passes(other, scale=2.0) == guided


@pytest.mark.parametrize("size", [(224, 224), (80, 56), (57, 81), (300, 1000), (1, 3), (640, 480)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
def test_pictures_are_read_as_transformers_reads_them(size, mode):
    picture = factories.painting(*size)
    if mode.endswith("A"):
        picture.putalpha(picture.getchannel("G"))
    picture = picture.convert(mode)
    for side in (28, 224):
        theirs = CLIPImageProcessorPil(size=side, crop_size=side)(picture, return_tensors="np").pixel_values
        found = clip_pixels(source_picture(picture), side)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-6)


def test_run_tells_the_picture(sd15_base, command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PHOTO.save("photo.png")
    asked = ["--ip-image", "photo.png", "--seed", 1]
    words = ["run", "a star", "--bundle", sd15_base.folder, *asked]
    code, out, err = command(*words, "--out", "a.png", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["ip_image"]["name"], told["ip_weight"]) == ("photo.png", WEIGHT)
    assert {"ip-image", "step"} < told["ms"].keys()
    text = Image.open("a.png").text
    assert "IP-Adapter: photo.png weight 0.7" in text["parameters"]
    assert told["ip_image"]["sha256"] in text["lcm-compile"]

    first = Image.open("a.png").tobytes()
    again = "run", "--again", "a.png", "--out", "b.png"
    assert command(*again)[0] == 0
    assert Image.open("b.png").tobytes() == first
    assert command(*again, "--ip-weight", 0.1)[0] == 0
    assert Image.open("b.png").tobytes() != first
    refused(2, "would be lost", *words, "--out", "photo.png")
    factories.outline((64, 64)).save("photo.png")
    refused(2, ["is not the ip-image", "--ip-image"], *again)
    assert command(*again, "--ip-image", "photo.png")[0] == 0
    (tmp_path / "photo.png").unlink()
    refused(2, "is not here", *again)

    code, out, err = command("inspect", sd15_base.folder, "--json")
    assert json.loads(out)["ip_adapter"]["weight"] == WEIGHT
    assert command("verify", sd15_base.folder)[0] == 0


def test_bad_requests(sd15_checkpoint, sd15_base, refused, tmp_path):
    spec = BuildSpec(str(sd15_checkpoint), no_lcm=True, few_step="lcm", backend="torchscript")
    plain = build(spec, tmp_path / "plain").folder
    picture, broken, thin = (tmp_path / f"{name}.png" for name in ("photo", "broken", "thin"))
    PHOTO.save(picture)
    broken.write_bytes(picture.read_bytes()[:60])
    Image.new("RGB", (1, 300_000)).save(thin)
    words = ["run", "a star", "--out", tmp_path / "a.png", "--bundle"]
    refused(2, ["no IP-Adapter", "--ip-adapter FILE"], *words, plain, "--ip-image", picture)
    refused(2, "ip-image", *words, sd15_base.folder, "--ip-image", broken)
    refused(2, "No such file", *words, sd15_base.folder, "--ip-image", tmp_path / "none.png")
    refused(2, "only the centre", *words, sd15_base.folder, "--ip-image", thin)
    refused(2, "without the picture", *words, sd15_base.folder, "--ip-weight", 0.5)
    refused(2, "not nan", *words, sd15_base.folder, "--ip-image", picture, "--ip-weight", "nan")
    assert not (tmp_path / "a.png").exists()
    with pytest.raises(UsageError, match="ip-image must be a path"):
        sd15_base.ours("a star", ip_image=3)
    with pytest.raises(UsageError, match="same ip-image"):
        asked = [Request("a star", 1, ip_image=image) for image in (PHOTO, PHOTO.rotate(90))]
        sd15_base.ours.draw(asked)
