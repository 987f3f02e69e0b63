"""Full LCMs, which read the guidance scale: their default scale, and what a negative prompt does there."""

from __future__ import annotations

from types import SimpleNamespace

import factories
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from diffusers_reference import FLOOR, reference
from PIL import Image

from lcm_compile import BuildSpec, build, load
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.proof.parity import psnr_db


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def full_lcm(request, tmp_path_factory):
    """A bundle of a full LCM, and the pipeline in which diffusers draws with it."""
    folder = tmp_path_factory.mktemp("full")
    if request.param == "sdxl":
        base = factories.write_sdxl(folder / "base", time_cond_proj_dim=16)
        theirs = reference(base)
    else:
        base = factories.write_sd15(folder / "base", time_cond_proj_dim=16)
        theirs = LatentConsistencyModelPipeline(**reference(base).components, requires_safety_checker=False)
    return SimpleNamespace(bundle=build(BuildSpec(str(base)), folder / "bundle").folder, theirs=theirs)


def test_the_default_guidance_is_that_of_diffusers_pipeline(full_lcm, command, tmp_path):
    seeded = torch.Generator("cpu").manual_seed(7)
    theirs = full_lcm.theirs("a star", num_inference_steps=4, generator=seeded, output_type="np").images
    with load(full_lcm.bundle) as pipeline:
        ours = pipeline("a star", seed=7)[0]
        assert psnr_db(eight_bits(theirs)[0], np.asarray(ours)) >= FLOOR
        assert psnr_db(np.asarray(ours), np.asarray(pipeline("a star", seed=7, guidance_scale=1)[0])) < 50
    out = tmp_path / "a.png"
    words = ["run", "a star", "--bundle", full_lcm.bundle, "--seed", 7, "--out", out]
    _, _, err = command(*words)
    assert "hint" not in err and Image.open(out).tobytes() == ours.tobytes()
    _, _, err = command(*words, "--negative-prompt", "blue")
    assert err.count("hint") == 1 and "--negative-prompt does nothing" in err
    assert Image.open(out).tobytes() == ours.tobytes()
