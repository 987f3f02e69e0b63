"""`inspect` on LoRAs and checkpoints: what they are, what they are for, how much they change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import factories
import pytest
import torch
from factories import load_modules
from safetensors.torch import load_file, save_file

from lcm_compile.checkpoint.families import DEMO_STYLE, FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.original_unet_names import original_name, original_names
from lcm_compile.lora import few_step_method
from lcm_compile.lora.guess_base import empty_modules

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.2")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def family_lora(family, path, text=False, original=False, only="", rank=1):
    """A LoRA for a family's real shapes, in kohya's layout, with either names of the UNet's modules."""
    modules = empty_modules(FAMILIES[family], PREFIXES if text else {"unet"})
    tensors = {}
    for component, root in modules.items():
        originals = original_names(root) if original and component == "unet" else {}
        for name, layer in root.named_modules():
            if only in name and name.endswith(TEXT if component != "unet" else ATTENTION):
                key = PREFIXES[component] + original_name(name, originals).replace(".", "_")
                out, *ins = layer.weight.shape
                tensors[f"{key}.lora_down.weight"] = torch.ones(rank, *ins)
                tensors[f"{key}.lora_up.weight"] = torch.ones(out, rank, *ins[1:])
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return factories.save_tensors(tensors, path)


@pytest.fixture
def inspected(command):
    def run(*words):
        code, out, err = command("inspect", *words, "--json")
        assert (code, err) == (0, ""), err
        return json.loads(out)

    return run


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text too"])
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "ssd-1b"])
def test_the_family_is_told(inspected, tmp_path, family, text):
    """SDXL and SSD-1B share names and widths; only the real modules tell them apart."""
    path = family_lora(family, tmp_path / "lora.safetensors", text, original=text and family != "ssd-1b")
    data = inspected(path)
    assert data["made_for"] == f"{family} ({FAMILIES[family].description.split(',')[0]})"
    assert (data["matched_to"], data["matched_keys"]) == (family, data["keys"])
    assert (data["layout"], data["kinds"], data["ranks"]) == (
        "kohya",
        {"LoRA": data["modules"]},
        {"1": data["modules"]},
    )
    assert data["alphas"] == {"2": data["modules"]} and data["keys"] == 3 * data["modules"]
    blocks = [row["block"] for row in data["change"]]
    downs = [name for name in blocks if name.startswith("down_blocks")]
    assert downs and blocks[: len(downs)] == downs
    assert ("mid_block" in blocks) == (family != "ssd-1b")
    assert ("text_encoder" in blocks) == text


def test_a_lora_with_the_names_of_a_whole_checkpoint(inspected, tmp_path):
    tensors = {
        f"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.{end}.weight": torch.ones(
            shape
        )
        for end, shape in (("lora_down", (1, 320)), ("lora_up", (320, 1)))
    }
    data = inspected(factories.save_tensors(tensors, tmp_path / "lora.safetensors"))
    assert (data["kinds"], data["made_for"].split()[0]) == ({"LoRA": 1}, "sd15")


def test_a_lora_of_few_blocks_may_be_for_either(inspected, tmp_path):
    path = family_lora("sdxl", tmp_path / "lora.safetensors", only="down_blocks.1.attentions.0")
    data = inspected(path)
    assert data["made_for"] == "sdxl (Stable Diffusion XL) or ssd-1b (Segmind Stable Diffusion 1B)"
    assert {name for name, keys in data["fits"].items() if keys == data["keys"]} == {"sdxl", "ssd-1b"}


def test_the_demos_own(inspected):
    for path in (DEMO_STYLE, FAMILIES["demo"].lcm_lora):
        data = inspected(path)
        assert data["matched_to"] == "demo" and data["matched_keys"] == data["keys"]


def test_an_unknown_base(inspected, sdxl_checkpoint, tmp_path):
    modules = load_modules(open_checkpoint(str(sdxl_checkpoint)))
    path = factories.write_lora(Pipe(modules), tmp_path / "lora.safetensors", "kohya")
    data = inspected(path)
    assert data["made_for"] == "a base whose text states are 80 wide"
    assert (data["matched_to"], data["fits"]) == (None, {})
    blocks = {row["block"] for row in data["change"]}
    assert {"down_blocks.1", "mid_block", "up_blocks.0", "text_encoder", "text_encoder_2"} <= blocks


def test_keys_that_match_nothing(inspected, tmp_path):
    path = family_lora("sd15", tmp_path / "lora.safetensors")
    extra = {
        "lora_unet_nothing.lora_down.weight": torch.ones(1, 4),
        "lora_unet_nothing.lora_up.weight": torch.ones(4, 1),
    }
    save_file(load_file(path) | extra, path)
    data = inspected(path)
    assert data["unmatched"] == {"count": 2, "some": list(extra)}
    assert data["made_for"].startswith("sd15 (Stable Diffusion 1.5), which ")
    assert data["matched_keys"] == data["keys"] - 2


