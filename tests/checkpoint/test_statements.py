"""What a one-file checkpoint says of itself holds, and `fuse` writes files that say it."""

from __future__ import annotations

import json

import factories
import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from diffusers_reference import FLOOR
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcm_compile import BuildSpec, build, load
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.errors import CheckpointError
from lcm_compile.lora.fuse import fuse
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.proof.parity import psnr_db

EMPTY = torch.zeros(0)
SPEC = "modelspec.prediction_type"
V, EPSILON = "v_prediction", "epsilon"


@pytest.fixture(scope="module")
def original(sdxl_checkpoint, tmp_path_factory):
    """SDXL's architecture as one file; its tensors."""
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint)
    return load_file(factories.write_original(pipe, tmp_path_factory.mktemp("original") / "a.safetensors"))


def config_saying(base, to, **scheduler):
    """A folder with a base's settings alone, and others of its scheduler."""
    for path in [p for p in base.rglob("*") if p.suffix in (".json", ".txt")]:
        copy = to / path.relative_to(base)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    path = to / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return to


@pytest.mark.parametrize(
    ("marks", "metadata", "config", "prediction", "zero_snr", "notes"),
    [
        ({"v_pred": EMPTY}, {}, {}, V, False, ["prediction_type is v_prediction, and"]),
        (
            {"v_pred": torch.zeros(()), "ztsnr": torch.zeros(())},
            {},
            {},
            V,
            True,
            ["is v_prediction", "zero_snr is True"],
        ),
        *(
            ({}, {SPEC: name}, {}, V, False, ["is v_prediction"])
            for name in ("v", "V", "v_prediction", "v-prediction", "vpred")
        ),
        ({}, {"modelspec.predict_key": "v"}, {}, V, False, ["is v_prediction"]),
        ({"ztsnr": EMPTY}, {SPEC: "v"}, {}, V, True, ["is v_prediction", "zero_snr is True"]),
        ({"ztsnr": EMPTY}, {}, {"prediction_type": V}, V, True, ["zero_snr is True"]),
        ({"v_pred": EMPTY}, {SPEC: "epsilon"}, {}, V, False, ["the key holds", "is v_prediction"]),
        (
            {},
            {SPEC: "epsilon"},
            {"prediction_type": V, "rescale_betas_zero_snr": True},
            EPSILON,
            False,
            ["is epsilon", "zero_snr is False"],
        ),
        ({"v_pred": EMPTY}, {}, {"prediction_type": V}, V, False, []),
        ({}, {}, {"prediction_type": V, "rescale_betas_zero_snr": True}, V, True, []),
        ({}, {}, {}, EPSILON, False, []),
    ],
)
def test_the_file_holds_against_its_config(
    sdxl_checkpoint, original, tmp_path, marks, metadata, config, prediction, zero_snr, notes
):
    file = tmp_path / "model.safetensors"
    save_file(original | marks, file, metadata)
    opened = open_checkpoint(str(file), str(config_saying(sdxl_checkpoint, tmp_path / "config", **config)))
    assert opened.scheduler.prediction_type == prediction
    assert opened.scheduler.rescale_betas_zero_snr is zero_snr
    assert ("ztsnr" in marks) == (opened.scheduler_config["timestep_spacing"] == "trailing")
    assert len(opened.notes) == len(notes)
    assert all(told in note for told, note in zip(notes, opened.notes, strict=True))


def test_it_holds_against_the_demos_settings(command, tmp_path):
    pipe = StableDiffusionXLPipeline.from_pretrained(FAMILIES["demo"].base, torch_dtype=torch.float32)
    file = factories.write_original(pipe, tmp_path / "demo.safetensors", v_pred=EMPTY)
    opened = open_checkpoint(str(file))
    assert (opened.family.name, opened.scheduler.prediction_type) == ("demo", V)
    for words in (("build", "--gpu", "cpu", "--dry-run"), ("fuse", "--out", tmp_path / "fused")):
        err = command(*words, "--base", file, "--no-lcm")[2]
        assert "demo.safetensors says that its prediction_type is v_prediction" in err.replace("\n  ", " ")


