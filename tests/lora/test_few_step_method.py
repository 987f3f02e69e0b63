"""Which few-step method a LoRA is of: by its content, its metadata, its name and its modules."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from factories import load_modules
from safetensors.torch import save_file

from lcm_compile.checkpoint.families import DEMO_STYLE, FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.original_unet_names import original_name, original_names
from lcm_compile.lora import few_step_method as methods
from lcm_compile.lora.read import read_lora
from lcm_compile.training.adapters import ADAPTED

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def unet(sd15_checkpoint):
    return load_modules(open_checkpoint(str(sd15_checkpoint))).unet


def write(path, unet, layout="kohya", modules=ADAPTED, rank=64, **metadata):
    """A LoRA of a UNet's modules as the published files are: `kohya` with α, or with the original names
    (`original`); `peft`, whose keys are those of a saved PEFT model."""
    originals = original_names(unet)
    tensors = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(modules):
            out, into, *kernel = layer.weight.shape
            if layout == "peft":
                key, down, up = f"base_model.model.{name}", "lora_A", "lora_B"
            else:
                name = original_name(name, originals) if layout == "original" else name
                key, down, up = f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up"
                tensors[f"{key}.alpha"] = torch.tensor(8.0).half()
            tensors[f"{key}.{down}.weight"] = torch.ones(rank, into, *kernel).half()
            tensors[f"{key}.{up}.weight"] = torch.ones(out, rank, *(1 for _ in kernel)).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


@pytest.fixture(scope="module")
def style(unet, tmp_path_factory):
    """A file with the modules and the rank that styles usually have, to be copied under other names."""
    return write(tmp_path_factory.mktemp("style") / "style.safetensors", unet, modules=ATTENTION, rank=8)


@pytest.fixture(scope="module")
def distilled(unet, tmp_path_factory):
    """A file with the modules and the rank of most published files, to be copied under other names."""
    return write(tmp_path_factory.mktemp("distilled") / "x.safetensors", unet)


def told(path):
    """(method, variant, sureness) of a file, or None."""
    found = methods.few_step_method(read_lora(path), hashlib.sha256(path.read_bytes()).hexdigest())
    return found and (found.method, found.variant, found.sure, found.unsupported)


def told_of(file, name, folder):
    """What is told of a copy of a file under a name."""
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, path)
    return told(path)


NAMES = {
    "lcm-lora-sdv1-5": ("lcm", None),
    "lcm-lora-sdv1-5/pytorch_lora_weights": ("lcm", None),
    "lcm-lora-ssd-1b/pytorch_lora_weights": ("lcm", None),
    "LCM_LoRA_Weights_SD15": ("lcm", None),
    "sdxl_lcm_lora": ("lcm", None),
    "dmd2_sdxl_4step_lora": ("dmd2", None),
    "dmd2_sdxl_4step_lora_fp16": ("dmd2", None),
    "TA-Animagine-DMD2_lora": ("dmd2", None),
    "sdxl_lightning_2step_lora": ("lightning", "2"),
    "sdxl_lightning_4step_lora": ("lightning", "4"),
    "sdxl_lightning_8step_lora_rank1": ("lightning", "8"),
    "SDXL Lightning LoRA 8-Step (v1)": ("lightning", "8"),
    "Hyper-SD15-1step-lora": ("hyper", "1"),
    "Hyper-SDXL-2steps-lora": ("hyper", "2"),
    "Hyper-SD15-4steps-lora": ("hyper", "4"),
    "Hyper-SDXL-8steps-lora": ("hyper", "8"),
    "Hyper-SD15-8steps-CFG-lora": ("hyper", "8-cfg"),
    "Hyper-SDXL-12steps-CFG-lora": ("hyper", "12-cfg"),
    "sdxl_hyper_sd_8step_cfg_lora": ("hyper", "8-cfg"),
    "TCD-SDXL-LoRA/pytorch_lora_weights": ("tcd", None),
    "TCD-SD15-LoRA": ("tcd", None),
    "pcm_sd15_smallcfg_2step_converted": ("pcm", "2"),
    "pcm_sdxl_smallcfg_16step_converted": ("pcm", "16"),
    "pcm_sdxl_normalcfg_4step_converted_fp16": ("pcm", "4-cfg"),
    "pcm_sd15_lcmlike_lora_converted": ("pcm", "lcm"),
    "flash-sd/pytorch_lora_weights": ("flash", None),
    "flash-sdxl/adapter_model": ("flash", None),
    "FlashSDXL": ("flash", None),
    "sd_xl_turbo_lora_v1-64dim": ("turbo", None),
    "Hyper-SD 32dim 8 steps": ("hyper", "8"),
    "lcm-lora-wanda": ("lcm", None),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_published_file(style, tmp_path, name):
    """The layout does not matter: people extract and resize these files."""
    assert told_of(style, name, tmp_path) == (*NAMES[name], "likely", None)


OTHER_NAMES = (
    *("watercolour_sd15", "style_rank64", "sdxl_16dim_v2", "turbo_lcm", "turbo_lcm_lora"),
    *("lightning_storm_style", "sdxl_lightning_storm_style", "hyperrealistic_4steps", "hyper_detailed"),
    *(
        "flash_photography",
        "turbocharged",
        "lightning_1500steps",
        "dmd2_lightning_4step",
        "dmd2_turbo",
        "calcmap",
        "sd35",
    ),
    *("sdxl_lightning_4step_lora/style", "lcm/watercolour"),
)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_tell_nothing(style, tmp_path, name):
    """Words of every day, numbers of other things, mixtures of two methods, folders of files with names."""
    assert told_of(style, name, tmp_path) is None


def test_steps_that_a_method_does_not_have(style, tmp_path):
    assert told_of(style, "sdxl_lightning_10step_lora", tmp_path) == ("lightning", None, "likely", None)
    assert told_of(style, "SDXL-Lightning", tmp_path) == ("lightning", None, "likely", None)
    assert told_of(style, "Hyper-SD15-16steps-CFG-lora", tmp_path) == ("hyper", None, "likely", None)


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "sdxl-flash-lora": "sd-community",
        "AnimateLCM_sd15_t2v_lora": "AnimateLCM",
        "sdxl_tdd_lora_weights": "TDD",
        "Hyper-FLUX.1-dev-8steps-lora": "hyper",
        "Hyper-SD3-8steps-CFG-lora": "hyper",
        "Hyper-SD3.5-8steps-lora": "hyper",
        "flash-sd3/pytorch_lora_weights": "flash",
        "FLUX.1-Turbo-Alpha/diffusion_pytorch_model": "FLUX",
        "Qwen-Image-Lightning-8steps-V1.0": "lightning",
    }.items(),
)
def test_what_looks_like_one_but_is_not_supported(style, tmp_path, name, words):
    method, variant, sure, unsupported = told_of(style, name, tmp_path)
    assert (method, variant, sure) == (None, None, "likely") and words in unsupported


def test_a_transformers_file_with_a_fitting_name(tmp_path):
    path = tmp_path / "pcm_deterministic_2step_shift1.safetensors"
    key = "transformer.transformer_blocks.0.attn.to_k"
    save_file({f"{key}.lora_A.weight": torch.ones(4, 64), f"{key}.lora_B.weight": torch.ones(64, 4)}, path)
    assert told(path) == (None, None, "likely", "pcm for a transformer (SD3, Flux, …), not a UNet")


@pytest.mark.parametrize("layout", ["kohya", "original", "peft"])
def test_the_modules_alone_do_not_tell_the_method(unet, tmp_path, layout):
    """LCM, Lightning, DMD2, Hyper-SD, TCD and PCM share their modules and rank, and say nothing else."""
    path = write(tmp_path / "x.safetensors", unet, layout, format="pt")
    assert told(path) == (None, None, "possible", None)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules": ATTENTION},
        {"modules": tuple(module for module in ADAPTED if module != "time_emb_proj")},
        {"rank": 32},
        {"ss_network_dim": "64"},
    ],
    ids=str,
)
def test_modules_that_styles_have_too(unet, tmp_path, settings):
    assert told(write(tmp_path / "x.safetensors", unet, **settings)) is None


def test_modules_support_a_doubtful_name(style, distilled, unet, tmp_path):
    """Abbreviations mean little else; words of every day do, until the modules fit as well."""
    for name, method in {"my_tcd": "tcd", "dmd-2024": "dmd2", "new lcm": "lcm"}.items():
        assert told_of(style, name, tmp_path) == (method, None, "possible", None)
        assert told_of(distilled, name, tmp_path) == (method, None, "likely", None)
    assert told_of(distilled, "my_lightning", tmp_path) == ("lightning", None, "possible", None)
    assert told_of(distilled, "turbo_lcm", tmp_path) == (None, None, "possible", None)
    trained = write(tmp_path / "lightning_storm.safetensors", unet, ss_network_dim="64")
    assert told(trained) is None


def test_a_title_in_the_metadata(unet, tmp_path):
    title = {"modelspec.title": "SDXL Lightning 4-step LoRA"}
    path = write(tmp_path / "x.safetensors", unet, rank=8, **title)
    assert told(path) == ("lightning", "4", "likely", None)


def test_a_file_that_distill_made(tmp_path):
    """The metadata counts more than a name, and what train-lora wrote is that of a style."""
    lcm = FAMILIES["demo"].lcm_lora
    assert told_of(lcm, "sdxl_lightning_4step_lora", tmp_path) == ("lcm", None, "certain", None)
    assert told_of(DEMO_STYLE, "zebra", tmp_path) is None


def test_metadata_that_is_not_what_distill_writes(unet, tmp_path):
    for text in (
        "3",
        "[]",
        "{",
        '{"guidance_min": 2, "method": ["lcm"]}',
        '{"guidance_min": 1, "method": "?"}',
    ):
        path = write(tmp_path / "x.safetensors", unet, rank=8, lcm_compile=text)
        assert told(path) is None


def test_the_content_of_a_published_file(style, tmp_path, monkeypatch):
    """Whatever its name is."""
    digest = hashlib.sha256(style.read_bytes()).hexdigest()
    monkeypatch.setitem(methods.PUBLISHED, digest, ("hyper", "8-cfg"))
    assert told_of(style, "sdxl_lightning_4step_lora", tmp_path) == ("hyper", "8-cfg", "certain", None)


def test_the_table_of_published_files():
    for digest, (method, variant) in methods.PUBLISHED.items():
        assert len(digest) == 64 and int(digest, 16) >= 0
        assert variant in methods.VARIANTS[method] or (variant is None and not methods.VARIANTS[method])


def test_a_repository_on_the_hub(style, tmp_path):
    """A repository whose file is named after its format."""
    snapshots = tmp_path / "models--h1t--TCD-SDXL-LoRA/snapshots"
    name = f"{'0' * 40}/pytorch_lora_weights"
    assert told_of(style, name, snapshots) == ("tcd", None, "likely", None)