class Pipe:
    """Just enough of a pipeline for the factories."""

    def __init__(self, modules):
        self.__dict__.update(modules.named())


def random(*shape):
    return torch.randn(shape, generator=GENERATOR) * 0.1


GENERATOR = torch.Generator().manual_seed(0)
NAME = "down_blocks.1.attentions.0.proj_in"
OUT = IN = 64


def product(*parts):
    one, *rest = (part.double() for part in parts)
    return one @ product(*rest) if rest else one


# Each kind's parts, and its change in float64 by its formula, with α = 3.
KINDS = {
    "LoRA": (
        {"lora_up.weight": random(OUT, 4), "lora_down.weight": random(4, IN)},
        lambda f: 3 / 4 * product(f["lora_up.weight"], f["lora_down.weight"]),
    ),
    "LoHa": (
        {
            "hada_w1_a": random(OUT, 4),
            "hada_w1_b": random(4, IN),
            "hada_w2_a": random(OUT, 4),
            "hada_w2_b": random(4, IN),
        },
        lambda f: 3 / 4 * product(f["hada_w1_a"], f["hada_w1_b"]) * product(f["hada_w2_a"], f["hada_w2_b"]),
    ),
    "LoKr": (
        {"lokr_w1": random(4, 4), "lokr_w2_a": random(16, 2), "lokr_w2_b": random(2, 16)},
        lambda f: 3 / 2 * torch.kron(f["lokr_w1"].double(), product(f["lokr_w2_a"], f["lokr_w2_b"])),
    ),
    "difference": ({"diff": random(OUT, IN)}, lambda f: f["diff"].double()),
}


@pytest.fixture(scope="module")
def base_weight(sdxl_checkpoint):
    return load_modules(open_checkpoint(str(sdxl_checkpoint))).unet.get_submodule(NAME).weight.double()


