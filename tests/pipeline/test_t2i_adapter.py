"""Pictures that T2I-Adapters guide, against diffusers' adapter pipelines with the same weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import factories
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionXLAdapterPipeline,
    T2IAdapter,
)
from diffusers_reference import SCHEDULERS, least_psnr
from factories import outline, painting
from PIL import Image

from lcm_compile import BuildSpec, build, load
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import ControlNetSpec, T2IAdapterSpec

FLOOR = 60  # dB


@dataclass
class Pair:
    """Our pipeline of a bundle with T2I-Adapters, and diffusers'."""

    ours: Pipeline
    theirs: DiffusionPipeline
    pictures: list[Image.Image]
    folder: Path

    def psnr(self, sampler="lcm", steps=4, scale=1.0, weight=0.8, factor=None, **options):
        """The least PSNR of two pictures. Of one adapter `weight` is a number, of several a list."""
        others = {
            "image": self.pictures[0] if len(self.pictures) == 1 else self.pictures,
            "adapter_conditioning_scale": weight,
            "height": 64,
            "width": 64,
            **({} if factor is None else {"adapter_conditioning_factor": factor}),
        }
        mine = {"control": self.pictures, "control_weight": weight, "control_end": factor}
        return least_psnr(self.ours, self.theirs, sampler, steps, scale, mine, others, **options)


def make_pair(base, folder, sources, pipeline, pictures, **options):
    """A bundle of a base and T2I-Adapters, and diffusers' pipeline of them."""
    base = factories.with_scheduler(base, folder / "base", clip_sample=False)
    specs = tuple(T2IAdapterSpec(str(source), 0.8) for source in sources)
    spec = BuildSpec(str(base), no_lcm=True, few_step="lcm", t2i_adapters=specs, **options)
    bundle = build(spec, folder / "bundle")
    models = [T2IAdapter.from_pretrained(source) for source in sources]
    theirs = pipeline.from_pretrained(base, adapter=models[0] if len(models) == 1 else MultiAdapter(models))
    theirs.set_progress_bar_config(disable=True)
    return Pair(load(bundle), theirs, pictures, bundle.folder)


@pytest.fixture(scope="module")
def sd15(sd15_checkpoint, tmp_path_factory):
    """One adapter that reads grey pictures, a picture at a time."""
    folder = tmp_path_factory.mktemp("sd15-adapter")
    adapter = factories.write_t2i_adapter(folder / "full", in_channels=1)
    pictures = [outline((80, 96)).convert("L")]
    made = make_pair(
        sd15_checkpoint, folder, [adapter], StableDiffusionAdapterPipeline, pictures, backend="torchscript"
    )
    with made.ours:
        yield made


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """Two adapters, whose last feature is the middle block's, and two pictures at a time."""
    folder = tmp_path_factory.mktemp("sdxl-adapter")
    base = factories.write_sdxl(folder / "deep", **factories.DEEP_SDXL)
    options = {"channels": [32, 64, 64, 64], "adapter_type": "full_adapter_xl"}
    adapters = [factories.write_t2i_adapter(folder / f"xl-{i}", seed=i, **options) for i in range(2)]
    pictures = [outline((80 + 16 * i, 96), i) for i in range(2)]
    made = make_pair(
        base, folder, adapters, StableDiffusionXLAdapterPipeline, pictures, backend="onnxruntime", batch=2
    )
    with made.ours:
        yield made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": 0.4},
        {"weight": 0.0},
        {"sampler": "ddim", "steps": 5, "scale": 5.0, "negative_prompt": "blue"},
    ],
    ids=str,
)
def test_one_adapter(sd15, options):
    assert sd15.psnr(**options) >= FLOOR


@pytest.mark.parametrize(
    "options",
    [
        {"weight": [1.0, 0.6]},
        {"weight": [-0.5, 1.2], "scale": 2.0, "negative_prompt": "blue", "factor": 0.5},
        {"sampler": "ddim", "steps": 7, "scale": 5.0, "weight": [0.7, 0.7], "factor": 0.8},
        {"weight": [0.7, 0.7], "factor": 0.2},  # of none of four steps
    ],
    ids=str,
)
def test_two_adapters(sdxl, options):
    assert sdxl.psnr(**options) >= FLOOR


