"""Pictures that ControlNets guide, against diffusers' ControlNet pipelines with the same weights."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import factories
import numpy as np
import pytest
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers_reference import least_psnr
from factories import outline, painting
from PIL import Image

from lcm_compile import BuildSpec, build, load
from lcm_compile.benchmarks.measure.bench import Measured, cases_of, contest
from lcm_compile.benchmarks.measure.rivals import SELF
from lcm_compile.benchmarks.measure.work import count_work
from lcm_compile.benchmarks.measure.worker import cold_run, take_sample
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.checkpoint.open import open_base
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.source_picture import source_picture
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import ControlNetSpec, LoraSpec, Shape

FLOOR = 60  # dB


def load_controlnets(base, folder, *kinds):
    """ControlNets of these kinds for a base: what `build` is given, and diffusers' models of the same."""
    sources, models = [], []
    for i, kind in enumerate(kinds):
        whole = folder / f"net-{i}"
        if kind == "control-LoRA":
            source = factories.write_control_lora(base, whole, folder / f"net-{i}.safetensors", seed=3 + i)
        else:
            source = factories.write_controlnet(base, whole, seed=3 + i)
        sources.append(source)
        models.append(ControlNetModel.from_pretrained(whole))
    return sources, models


@dataclass
class Pair:
    """Our pipeline of a bundle with ControlNets, and diffusers'."""

    ours: Pipeline
    theirs: DiffusionPipeline
    pictures: list[Image.Image]
    folder: str
    weights: list[float]  # the bundle's own

    def psnr(self, sampler="lcm", steps=4, scale=1.0, weight=None, start=None, end=None, **options):
        """The least PSNR of two pictures. Of one ControlNet the values are plain, of several lists."""
        one = len(self.pictures) == 1
        usual = lambda value, default: default if value is None else value  # noqa: E731
        each = lambda default: default if one else [default] * len(self.pictures)  # noqa: E731
        others = {
            "image": self.pictures[0] if one else self.pictures,
            "controlnet_conditioning_scale": usual(weight, self.weights[0] if one else self.weights),
            "control_guidance_start": usual(start, each(0.0)),
            "control_guidance_end": usual(end, each(1.0)),
            "height": 64,
            "width": 64,
        }
        mine = {
            "control": self.pictures,
            "control_weight": weight,
            "control_start": start,
            "control_end": end,
        }
        return least_psnr(self.ours, self.theirs, sampler, steps, scale, mine, others, **options)


def make_pair(base, folder, weights, kinds, pipeline, **options):
    """A bundle of a base and its random ControlNets, and diffusers' pipeline of them.

    A LoRA is fused into the base, which must not reach the control-LoRA.
    """
    base = factories.with_scheduler(base, folder / "base", clip_sample=False)
    nets = len(weights)
    sources, models = load_controlnets(base, folder, *kinds)
    pipe = pipeline.from_pretrained(base, controlnet=models[0] if nets == 1 else models)
    lora = factories.write_lora(pipe, folder / "style.safetensors", "diffusers")
    specs = tuple(ControlNetSpec(str(s), w) for s, w in zip(sources, weights, strict=True))
    loras = (LoraSpec(str(lora), 0.3),)
    spec = BuildSpec(str(base), no_lcm=True, few_step="lcm", loras=loras, controlnets=specs, **options)
    bundle = build(spec, folder / "bundle")
    pipe.load_lora_weights(str(lora))
    pipe.fuse_lora(lora_scale=0.3)
    pipe.set_progress_bar_config(disable=True)
    return load(bundle), pipe, [outline((80 + 16 * i, 96), i) for i in range(nets)], bundle.folder, weights


@pytest.fixture(scope="module")
def sd15(sd15_checkpoint, tmp_path_factory):
    """One ControlNet, a control-LoRA, a picture at a time."""
    folder = tmp_path_factory.mktemp("sd15-control")
    options, kinds = {"backend": "onnxruntime"}, ["control-LoRA"]
    made = make_pair(sd15_checkpoint, folder, [0.8], kinds, StableDiffusionControlNetPipeline, **options)
    with made[0]:
        yield Pair(*made)