def test_zero_snr_of_a_file_that_predicts_noise_is_refused(sdxl_checkpoint, original, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(original | {"ztsnr": EMPTY}, file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors, .*zero SNR"):
        open_checkpoint(str(file), str(sdxl_checkpoint))


def test_the_picture_is_diffusers_with_what_the_file_says(sdxl_checkpoint, original, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(original | {"v_pred": EMPTY, "ztsnr": EMPTY}, file)
    spec = BuildSpec(
        base=str(file), config=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="torchscript"
    )
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_checkpoint)
    zero = {"prediction_type": V, "rescale_betas_zero_snr": True}
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, **zero)
    pipe.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(3)
    words = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np", "generator": seeded}
    theirs = pipe("a large red star", height=64, width=64, **words).images
    with load(build(spec, tmp_path / "bundle")) as pipeline:
        ours = np.asarray(pipeline("a large red star", seed=3)[0])
    assert psnr_db(eight_bits(theirs)[0], ours) >= FLOOR


# A file with zero SNR is drawn with trailing timesteps, as other programs do.
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("scheduler", "marks"),
    [
        ({"prediction_type": V, **ZERO_SNR}, {"v_pred", "ztsnr"}),
        ({"prediction_type": V}, {"v_pred"}),
        ({}, set()),
    ],
)
def test_fuse_writes_the_marks_that_other_programs_read(sdxl_checkpoint, tmp_path, scheduler, marks):
    base = factories.write_sdxl(tmp_path / "base")
    path = base / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    fuse(BuildSpec(base=str(base), no_lcm=True, few_step="lcm"), tmp_path / "one.safetensors", "fp16")
    with safe_open(tmp_path / "one.safetensors", "pt") as handle:
        assert {key for key in ("v_pred", "ztsnr") if key in handle.keys()} == marks  # noqa: SIM118
        assert handle.metadata()[SPEC] == ("v" if marks else "epsilon")
    opened = open_checkpoint(str(tmp_path / "one.safetensors"), str(sdxl_checkpoint))
    assert opened.scheduler == open_checkpoint(str(base)).scheduler


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def full_lcm(request, tmp_path_factory):
    """A full LCM as a folder, and as the file that `fuse` writes of it."""
    folder = tmp_path_factory.mktemp("full")
    write = {"sdxl": factories.write_sdxl, "sd15": factories.write_sd15}[request.param]
    base = write(folder / "base", time_cond_proj_dim=16)
    fuse(BuildSpec(base=str(base)), folder / "one.safetensors", "fp32")
    return request.param, base, folder / "one.safetensors"


def test_a_full_lcm_as_one_file_keeps_how_it_reads_guidance(full_lcm):
    _, base, file = full_lcm
    key = "model.diffusion_model.time_embed.cond_proj.weight"
    weight = load_file(base / "unet/diffusion_pytorch_model.safetensors")["time_embedding.cond_proj.weight"]
    assert torch.equal(load_file(file)[key], weight)
    opened = open_checkpoint(str(file), str(base))
    assert opened.has_guidance_embedding and not opened.notes
    own = load_component(open_checkpoint(str(base)), "unet").state_dict()
    read = load_component(opened, "unet").state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)


def test_a_full_lcm_as_one_file_holds_against_a_config_of_another(full_lcm, sdxl_checkpoint, sd15_checkpoint):
    kind, base, file = full_lcm
    config = {"sdxl": sdxl_checkpoint, "sd15": sd15_checkpoint}[kind]
    opened = open_checkpoint(str(file), str(config))
    assert opened.unet["time_cond_proj_dim"] == 16
    assert len(opened.notes) == 1 and "time_cond_proj_dim is 16, and" in opened.notes[0]
    own, read = (load_component(each, "unet").state_dict() for each in (open_checkpoint(str(base)), opened))
    assert all(torch.equal(own[name], read[name]) for name in own)


def test_no_lcm_lora_is_fused_on_a_full_lcm_in_one_file(command, full_lcm):
    _, base, file = full_lcm
    words = ("build", "--base", file, "--config", base, "--gpu", "cpu", "--dry-run", "--json")
    code, out, err = command(*words)
    assert code == 0, err
    assert json.loads(out)["loras"] == []
