"""Pictures that an IP-Adapter's picture guides, against diffusers' pipelines with the same files."""

from __future__ import annotations

from dataclasses import dataclass

import factories
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers_reference import SCHEDULERS

from lcm_compile import BuildSpec, build, load
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import IpAdapterSpec

FLOOR = 60  # dB
PHOTO = factories.painting(80, 56)


@dataclass
class Pair:
    """Our pipeline of a bundle with an IP-Adapter of the weight 0.7, and diffusers'."""

    ours: Pipeline
    theirs: DiffusionPipeline
    folder: str

    def psnr(self, sampler="lcm", steps=4, scale=1.0, weight=0.7, **options):
        """The least PSNR of two pictures."""
        self.theirs.scheduler = SCHEDULERS[sampler](self.theirs.scheduler.config)
        self.theirs.set_ip_adapter_scale(weight)
        drawn = self.theirs(
            "a red star",
            ip_adapter_image=PHOTO,
            num_inference_steps=steps,
            guidance_scale=scale,
            num_images_per_prompt=2,
            height=64,
            width=64,
            generator=torch.Generator("cpu").manual_seed(7),
            output_type="np",
            **options,
        ).images
        mine = self.ours(
            "a red star",
            seed=7,
            num_images=2,
            sampler=sampler,
            steps=steps,
            guidance_scale=scale,
            ip_image=PHOTO,
            ip_weight=None if weight == 0.7 else weight,
            **options,
        )
        theirs = eight_bits(drawn)
        assert theirs.std() > 5
        return min(psnr_db(a, np.asarray(b)) for a, b in zip(theirs, mine, strict=True))


KINDS = {
    "sd15 base": {"backend": "onnxruntime"},
    "sd15 plus": {"backend": "torchscript", "without": ("context",)},
    "sdxl base": {"backend": "openvino"},
    "sdxl plus": {"backend": "onnxruntime", "batch": 2},
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, sd15_checkpoint, sdxl_checkpoint, tmp_path_factory):
    family, kind = request.param.split()
    folder = tmp_path_factory.mktemp(f"{family}-{kind}")
    base = {"sd15": sd15_checkpoint, "sdxl": sdxl_checkpoint}[family]
    base = factories.with_scheduler(base, folder / "base", clip_sample=False)
    adapter = factories.write_ip_adapter(base, folder / "ip/models/ip-adapter.safetensors", kind)
    factories.write_image_encoder(folder / "ip/models/image_encoder")
    spec = BuildSpec(
        str(base),
        no_lcm=True,
        few_step="lcm",
        ip_adapter=IpAdapterSpec(str(adapter), 0.7),
        **KINDS[request.param],
    )
    bundle = build(spec, folder / "bundle")
    theirs = DiffusionPipeline.from_pretrained(base)
    theirs.load_ip_adapter(str(folder / "ip"), subfolder="models", weight_name=adapter.name)
    theirs.set_progress_bar_config(disable=True)
    with load(bundle) as ours:
        yield Pair(ours, theirs, bundle.folder)


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
def test_pictures_are_those_of_diffusers(pair, options):
    assert pair.psnr(**options) >= FLOOR