@pytest.fixture(scope="module")
def sdxl(sdxl_checkpoint, tmp_path_factory):
    """Two ControlNets, two pictures at a time."""
    folder = tmp_path_factory.mktemp("sdxl-control")
    options, kinds = {"backend": "torchscript", "batch": 2}, ["whole", "control-LoRA"]
    made = make_pair(
        sdxl_checkpoint, folder, [1.2, 0.0], kinds, StableDiffusionXLControlNetPipeline, **options
    )
    with made[0]:
        yield Pair(*made)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": 0.6},
        {"weight": 0.0},
        {"sampler": "ddim", "steps": 5, "scale": 5.0, "negative_prompt": "blue"},
        {"sampler": "ddim", "steps": 7, "scale": 2.0, "start": 0.25, "end": 0.8},
        {"start": 0.5},
        {"end": 0.5, "weight": -0.4},
    ],
    ids=str,
)
def test_one_controlnet(sd15, options):
    assert sd15.psnr(**options) >= FLOOR


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": [0.6, 1.2], "scale": 2.0, "negative_prompt": "blue"},
        {"sampler": "ddim", "steps": 6, "scale": 5.0, "start": [0.0, 0.4], "end": [0.5, 0.9]},
    ],
    ids=str,
)
def test_two_controlnets(sdxl, options):
    assert sdxl.psnr(**options) >= FLOOR


def test_the_control_picture_matters(sd15):
    def draw(**options):
        asked = {"control": sd15.pictures[0], **options}
        return np.asarray(sd15.ours("a star", seed=1, **asked)[0])

    own = draw()
    assert psnr_db(own, draw(control_weight=0.0)) < 35
    assert psnr_db(own, draw(control=outline((64, 64), seed=5))) < 35
    assert psnr_db(draw(control_weight=0.0), draw(control=outline((64, 64), 5), control_weight=0)) > FLOOR


def test_each_picture_is_the_one_that_is_drawn_alone(sdxl):
    pictures = sdxl.ours("a star", seed=[1, 2, 3], control=sdxl.pictures)
    alone = sdxl.ours("a star", seed=2, control=sdxl.pictures)
    assert psnr_db(np.asarray(pictures[1]), np.asarray(alone[0])) >= FLOOR


def test_a_depth_map_of_sixteen_bits_is_read_as_one_of_eight(tmp_path):
    shape, values = Shape(2, 64, 64), np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((values / 257).round().astype(np.uint8)).save(tmp_path / "8.png")
    sixteen, eight = (source_picture(tmp_path / f"{bits}.png").planes(shape) for bits in (16, 8))
    assert sixteen.shape == (2, 3, 64, 64) and sixteen.max() == 1 and sixteen.min() == 0
    np.testing.assert_allclose(sixteen, eight, atol=1.01 / 255)


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGBA", "CMYK"])
def test_pictures_of_other_modes_are_read_as_diffusers_reads_them(mode):
    picture = outline((80, 48)).convert(mode)
    processor = VaeImageProcessor(do_convert_rgb=True, do_normalize=False)
    theirs = processor.preprocess(picture, height=64, width=96).numpy()
    np.testing.assert_array_equal(source_picture(picture).planes(Shape(1, 64, 96)), theirs)


def canny_as_documented(photo, low=100, high=200):
    """What diffusers' documentation of ControlNets makes of a picture."""
    image = cv2.Canny(np.array(photo), low, high)[:, :, None]
    return Image.fromarray(np.concatenate([image, image, image], axis=2))


