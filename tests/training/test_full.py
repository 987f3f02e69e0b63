"""Distillation of a whole UNet: its loss with a guidance embedding, and the checkpoint it writes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from references import in_numpy, reference_step
from runs import PIPELINES, losses_of, settings_for

from lcm_compile import BuildSpec, build, load
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db
from lcm_compile.training import distill
from lcm_compile.training.full import student_of
from lcm_compile.training.state import state_path

FLOOR = 65.0


def diffusers_embedding(w: torch.Tensor) -> torch.Tensor:
    return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)


@pytest.mark.parametrize(("kind", "prediction"), [("sdxl", "epsilon"), ("v", "v_prediction")])
def test_a_step_is_the_papers(kind, prediction, bases, tmp_path):
    """The second step's loss, with the weights that were kept after the first."""
    spec = settings_for(bases[kind], steps=2, full=True, lr=1e-2, save_every=1)
    steps = distill.distill(spec, tmp_path / "lcm")
    next(steps)
    state = torch.load(state_path(tmp_path / "lcm"), weights_only=True)
    loss = next(steps).loss

    pipe = PIPELINES["sdxl" if kind == "sdxl" else "sd15"].from_pretrained(bases[kind])

    def unet(weights):
        model = UNet2DConditionModel.from_config({**pipe.unet.config, "time_cond_proj_dim": 256})
        model.load_state_dict(weights)
        return model

    student, target = unet(state["weights"]), unet(state["means"]["target"])

    def networks(w):
        told = diffusers_embedding(w[None])[0]
        return in_numpy(student, told), in_numpy(target, told), in_numpy(pipe.unet)

    assert loss == pytest.approx(reference_step(pipe, spec, range(2, 4), networks, prediction), rel=1e-3)
    assert state["weights"]["time_embedding.cond_proj.weight"].any()  # it has learnt from the guidance


def test_the_student_starts_as_the_teacher(bases):
    teacher = load_component(open_checkpoint(str(bases["sdxl"])), "unet")
    student = student_of(teacher)
    added = {"text_embeds": torch.randn(2, 40), "time_ids": torch.ones(2, 6)}
    inputs = torch.randn(2, 4, 16, 16), 499, torch.randn(2, 77, 80)
    with torch.no_grad():
        told = diffusers_embedding(torch.tensor([0.0, 14.0]))
        ours = student(*inputs, timestep_cond=told, added_cond_kwargs=added).sample
        torch.testing.assert_close(ours, teacher(*inputs, added_cond_kwargs=added).sample, rtol=0, atol=0)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.fixture(scope="module")
def lcm(bases, tmp_path_factory):
    """A whole LCM that knows its guidance, of an SD1.5 whose weights are an fp16 variant."""
    folder = tmp_path_factory.mktemp("full")
    base = shutil.copytree(bases["sd15"], folder / "base")
    for path in [*base.glob("*/model.safetensors"), base / "vae" / "diffusion_pytorch_model.safetensors"]:
        path.rename(path.with_suffix(".fp16.safetensors"))
    out = folder / "lcm"
    losses_of(settings_for(base, full=True, lr=0.02), out)
    assert sorted(path.name for path in folder.iterdir()) == ["base", "lcm"]
    return out


def test_diffusers_draws_the_same_picture(lcm, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(lcm)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert UNet2DConditionModel.from_pretrained(lcm / "unet").config.time_cond_proj_dim == 256
    spec = BuildSpec(base=str(lcm), no_lcm=True, few_step="lcm", backend="torchscript")
    with load(build(spec, tmp_path / "bundle")) as ours:
        pictures = {}
        for scale in (1.0, 9.0):
            request = Request("a large red star", 7, guidance_scale=scale)
            pictures[scale] = ours.draw(request).pictures[0]
            theirs = pipe(
                "a large red star",
                num_inference_steps=4,
                guidance_scale=scale,
                generator=torch.Generator("cpu").manual_seed(7),
                output_type="np",
            ).images[0]
            assert psnr_db(eight_bits(theirs), pictures[scale]) >= FLOOR
    assert psnr_db(pictures[1.0], pictures[9.0]) < FLOOR - 5  # it has learnt to listen


def test_the_rest_is_the_bases(lcm, bases):
    for name in ("text_encoder", "vae"):
        old, new = (load_component(open_checkpoint(str(b)), name) for b in (bases["sd15"], lcm))
        assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    index = json.loads((lcm / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    told = "".join(path.read_text() for path in lcm.rglob("*config.json"))
    assert str(lcm.parent) not in told


def test_the_folder_must_be_new(bases, lcm):
    with pytest.raises(UsageError, match="exists"):
        distill.distill(settings_for(bases["sd15"], full=True), lcm)
