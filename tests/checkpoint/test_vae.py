"""Another VAE in the base's place: from wherever it is, in the key, and by default where fp16 asks for it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from factories import write_vae
from safetensors.torch import save_file

from lcm_compile import BuildSpec, build
from lcm_compile.builder.plan import make_plan
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.load import load_component
from lcm_compile.checkpoint.vae import download_vae
from lcm_compile.checkpoint.write_single_file import original_weights

FP16_VAE = FAMILIES["sdxl"].fp16_vae


def base_of(checkpoint, vae, **more):
    return BuildSpec(base=str(checkpoint), no_lcm=True, few_step="lcm", vae=vae and str(vae), **more)


@pytest.mark.parametrize(
    "form", ["folder", "subfolder", "diffusers file", "original file", "checkpoint file"]
)
def test_a_vae_of_any_form_is_taken(sdxl_checkpoint, tmp_path, form):
    folder = tmp_path / ("base/vae" if form == "subfolder" else "vae")
    vae = write_vae(folder)
    path = tmp_path / "base" if form == "subfolder" else folder
    if form.endswith("file"):
        tensors = vae.state_dict()
        if not form.startswith("diffusers"):
            tensors = dict(original_weights("vae", vae.config, True, vae))
        if form == "original file":
            tensors = {key.removeprefix("first_stage_model."): value for key, value in tensors.items()}
            tensors["loss.discriminator.main.0.weight"] = torch.ones(2, 2)
        path = tmp_path / "vae.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    plan, own = make_plan(base_of(sdxl_checkpoint, path)), make_plan(base_of(sdxl_checkpoint, None))
    found = load_component(plan.export.checkpoint, "vae")
    assert all(torch.equal(w, found.state_dict()[key]) for key, w in vae.state_dict().items())
    assert found.config.scaling_factor == vae.config.scaling_factor
    changed = {key for key in plan.key.keys() | own.key.keys() if plan.key.get(key) != own.key.get(key)}
    assert changed and all("vae" in key or key == "base configs" for key in changed)


def test_it_is_in_the_pictures_the_manifest_and_the_command(sdxl_checkpoint, tmp_path):
    write_vae(tmp_path / "vae")
    spec = base_of(sdxl_checkpoint, tmp_path / "vae", backend="torchscript")
    bundle = build(spec, tmp_path / "bundle")
    assert bundle.manifest.spec == spec and f"--vae {tmp_path / 'vae'}" in bundle.manifest.spec.command()
    assert make_plan(spec, tmp_path / "bundle").hit
    missed = make_plan(replace(spec, vae=None), tmp_path / "bundle")
    assert not missed.hit and "base vae/diffusion_pytorch_model.safetensors changed" in str(missed.reasons)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: write_vae(folder, factor=8), "for another base"),
        (lambda folder: write_vae(folder, scaling_factor=0.18215), "scaled by 0.18215"),
        (lambda folder: folder.mkdir(), "config.json is missing"),
        (lambda folder: save_file({"unet": torch.ones(1)}, folder), "has no VAE"),
    ],
)
def test_a_vae_that_can_not_be(refused, sdxl_checkpoint, tmp_path, make, told):
    make(tmp_path / "vae")
    words = ("build", "--base", sdxl_checkpoint, "--gpu", "cpu", "--no-lcm", "--vae", tmp_path / "vae")
    refused(1, told, *words)


def test_a_vae_that_is_not_there(refused, sdxl_checkpoint):
    words = ("build", "--base", sdxl_checkpoint, "--gpu", "cpu", "--no-lcm", "--vae", "./nothing")
    refused(2, "./nothing does not exist", *words)


@pytest.fixture
def passes_for_sdxl(sdxl_checkpoint, tmp_path, monkeypatch):
    """A base of SDXL's family; a hub cache of its own, and a hub that can't be had."""
    monkeypatch.setitem(FAMILIES, "sdxl", replace(FAMILIES["sdxl"], signature={"cross_attention_dim": 80}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr("lcm_compile.checkpoint.vae.fetch", no_hub)
    download_vae.cache_clear()
    return sdxl_checkpoint


def no_hub(*_):
    raise ConnectionError("no network")


@pytest.fixture
def plan(command, passes_for_sdxl):
    """A dry run; its JSON and its notes."""

    def run(*words, precision="fp16"):
        base = ("--base", passes_for_sdxl, "--no-lcm", "--gpu", "cpu", "--precision", precision)
        code, out, err = command("build", *base, *words, "--dry-run", "--json")
        assert code == 0, err
        return json.loads(out), err

    return run


def cache_fp16_vae(home):
    repository = home / "hub" / f"models--{FP16_VAE.replace('/', '--')}"
    write_vae(repository / "snapshots" / ("b" * 40), force_upcast=False)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("b" * 40)
    return str(repository / "snapshots" / ("b" * 40))


def test_sdxls_own_vae_makes_room_for_the_fixed_one_in_fp16(plan, sdxl_checkpoint, tmp_path):
    own = str(sdxl_checkpoint / "vae")
    found, told = plan()
    assert found["vae"] == own
    assert "overflows fp16" in told and FP16_VAE in told and "can't be downloaded" in told
    fixed = cache_fp16_vae(tmp_path / "hf")
    found, told = plan()
    assert found["vae"] == fixed and f"overflows fp16: {FP16_VAE}" in told
    assert plan("--quiet")[1] == ""
    assert plan(precision="fp32") == ({**plan(precision="fp32")[0], "vae": own}, "")
    found, told = plan("--vae", str(sdxl_checkpoint))
    assert (found["vae"], told) == (own, "")


def test_a_hit_does_not_ask_the_hub_for_it(passes_for_sdxl, tmp_path, monkeypatch):
    """A bundle that was built with the base's own VAE stays a hit."""
    spec = base_of(passes_for_sdxl, None, precision="fp16", backend="torchscript", height=16, width=16)
    build(spec, tmp_path / "bundle")
    monkeypatch.setattr("lcm_compile.checkpoint.open.download_vae", pytest.fail)
    assert make_plan(spec, tmp_path / "bundle").hit