def test_edges_are_those_of_opencv():
    photo = painting(96, 64)
    shape, found = Shape(1, 64, 96), source_picture(photo).detected_by("canny")
    expected = np.asarray(canny_as_documented(photo), np.float32).transpose(2, 0, 1) / 255
    assert 0.01 < expected.mean() < 0.5
    np.testing.assert_array_equal(found.planes(shape)[0], expected)
    resized = canny_as_documented(photo.resize((64, 64), Image.Resampling.LANCZOS), 20, 60)
    found = source_picture(photo).detected_by("canny:20,60").planes(Shape(2, 64, 64))[1]
    np.testing.assert_array_equal((found * 255).transpose(1, 2, 0), np.asarray(resized))
    assert source_picture(photo).detected_by("none") == source_picture(photo)


def test_a_photo_is_a_control_picture(sd15, sdxl, command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = painting()
    photo.save("photo.png")
    canny_as_documented(photo).save("edges.png")
    words = ["run", "a star", "--bundle", sd15.folder, "--seed", 1, "--control"]
    detector = "--control-detector", "canny"
    code, out, err = command(*words, "photo.png", *detector, "--out", "a.png", "--json")
    assert code == 0, err
    [told] = json.loads(out)["control"]
    assert (told["file"], told["detector"]) == ("photo.png", "canny")
    assert command(*words, "edges.png", "--out", "b.png")[0] == 0
    drawn = Image.open("a.png").tobytes()
    assert drawn == Image.open("b.png").tobytes()
    assert command("run", "--again", "a.png", "--out", "c.png")[0] == 0
    assert drawn == Image.open("c.png").tobytes()
    assert command("run", "--again", "a.png", "--out", "c.png", "--control-detector", "none")[0] == 0
    assert drawn != Image.open("c.png").tobytes()

    [other] = sdxl.ours("a star", seed=1, control=[photo, photo], control_detector=["canny", "none"])
    [same] = sdxl.ours("a star", seed=1, control=[canny_as_documented(photo), photo])
    assert (np.asarray(other) == np.asarray(same)).all()

    bad = [*words, "photo.png", "--out", "d.png", "--control-detector"]
    refused(2, ["unknown control detector 'depth'", "canny, none"], *bad, "depth")
    refused(2, "is not canny:LOW,HIGH", *bad, "canny:5")
    refused(2, "2 control detectors for 1", *bad, "canny", "--control-detector", "none")
    refused(2, "without a control picture", *words[:-1], *detector)
    monkeypatch.setitem(sys.modules, "cv2", None)
    refused(1, ["OpenCV", "pip install 'lcm-compile[detect]'"], *bad, "canny")
    refused(1, "pip install", "run", "--again", "a.png", "--out", "d.png")
    refused(1, "pip install", "run", "--again", "b.png", "--out", "d.png", *detector)
    assert not (tmp_path / "d.png").exists()


def test_run_tells_the_control_picture(sd15, command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd15.pictures[0].save("outline.png")
    words = ["run", "a star", "--bundle", sd15.folder]
    asked = ["--control", "outline.png", "--control-weight", 0.7, "--control-end", 0.8, "--seed", 1]
    code, out, err = command(*words, *asked, "--out", "a.png", "--json")
    assert code == 0, err
    [told] = json.loads(out)["control"]
    assert (told["file"], told["weight"], told["start"], told["end"]) == ("outline.png", 0.7, 0.0, 0.8)
    text = Image.open("a.png").text
    assert "ControlNet 0: outline.png weight 0.7 from 0 to 0.8" in text["parameters"]
    assert told["sha256"] in text["lcm-compile"]

    first = Image.open("a.png").tobytes()
    again = "run", "--again", "a.png", "--out", "b.png"
    assert command(*again)[0] == 0
    assert Image.open("b.png").tobytes() == first
    assert command(*again, "--control-weight", 0)[0] == 0
    assert Image.open("b.png").tobytes() != first
    outline((64, 64), seed=4).save("outline.png")
    refused(2, ["is not the control picture", "SHA-256 differs", "--control"], *again)
    assert command(*again, "--control", "outline.png")[0] == 0
    (tmp_path / "outline.png").unlink()
    refused(2, ["the control picture outline.png", "is not here", "--control"], *again)

    code, out, err = command("run", "--bundle", sd15.folder, "--out", "c.png", "--grid", "steps=1,2", *asked)
    assert code == 2 and "outline.png can't be read" in err


def test_bad_requests(sd15, sd15_checkpoint, sdxl, refused, tmp_path):
    plain = build(BuildSpec(str(sd15_checkpoint), no_lcm=True, backend="torchscript"), tmp_path / "plain")
    picture, broken = tmp_path / "outline.png", tmp_path / "broken.png"
    sd15.pictures[0].save(picture)
    broken.write_bytes(picture.read_bytes()[:60])
    words = ["run", "a star", "--out", tmp_path / "a.png", "--bundle"]
    refused(2, ["no control picture is given", "--control PICTURE"], *words, sd15.folder)
    given = "--control", picture
    refused(2, ["2 are given", "a ControlNet"], *words, sd15.folder, *given, *given)
    refused(2, ["only one is given", "2 ControlNets"], *words, sdxl.folder, *given)
    refused(2, ["has no ControlNet", "--controlnet DIR"], *words, plain.folder, *given)
    refused(2, "can't be read", *words, sd15.folder, "--control", broken)
    refused(2, "No such file", *words, sd15.folder, "--control", tmp_path / "none.png")
    refused(2, "not nan", *words, sd15.folder, *given, "--control-weight", "nan")
    refused(2, "from 0 to 1, not 1.5", *words, sd15.folder, *given, "--control-end", 1.5)
    span = "--control-start", 0.5, "--control-end", 0.5
    refused(2, "must be before control end", *words, sd15.folder, *given, *span)
    refused(2, "without a control picture", *words, sd15.folder, "--control-weight", 1)
    assert not (tmp_path / "a.png").exists()
    with pytest.raises(UsageError, match="the control picture must be"):
        sd15.ours("a star", control=[3])
    with pytest.raises(UsageError, match="2 values of control weight for 1"):
        Request("a star", 1, control=picture, control_weight=[1, 2])
    with pytest.raises(UsageError, match="whole-loop"):
        BuildSpec("demo", whole_loop=True, controlnets=(ControlNetSpec("x"),))


def test_bench_draws_with_the_controlnets_too(sdxl):
    """In this process, which saves the minute that five others take to start."""
    bundle = open_bundle(Path(sdxl.folder))
    with contest(bundle, ["eager"]) as contestants:
        drawn = {name: [take_sample(load(), "a star", 7)] for name, load in contestants.drawers.items()}
        nothing = dict.fromkeys(drawn)
        cases = {one.name: one for one in cases_of(contestants, Measured(drawn, nothing, nothing), {})}
    assert [*cases] == ["picture", "encode", "context", "step", "decode"]
    # Whoever drew without the ControlNets drew another picture.
    assert cases["picture"].parity_db >= FLOOR
    plain = sdxl.ours("a star", seed=7, num_images=2, control=sdxl.pictures, control_weight=0.0)
    assert psnr_db(drawn[SELF][0].drawn.pictures[0], np.asarray(plain[0])) < 35
    assert cases["step"].rivals["eager"].samples_ms[0] > 0
    # Each ControlNet is counted, a copy of half of the UNet, and so are the bytes of its engine.
    manifest = bundle.manifest
    unet = count_work(open_base(replace(manifest.spec, controlnets=()), half=False), manifest.pipeline.shape)
    step, passes = cases["step"], cases["step"].passes
    assert 1.5 * passes * unet["step"].flop < step.flop < 3.5 * passes * unet["step"].flop
    sizes = [(bundle.folder / stage.file).stat().st_size for stage in manifest.stages]
    assert cases["picture"].engine_bytes == pytest.approx(sum(sizes), rel=0.01)


@pytest.mark.slow
def test_bench_starts_cold_with_controlnets_and_names_rivals_without(sdxl, refused, tmp_path):
    assert cold_run(Path(sdxl.folder), "a star", 7, tmp_path / "a.png", threads=1) > 0
    refused(2, "draws without ControlNets", "bench", sdxl.folder, "--against", "openvino")
