"""The tiny autoencoder (TAESD) in the VAE's place: it draws with loss, and what diffusers draws with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import factories
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers_reference import FLOOR, Pair, reference
from factories import SMALL_TEXT, SMALL_UNET
from safetensors.torch import load_file

from lcm_compile import BuildSpec, build, load
from lcm_compile.benchmarks.measure.bench import contest, warnings
from lcm_compile.benchmarks.measure.report import Case, RivalSamples
from lcm_compile.benchmarks.measure.work import count_work
from lcm_compile.builder.plan import make_plan
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.load import load_component
from lcm_compile.checkpoint.open import open_base
from lcm_compile.errors import CheckpointError, UsageError
from lcm_compile.precisions import Precision
from lcm_compile.spec import Shape
from lcm_compile.stages.rewrites import Upsampling, rewrite_vae
from lcm_compile.stages.stage import Decode

LOSSY = "tiny autoencoder"
TORCHSCRIPT = ("--backend", "torchscript")


def tiny_vae(factor=8, seed=7):
    torch.manual_seed(seed)
    levels = {4: 3, 8: 4}[factor]
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(2,) * (levels - 1) + (1,),
    )
    return factories.lively(vae, 1.5)


def write_tiny(folder, factor=8, seed=7):
    """As the hub's folders are, whose config does not repeat the decoder's channels as the VAE's."""
    vae = tiny_vae(factor, seed)
    vae.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("block_out_channels", None)
    (folder / "config.json").write_text(json.dumps(config))
    return vae


def spec_of(base, vae, **more):
    return BuildSpec(base=str(base), no_lcm=True, few_step="lcm", vae=str(vae), **more)


@pytest.mark.parametrize(
    ("base", "factor", "size", "backend"),
    [("sdxl", 4, (64, 64), "torchscript"), ("sd15", 8, (136, 104), "onnxruntime")],
)
def test_pictures_are_those_of_diffusers_with_that_vae(request, tmp_path, base, factor, size, backend):
    checkpoint = request.getfixturevalue(f"{base}_checkpoint")
    vae = write_tiny(tmp_path / "vae", factor)
    height, width = size
    spec = spec_of(checkpoint, tmp_path / "vae", height=height, width=width, backend=backend)
    bundle = build(spec, tmp_path / "bundle")
    theirs = reference(checkpoint)
    own = theirs.vae
    theirs.vae = vae
    with load(bundle) as ours:
        pair = Pair(ours, theirs, height, width)
        assert min(pair.psnr(num_images=2)) >= FLOOR
        theirs.vae = own
        assert max(pair.psnr()) < 40


def test_without_rewrites_too(sd15_checkpoint, tmp_path):
    vae = write_tiny(tmp_path / "vae")
    without = ("context", "qkv", "upsampling", "lcm-step", "rgb8")
    spec = spec_of(sd15_checkpoint, tmp_path / "vae", backend="torchscript", without=without)
    theirs = reference(sd15_checkpoint)
    theirs.vae = vae
    with load(build(spec, tmp_path / "bundle")) as ours:
        assert min(Pair(ours, theirs, 64, 64).psnr()) >= FLOOR