def write(path, parts):
    key = "lora_unet_" + NAME.replace(".", "_")
    return factories.save_tensors(
        {f"{key}.{n}": t for n, t in parts.items()} | {f"{key}.alpha": torch.tensor(3.0)}, path
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_change(inspected, sdxl_checkpoint, base_weight, tmp_path, kind):
    parts, delta = KINDS[kind]
    path = write(tmp_path / "lora.safetensors", parts)
    (alone,) = inspected(path)["change"]
    (held,) = inspected(path, "--base", sdxl_checkpoint)["change"]
    assert (alone["block"], alone["modules"], alone["relative"]) == ("down_blocks.1", 1, None)
    assert alone["norm"] == pytest.approx(float(delta(parts).norm()), rel=1e-4)
    assert held["norm"] == pytest.approx(float(delta(parts).norm()), rel=1e-4)
    assert held["relative"] == pytest.approx(float(delta(parts).norm() / base_weight.norm()), rel=1e-4)


def test_the_change_of_a_block_is_that_of_its_modules_together(inspected, sdxl_checkpoint, tmp_path):
    modules = load_modules(open_checkpoint(str(sdxl_checkpoint)))
    path = factories.write_lora(Pipe(modules), tmp_path / "lora.safetensors", "peft")
    tensors, squares = load_file(path), {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            up = tensors[key.replace("lora_A", "lora_B")]
            component, _, name = key.partition(".")
            block = (
                ".".join(name.split(".")[: 1 if name.startswith("mid") else 2])
                if component == "unet"
                else component
            )
            square = product(up.flatten(1), down.flatten(1)).pow(2).sum()
            squares[block] = squares.get(block, 0.0) + float(square)
    found = {row["block"]: row["norm"] for row in inspected(path)["change"]}
    assert found == pytest.approx({block: square**0.5 for block, square in squares.items()}, rel=1e-4)


def test_a_dora_depends_on_the_base(inspected, command, sdxl_checkpoint, base_weight, tmp_path):
    parts, delta = KINDS["LoRA"]
    magnitude = torch.linspace(0.5, 1.5, OUT)[:, None]
    path = write(tmp_path / "dora.safetensors", {**parts, "dora_scale": magnitude})
    data = inspected(path)
    assert data["kinds"] == {"DoRA": 1} and data["change"][0]["norm"] is None
    assert "depends on the base" in command("inspect", path)[1]
    moved = base_weight + delta(parts)
    change = magnitude.double() * moved / moved.pow(2).sum(1, keepdim=True).sqrt() - base_weight
    (held,) = inspected(path, "--base", sdxl_checkpoint)["change"]
    assert held["norm"] == pytest.approx(float(change.norm()), rel=1e-4)


def with_metadata(path, metadata):
    save_file(load_file(write(path, KINDS["LoRA"][0])), path, metadata)
    return path


def test_metadata_and_trigger_words(inspected, command, tmp_path):
    frequency = {"10_sks": {"sks dog": 12, "grass": 3}, "5_more": {"sks dog": 5, "a \x1b[2Jcat": 4}}
    metadata = {
        "ss_tag_frequency": json.dumps(frequency),
        "ss_output_name": "dog_v2",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "32",
        "ss_network_alpha": "16",
        "modelspec.title": "A dog",
        "modelspec.trigger_phrase": "sks dog",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    }
    path = with_metadata(tmp_path / "lora.safetensors", metadata)
    data = inspected(path)
    assert data["metadata"] == {
        "title": "A dog",
        "architecture": "stable-diffusion-xl-v1-base/lora",
        "trained_on": "sdxl_base_v1-0",
        "network": "networks.lora",
        "network_dim": "32",
        "network_alpha": "16",
        "trigger_phrase": "sks dog",
    }
    tags = {tag["tag"]: tag["captions"] for tag in data["likely_triggers"]}
    assert tags == {"sks dog": 17, "a [2Jcat": 4, "grass": 3} and next(iter(tags)) == "sks dog"
    out = command("inspect", path)[1]
    assert "sks dog (17), a [2Jcat (4), grass (3)" in out and "\x1b" not in out


@pytest.mark.parametrize("broken", ["{", "[]", '{"a": 3}', '{"a": {"b": null}}', "[" * 100_000])
def test_broken_metadata_tells_nothing(inspected, tmp_path, broken):
    path = with_metadata(
        tmp_path / "lora.safetensors", {"ss_tag_frequency": broken, "ss_output_name": "None"}
    )
    data = inspected(path)
    assert (data["likely_triggers"], data["metadata"]) == ([], {})


def test_the_table_is_read_on_80_columns(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family_lora("sdxl", tmp_path / "lora.safetensors")
    code, out, _ = command("inspect", "lora.safetensors")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    for told in ("sdxl (Stable Diffusion XL)", "rank", "match sdxl", "down_blocks.1", "up_blocks.0"):
        assert told in out


def test_a_checkpoint(inspected, sdxl_checkpoint):
    data = inspected(sdxl_checkpoint)
    modules = load_modules(open_checkpoint(str(sdxl_checkpoint))).named()
    parameters = {part["name"]: part["parameters"] for part in data["components"]}
    assert parameters == {name: sum(p.numel() for p in m.parameters()) for name, m in modules.items()}
    assert (data["architecture"], data["family"], data["scheduler"]) == (
        "sdxl",
        None,
        "EulerDiscreteScheduler",
    )
    assert (data["prediction_type"], data["size"]) == ("epsilon", {"height": 64, "width": 64})
    assert {part["dtype"] for part in data["components"]} == {"F32"}


def test_a_checkpoint_in_half_precision(inspected, command, sd15_checkpoint, tmp_path):
    folder = shutil.copytree(sd15_checkpoint, tmp_path / "base")
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    halves = {key: tensor.bfloat16() for key, tensor in load_file(whole).items()}
    save_file(halves, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    whole.unlink()
    unet = next(part for part in inspected(folder)["components"] if part["name"] == "unet")
    assert (unet["dtype"], unet["variant"]) == ("BF16", "fp16")
    assert unet["parameters"] == sum(tensor.numel() for tensor in halves.values())
    out = command("inspect", folder)[1]
    assert "BF16" in out and "PNDMScheduler" in out


def test_refusals(refused, tmp_path, sdxl_checkpoint):
    refused(1, ["no bundle, LoRA or checkpoint at sdxl", "demo"], "inspect", "sdxl")
    refused(1, ["nowhere.safetensors", "does not exist"], "inspect", tmp_path / "nowhere.safetensors")
    refused(1, ["manifest.json", "model_index.json"], "inspect", tmp_path)
    refused(2, ["--base is for LoRAs", "demo"], "inspect", "demo", "--base", "sdxl")
    (tmp_path / "page.safetensors").write_text("<html>")
    refused(1, "no whole safetensors file", "inspect", tmp_path / "page.safetensors")
    folder = shutil.copytree(sdxl_checkpoint, tmp_path / "base")
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"short")
    refused(1, ["vae", "no whole safetensors file"], "inspect", folder)


def test_the_few_step_method(command, inspected, tmp_path, monkeypatch):
    """The options of `build` for it can be copied; a LoRA of no method has no such line."""
    monkeypatch.chdir(tmp_path)
    path = Path("Hyper-SD15 8steps-CFG-lora.safetensors")
    family_lora("sd15", path, only="mid_block.attentions.0.proj")
    _, out, _ = command("inspect", path)
    line = next(line for line in out.splitlines() if line.startswith("few-step method"))
    assert line.split(maxsplit=2)[2] == (
        "hyper, 8 steps, with guidance (likely: its name says so); "
        "build --few-step hyper:8-cfg --few-step-lora 'Hyper-SD15 8steps-CFG-lora.safetensors'"
    )
    assert inspected(path)["few_step"] == {
        "method": "hyper",
        "variant": "8-cfg",
        "sure": "likely",
        "because": "its name says so",
        "unsupported": None,
        "variants": ["4", "2", "8", "1", "8-cfg", "12-cfg"],
        "build": f"--few-step hyper:8-cfg --few-step-lora '{path}'",
    }
    style = path.rename("style.safetensors")
    assert inspected(style)["few_step"] is None
    assert "few-step" not in command("inspect", style)[1]


@pytest.mark.parametrize(
    ("name", "text", "build"),
    [
        ("Hyper-SD15-1step-lora", "hyper, 1 step", "hyper:1"),
        ("pcm_sd15_lcmlike_lora_converted", "pcm, like LCM", "pcm:lcm"),
        ("lightning_lora_3step", "lightning, its variant unknown (4, 2, 8)", "lightning:VARIANT"),
        ("AnimateLCM_lora", "not supported: AnimateLCM, which draws videos", None),
    ],
)
def test_few_step_methods_in_words(command, tmp_path, monkeypatch, name, text, build):
    monkeypatch.chdir(tmp_path)
    family_lora("sd15", Path(f"{name}.safetensors"), only="mid_block.attentions.0.proj")
    _, out, _ = command("inspect", f"{name}.safetensors")
    options = f"; build --few-step {build} --few-step-lora {name}.safetensors" if build else ""
    assert f" {text} (likely: its name says so){options}\n" in out


def test_the_few_step_method_by_content(inspected, tmp_path, monkeypatch):
    """A published file is known under any name."""
    path = family_lora("sd15", tmp_path / "x.safetensors", only="mid_block.attentions.0.proj")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(few_step_method.PUBLISHED, digest, ("lightning", "4"))
    found = inspected(path)["few_step"]
    assert (found["method"], found["variant"], found["sure"]) == ("lightning", "4", "certain")


def test_the_few_step_method_of_a_hub_id(inspected):
    """Its files are named after their format; the repository's name tells the method."""
    folder = Path(os.environ["HF_HOME"]) / "hub/models--h1t--TCD-SD15-LoRA"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    family_lora("sd15", folder / "snapshots" / commit / "pytorch_lora_weights.safetensors", only="proj_in")
    found = inspected("h1t/TCD-SD15-LoRA")["few_step"]
    assert (found["method"], found["because"]) == ("tcd", "its repository's name says so")
    assert found["build"] == "--few-step tcd --few-step-lora h1t/TCD-SD15-LoRA"


@pytest.fixture(scope="module")
def guides(tmp_path_factory, sd15_checkpoint, sdxl_checkpoint):
    """ControlNets and T2I-Adapters as folders and files, by name."""
    folder = tmp_path_factory.mktemp("guides")
    net = factories.write_controlnet(sdxl_checkpoint, folder / "net")
    adapter = factories.write_t2i_adapter(folder / "adapter", in_channels=1)
    return {
        "net": net,
        "file": factories.write_original_controlnet(net, folder / "net.safetensors"),
        "lora": factories.write_control_lora(sd15_checkpoint, folder / "whole", folder / "l.safetensors", 5),
        "adapter": adapter,
        "pickle": factories.write_original_t2i_adapter(adapter, folder / "adapter.pth"),
    }


def test_what_guides_a_base_is_told(inspected, guides):
    for source, dtype in ((guides["net"], "F32"), (guides["file"], "F16")):
        told = inspected(source)
        assert (told["controlnet"], told["kind"], told["dtype"]) == (str(source), "ControlNet", dtype)
        assert told["made_for"] == "SDXL's architecture with text states of 80"
        assert told["build"] == f"--controlnet {source}"
    told = inspected(guides["lora"])
    assert told["kind"].startswith("control-LoRA of rank 5,")
    assert told["made_for"] == "a model with text states of 32"
    for source in (guides["adapter"], guides["pickle"]):
        told = inspected(source)
        assert (told["t2i-adapter"], told["in_channels"], told["channels"]) == (str(source), 1, [32, 64])
        assert told["build"] == f"--t2i-adapter {source}"