def test_the_control_picture_matters(sd15):
    def draw(**options):
        asked = {"control": sd15.pictures[0], **options}
        return np.asarray(sd15.ours("a star", seed=1, **asked)[0])

    own = draw()
    assert psnr_db(own, draw(control_weight=0.0)) < 35
    assert psnr_db(own, draw(control=outline((64, 64), seed=5))) < 35
    # A colour picture is read as the mean of its colours.
    grey = np.asarray(sd15.pictures[0].convert("RGB"))
    np.testing.assert_array_equal(own, draw(control=grey))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A bundle with a ControlNet, a light adapter from a file and an encoder of images; and their models."""
    folder = tmp_path_factory.mktemp("everything")
    base = factories.write_sd15(folder / "base", **factories.DEEP_SD15)
    net = factories.write_controlnet(base, folder / "net")
    options = {"channels": [32, 64], "num_res_blocks": 4, "adapter_type": "light_adapter"}
    adapter = factories.write_t2i_adapter(folder / "light", **options)
    spec = BuildSpec(
        str(base),
        no_lcm=True,
        few_step="lcm",
        backend="torchscript",
        controlnets=(ControlNetSpec(str(net)),),
        t2i_adapters=(T2IAdapterSpec(str(factories.write_original_t2i_adapter(adapter, folder / "a.pth"))),),
        image=True,
    )
    return build(spec, folder / "bundle"), base, net, adapter


def test_an_adapter_together_with_a_controlnet_and_an_image(everything):
    """diffusers has no pipeline of these, but a UNet that takes both."""
    bundle, base, net, adapter = everything
    pictures = [outline((64, 64), 1), outline((64, 64), 2)]
    theirs = StableDiffusionControlNetImg2ImgPipeline.from_pretrained(
        base, controlnet=ControlNetModel.from_pretrained(net), safety_checker=None
    )
    planes = torch.from_numpy(np.array(pictures[1])).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        features = [0.9 * one for one in T2IAdapter.from_pretrained(adapter)(planes)]
    plain, calls = theirs.unet.forward, []

    def guided(*inputs, **options):
        calls.append(1)
        on = len(calls) <= 3  # of five steps that are drawn, 0.75
        added = {"down_intrablock_additional_residuals": [torch.cat([one] * 2) for one in features]}
        return plain(*inputs, **options, **(added if on else {}))

    theirs.unet.forward = guided
    theirs.scheduler = SCHEDULERS["lcm"](theirs.scheduler.config)
    asked = {"guidance_scale": 2.0, "strength": 0.7, "image": painting()}
    drawn = theirs(
        "a red star",
        control_image=pictures[0],
        num_inference_steps=8,
        controlnet_conditioning_scale=0.7,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
        **asked,
    ).images
    assert len(calls) == 5
    numbers = {"control": pictures, "control_weight": [0.7, 0.9], "control_end": [1.0, 0.75]}
    with load(bundle) as ours:
        [picture] = ours("a red star", seed=7, steps=8, **asked, **numbers)
    assert psnr_db(eight_bits(drawn)[0], np.asarray(picture)) >= FLOOR


def test_run_tells_both_pictures(everything, command, refused, tmp_path):
    bundle = everything[0].folder
    for i in (1, 2):
        outline((64, 64), i).save(tmp_path / f"{i}.png")
    words = ["run", "a star", "--bundle", bundle, "--seed", 1, "--out"]
    asked = ["--control", tmp_path / "1.png", "--control", tmp_path / "2.png", "--control-weight", 0.7]
    code, out, err = command(*words, tmp_path / "a.png", *asked, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [one["file"] for one in told["control"]] == ["1.png", "2.png"]
    assert told["ms"]["t2i-adapter"] > 0
    assert command("run", "--again", tmp_path / "a.png", "--out", tmp_path / "b.png")[0] == 0
    assert Image.open(tmp_path / "b.png").tobytes() == Image.open(tmp_path / "a.png").tobytes()
    refused(2, "a ControlNet and a T2I-Adapter, which read", *words, tmp_path / "c.png", *asked[:2])
    code, out, _ = command("inspect", bundle, "--json")
    [adapter] = json.loads(out)["t2i_adapters"]
    assert adapter["source"].endswith("a.pth")
    refused(2, ["has a T2I-Adapter", "bench measures bundles without"], "bench", bundle)


def test_bad_options(sd15, refused, tmp_path):
    words = ["run", "a star", "--out", tmp_path / "a.png", "--bundle", sd15.folder]
    refused(2, ["a T2I-Adapter, which reads", "no control picture is given"], *words)
    with pytest.raises(UsageError, match="can't hold a T2I-Adapter"):
        BuildSpec("demo", whole_loop=True, t2i_adapters=(T2IAdapterSpec("x"),))
    with pytest.raises(UsageError, match="5 T2I-Adapters are given"):
        BuildSpec("demo", t2i_adapters=(T2IAdapterSpec("x"),) * 5)
    with pytest.raises(UsageError, match="weight 'strong'"):
        T2IAdapterSpec.parse("x:strong")