@torch.no_grad()
def test_the_decoder_is_shaped_like_any_other():
    """Doubling and convolving becomes four small convolutions; what comes out is the same."""
    vae, latent = tiny_vae(), torch.randn(2, 4, 5, 3)
    expected = vae.decode(latent).sample
    rewrite_vae(vae, ["upsampling"])
    kinds = [type(layer) for layer in vae.decoder.layers]
    assert kinds.count(Upsampling) == 3 and torch.nn.Upsample not in kinds
    torch.testing.assert_close(vae.decode(latent).sample, expected, atol=1e-5, rtol=1e-5)
    picture = Decode(vae)(latent)
    torch.testing.assert_close(picture, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def test_its_loss_is_told(sd15_checkpoint, command, tmp_path):
    write_tiny(tmp_path / "vae")
    words = ("--base", sd15_checkpoint, "--no-lcm", "--vae", tmp_path / "vae", "--gpu", "cpu", *TORCHSCRIPT)
    assert LOSSY in command("build", *words, "--dry-run")[1]
    assert "decode" in json.loads(command("build", *words, "--dry-run", "--json")[1])["lossy"]
    code, _, err = command("build", *words, "--out", tmp_path / "b")
    assert code == 0 and err.count(LOSSY) == 1
    assert LOSSY in json.loads((tmp_path / "b/manifest.json").read_text())["lossy"]["decode"]
    assert LOSSY in command("inspect", tmp_path / "b")[1]
    draw = ("run", "a star", "--engine", tmp_path / "b", "--out", tmp_path / "star.png")
    assert command(*draw)[2].count(LOSSY) == 1
    assert command(*draw, "--quiet")[2] == ""
    lossy = read_manifest(tmp_path / "b")[0].lossy
    eager = {"eager": RivalSamples((3.0, 3.0))}
    told = str(
        warnings([Case("picture", (1.0, 1.0), eager, parity_db=12.0)], {"decode": Precision.FP32}, lossy)
    )
    assert LOSSY in told and "base changed" not in told  # it is not to be the picture of another VAE


def test_rivals_decode_with_the_bases_own_vae(sd15_checkpoint, tmp_path):
    write_tiny(tmp_path / "vae")
    bundle = build(spec_of(sd15_checkpoint, tmp_path / "vae", backend="torchscript"), tmp_path / "b")
    with contest(bundle, ["eager"]) as rivals:
        (folder, _) = rivals.drawers["eager"].args
        config = json.loads((folder / "vae" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL"


def test_loss_is_told_of_engines_built_from_an_export(sd15_checkpoint, command, tmp_path):
    write_tiny(tmp_path / "vae")
    words = ("--base", sd15_checkpoint, "--no-lcm", "--vae", tmp_path / "vae", "--precision", "fp32")
    assert command("export", *words, "--format", "torchscript", "--out", tmp_path / "graphs")[0] == 0
    built = ("--from", tmp_path / "graphs", "--gpu", "cpu", *TORCHSCRIPT, "--out", tmp_path / "b")
    code, _, err = command("build", *built)
    assert code == 0, err
    assert LOSSY in command("run", "--engine", tmp_path / "b", "--out", tmp_path / "a.png")[2]


def test_a_bundle_with_the_bases_own_vae_is_not_called_lossy(sd15_checkpoint, command, tmp_path):
    words = ("--base", sd15_checkpoint, "--no-lcm", "--gpu", "cpu", *TORCHSCRIPT)
    assert "lossy" not in "".join(command("build", *words, "--out", tmp_path / "b")[1:])
    assert "lossy" not in command("inspect", tmp_path / "b")[1]
    assert "lossy" not in command("run", "--engine", tmp_path / "b", "--out", tmp_path / "a.png")[2]


def test_the_key_changes_with_its_weights(sdxl_checkpoint, tmp_path):
    write_tiny(tmp_path / "one", 4, seed=1)
    write_tiny(tmp_path / "two", 4, seed=2)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    one, two, copy = (make_plan(spec_of(sdxl_checkpoint, tmp_path / n)).key for n in ("one", "two", "copy"))
    assert one == copy
    assert {k for k in one if one[k] != two[k]} == {"base vae/diffusion_pytorch_model.safetensors"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub cache with both published tiny autoencoders, random, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folders = {}
    for seed, name in enumerate(("taesd", "taesdxl")):
        repository = tmp_path / f"hub/models--madebyollin--{name}"
        folders[name] = repository / "snapshots" / ("b" * 40)
        write_tiny(folders[name], seed=seed)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("b" * 40)
    return folders


def scaled(checkpoint, folder, scaling):
    """A copy of a checkpoint whose VAE scales its latents by another number."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": scaling}))
    return folder


@pytest.fixture
def bases(sd15_checkpoint, tmp_path):
    """SD1.5 as it is, and of SDXL's latents."""
    one, two = (scaled(sd15_checkpoint, tmp_path / n, s) for n, s in (("sd", 0.18215), ("xl", 0.13025)))
    return {"taesd": one, "taesdxl": two}


@pytest.mark.parametrize("name", ["taesd", "taesdxl"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_published_one_is_that_of_the_bases_latents(bases, hub, name, precision):
    for vae in ("taesd", f"madebyollin/{name}"):
        checkpoint = make_plan(spec_of(bases[name], vae, precision=precision)).export.checkpoint
        assert checkpoint.components["vae"].folder == hub[name]


def test_the_other_ones_is_refused(bases, hub, refused):
    words = ("build", "--gpu", "cpu", "--no-lcm", "--base", bases["taesd"], "--vae", "madebyollin/taesdxl")
    refused(1, "--vae taesd", *words)


def test_a_base_of_latents_that_none_is_known_for(refused):
    words = ("build", "--base", "demo", "--gpu", "cpu", "--vae", "taesd")
    refused(2, ["no tiny autoencoder", "demo", "AutoencoderTiny", "folder"], *words)


def test_a_base_that_normalises_its_latents_has_none(sd15_checkpoint, tmp_path):
    """As Playground 2.5 does with SDXL's VAE."""
    base = scaled(sd15_checkpoint, tmp_path / "base", 0.13025)
    config = json.loads((base / "vae/config.json").read_text())
    config |= {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    (base / "vae/config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="no tiny autoencoder is known"):
        open_base(spec_of(base, "taesd"), half=False)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: write_tiny(folder, factor=4), "4 pixels a side"),
        (lambda folder: tiny_vae().save_pretrained(folder), "config.json"),
    ],
    ids=["another size", "its file alone"],
)
def test_a_tiny_one_that_can_not_be(refused, sd15_checkpoint, tmp_path, make, told):
    make(tmp_path / "vae")
    vae = tmp_path / "vae"
    if told == "config.json":
        vae = vae / "diffusion_pytorch_model.safetensors"
    refused(1, told, "build", "--base", sd15_checkpoint, "--gpu", "cpu", "--no-lcm", "--vae", vae)


def test_fused_into_a_folder_it_is_diffusers_own(sd15_checkpoint, command, tmp_path):
    vae = write_tiny(tmp_path / "vae")
    words = ("fuse", "--base", sd15_checkpoint, "--no-lcm", "--vae", tmp_path / "vae", "--precision", "fp32")
    assert command(*words, "--out", tmp_path / "fused")[0] == 0
    theirs = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert isinstance(theirs.vae, AutoencoderTiny)
    stored = load_file(tmp_path / "fused/vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, stored[key]) for key, weight in vae.state_dict().items())
    # That folder is a base like any other, and its bundle is called lossy too.
    bundle = build(
        BuildSpec(str(tmp_path / "fused"), no_lcm=True, few_step="lcm", backend="torchscript"),
        tmp_path / "bundle",
    )
    assert bundle.manifest.lossy
    with load(bundle) as ours:
        assert min(Pair(ours, reference(tmp_path / "fused"), 64, 64).psnr()) >= FLOOR


def test_one_file_has_no_place_for_it(sd15_checkpoint, refused, tmp_path):
    write_tiny(tmp_path / "vae")
    words = ("fuse", "--base", sd15_checkpoint, "--no-lcm", "--vae", tmp_path / "vae")
    refused(2, ["tiny autoencoder", "folder"], *words, "--out", tmp_path / "fused.safetensors")
    assert not (tmp_path / "fused.safetensors").exists()


def test_nothing_is_trained_through_it(sd15_checkpoint, tmp_path):
    from lcm_compile.training.encode import open_vae

    write_tiny(tmp_path / "vae")
    with pytest.raises(CheckpointError, match=LOSSY):
        open_vae(open_base(spec_of(sd15_checkpoint, tmp_path / "vae"), half=False), torch.device("cpu"))


@pytest.fixture
def random_base(monkeypatch):
    """`sd15` with a small UNet and text encoder; the published tiny autoencoder is small as it is."""
    changed = {"unet": SMALL_UNET, "text_encoder": SMALL_TEXT}
    row = FAMILIES["sd15"]
    models = {name: {**config, **changed.get(name, {})} for name, config in row.models.items()}
    monkeypatch.setitem(FAMILIES, "sd15", replace(row, models=models))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return BuildSpec("sd15", weights="random", vae="taesd", backend="torchscript")


def test_random_weights_take_its_architecture(random_base):
    checkpoint = make_plan(random_base).export.checkpoint
    assert checkpoint.lossy and checkpoint.vae_factor == 8
    vae, again = (load_component(checkpoint, "vae") for _ in "ab")
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in vae.state_dict().items())
    picture = Decode(vae)(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert picture.shape == (1, 64, 64, 3) and picture.std() > 0.1
    own = make_plan(replace(random_base, vae=None))
    assert own.key != make_plan(random_base).key and not own.export.checkpoint.lossy


@pytest.mark.slow
def test_random_weights_are_built_and_draw(random_base, tmp_path):
    bundle = build(random_base, tmp_path / "bundle")
    assert bundle.manifest.lossy and make_plan(random_base, tmp_path / "bundle").hit
    assert {name for name, figure in bundle.manifest.parity.items() if figure.passed} >= {"decode", "picture"}
    with load(bundle) as ours:
        picture = ours("a star", seed=1)[0]
    assert picture.size == (64, 64) and len(set(picture.convert("L").getdata())) > 50


def test_its_work_is_counted(random_base):
    """The published decoder has 1,222,531 weights, and nothing but 3×3 convolutions."""
    work = count_work(open_base(random_base, half=True), Shape(1, 64, 64))["decode"]
    assert work.weights == 1_222_531
    inside, sides = 64 * 64, [8, 16, 32, 64]
    blocks = sum(3 * n * inside * side**2 for n, side in zip((3, 3, 3, 1), sides, strict=True))
    upsamplings = sum(inside * side**2 for side in sides[1:])
    ends = 4 * 64 * 8**2 + 64 * 3 * 64**2
    assert work.flop == 2 * 9 * (blocks + upsamplings + ends)
