"""`distill --finetune`: what it begins with, its loss, what it writes, and what it refuses."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from factories import fuse_loras
from references import in_numpy, reference_step, with_lora
from runs import PIPELINES, losses_of, settings_for, write_pictures
from safetensors.torch import load_file, save_file
from test_full import diffusers_embedding

from lcm_compile import BuildSpec, build, load
from lcm_compile.checkpoint.families import FAMILIES
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.checkpoint.load import load_component
from lcm_compile.demo import judge
from lcm_compile.demo.pictures import main as draw_pictures
from lcm_compile.demo.world import LOOKS, held_out_prompts
from lcm_compile.errors import LoraError, UsageError
from lcm_compile.lora.read import read_lora
from lcm_compile.spec import LoraSpec
from lcm_compile.training import distill
from lcm_compile.training.adapters import kohya_tensors, trained
from lcm_compile.training.distill import DistillSpec
from lcm_compile.training.finetune import add_adapters_of
from lcm_compile.training.state import state_path


@pytest.fixture(scope="module")
def loras(bases, tmp_path_factory):
    """A LoRA of each method on each base."""
    folder = tmp_path_factory.mktemp("loras")
    made = {}
    for kind in ("sdxl", "v"):
        for method in ("lcm", "tcd"):
            made[kind, method] = folder / f"{kind}-{method}.safetensors"
            losses_of(settings_for(bases[kind], steps=2, method=method), made[kind, method])
    return made


@pytest.fixture(scope="module")
def lcm(bases, tmp_path_factory):
    """A full LCM."""
    out = tmp_path_factory.mktemp("full") / "lcm"
    losses_of(settings_for(bases["sd15"], steps=2, full=True), out)
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "own", 4)


@pytest.mark.parametrize(("kind", "prediction"), [("sdxl", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("method", ["lcm", "tcd"])
def test_a_step_is_the_papers(kind, prediction, method, bases, loras, pictures, tmp_path):
    """The first step's loss with the given LoRA, and the second's with the adapters kept after the first."""
    out, lora = tmp_path / "lora.safetensors", loras[kind, method]
    spec = settings_for(
        bases[kind], steps=2, save_every=1, method=method, finetune=True, lora=str(lora), data=str(pictures)
    )
    steps = distill.distill(spec, out)
    losses = [next(steps).loss]
    state = torch.load(state_path(out), weights_only=True)
    losses.append(next(steps).loss)
    pipe = PIPELINES["sdxl" if kind == "sdxl" else "sd15"].from_pretrained(bases[kind])
    base = copy.deepcopy(pipe.unet)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    begun = in_numpy(pipe.unet)
    student, target = (
        in_numpy(with_lora(copy.deepcopy(base), adapters))
        for adapters in (state["weights"], state["means"]["target"])
    )
    for numbers, networks, loss in (
        (range(2), (begun, begun, None), losses[0]),
        (range(2, 4), (student, target, None), losses[1]),
    ):
        found = reference_step(pipe, spec, numbers, lambda w, n=networks: n, prediction, pictures)
        assert loss == pytest.approx(found, rel=1e-3)


def test_a_full_lcms_step_is_the_papers(lcm, pictures, tmp_path):
    spec = settings_for(lcm, steps=2, save_every=1, finetune=True, data=str(pictures))
    steps = distill.distill(spec, tmp_path / "tuned")
    losses = [next(steps).loss]
    state = torch.load(state_path(tmp_path / "tuned"), weights_only=True)
    losses.append(next(steps).loss)
    pipe = PIPELINES["sd15"].from_pretrained(lcm)

    def unet(weights):
        model = UNet2DConditionModel.from_config(pipe.unet.config)
        model.load_state_dict(weights)
        return model

    begun = unet(pipe.unet.state_dict())
    student, target = unet(state["weights"]), unet(state["means"]["target"])
    for numbers, pair, loss in (
        (range(2), (begun, begun), losses[0]),
        (range(2, 4), (student, target), losses[1]),
    ):

        def networks(w, pair=pair):
            return *(in_numpy(model, diffusers_embedding(w[None])[0]) for model in pair), None

        found = reference_step(pipe, spec, numbers, networks, "epsilon", pictures)
        assert loss == pytest.approx(found, rel=1e-3)
    with pytest.raises(StopIteration):
        next(steps)
    tuned = UNet2DConditionModel.from_pretrained(tmp_path / "tuned" / "unet")
    assert tuned.config.time_cond_proj_dim == 256
    assert not torch.equal(tuned.conv_in.weight, begun.conv_in.weight.float())


def test_ranks_and_alphas_of_any_kind(bases, tmp_path):
    """A LoRA whose modules have ranks and α of their own, and 1×1 kernels stored as matrices."""
    path, unet = tmp_path / "lora.safetensors", load_component(open_checkpoint(str(bases["sd15"])), "unet")
    generator = torch.Generator().manual_seed(0)
    tensors, names = {}, []
    for i, (name, module) in enumerate(unet.named_modules()):
        if name.endswith(("to_q", "conv1", "proj_in", "ff.net.2")):
            rank, key = 2 + i % 3, "lora_unet_" + name.replace(".", "_")
            out, *rest = module.weight.shape
            down = torch.randn(rank, *rest, generator=generator)
            tensors[f"{key}.lora_down.weight"] = down.flatten(1) if down[0, 0].numel() == 1 else down
            tensors[f"{key}.lora_up.weight"] = torch.randn(out, rank, generator=generator) * 0.1
            tensors[f"{key}.alpha"] = torch.tensor(1.0 + i % 4)
            names.append(name)
    save_file(tensors, path)
    inputs = torch.randn(1, 4, 16, 16, generator=generator), 499, torch.randn(1, 77, 32, generator=generator)
    fused = load_component(open_checkpoint(str(bases["sd15"])), "unet")
    fuse_loras({"unet": fused}, [(read_lora(path), LoraSpec("lora"))])
    add_adapters_of(unet, read_lora(path))
    with torch.no_grad():
        torch.testing.assert_close(unet(*inputs).sample, fused(*inputs).sample, rtol=1e-4, atol=1e-4)
    assert {name.partition(".lora_")[0] for name in trained(unet)} == set(names)
    written = kohya_tensors(trained(unet))
    assert written.keys() == tensors.keys()
    assert all(
        written[k] == len(written[k.replace("alpha", "lora_down.weight")]) for k in written if "alpha" in k
    )


def test_the_file(bases, loras, pictures, tmp_path, command):
    out, before = tmp_path / "tuned.safetensors", loras["sdxl", "tcd"]
    words = ("distill", "--base", bases["sdxl"], "--finetune", "--method", "tcd", "--lora", before)
    words += ("--data", pictures, "--steps", 2, "--batch", 1, "--save-every", 1)
    code, told, err = command(*words, "--out", out)
    assert (code, told.strip()) == (0, str(out))
    assert f"--few-step tcd --few-step-lora {out}" in err
    old, new = load_file(before), load_file(out)
    assert {key: t.shape for key, t in new.items()} == {key: t.shape for key, t in old.items()}
    assert any(not torch.equal(new[key], old[key]) for key in new)
    _, told, _ = command("inspect", out, "--json")
    assert json.loads(told)["metadata"]["distilled_by"] == "tcd"
    made = json.loads(read_lora(out).metadata["lcm_compile"])
    assert (made["method"], made["finetune"], made["rank"]) == ("tcd", True, 2)
    assert str(tmp_path) not in str(made)
    code, told, _ = command(*words, "--dry-run", "--json")
    assert (code, json.loads(told)["trainable_parameters"]) == (
        0,
        sum(tensor.numel() for key, tensor in new.items() if not key.endswith("alpha")),
    )


def test_dry_run_of_a_full_lcm(lcm, command):
    code, told, _ = command("distill", "--base", lcm, "--finetune", "--dry-run", "--json")
    weights = load_component(open_checkpoint(str(lcm)), "unet").parameters()
    assert (code, json.loads(told)["trainable_parameters"]) == (0, sum(weight.numel() for weight in weights))


def test_another_lora_is_not_resumed(bases, loras, pictures, tmp_path):
    out, chosen = tmp_path / "lora.safetensors", tmp_path / "chosen.safetensors"
    spec = settings_for(bases["v"], save_every=1, finetune=True, lora=str(chosen), data=str(pictures))
    chosen.write_bytes(loras["v", "lcm"].read_bytes())
    straight = losses_of(spec, tmp_path / "straight.safetensors")
    next(distill.distill(spec, out))
    assert losses_of(spec, out, resume=True) == straight[1:]
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()
    next(distill.distill(spec, out))
    save_file({key: t * 2 for key, t in load_file(chosen).items()}, chosen)
    with pytest.raises(UsageError, match="another training: its lora"):
        distill.distill(spec, out, resume=True)


# Bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dmd"}, "unknown method"),
        ({"method": "tcd", "full": True}, "trains a LoRA, not a complete UNet"),
        ({"finetune": True, "full": True}, "exclude each other"),
        ({"lora": "lcm.safetensors"}, "--lora is the LoRA that is tuned"),
    ],
)
def test_settings_that_exclude_each_other(changes, message):
    with pytest.raises(UsageError, match=message):
        settings_for("base", **changes)


@pytest.mark.parametrize(
    ("base", "changes", "error", "message"),
    [
        ("sd15", {}, UsageError, "nothing to tune"),
        ("sd15", {"data": None}, UsageError, "no pictures to tune"),
        ("sd15", {"lora": "nowhere.safetensors"}, LoraError, "does not exist"),
        ("sd15", {"lora": "sdxl-lcm"}, LoraError, "does not fit this base"),
        ("v", {"lora": "v-tcd"}, UsageError, "was distilled by --method tcd"),
        ("v", {"lora": "v-lcm", "method": "tcd"}, UsageError, "was distilled by --method lcm"),
        ("lcm", {"lora": "v-lcm"}, UsageError, "a full LCM, which is tuned as a whole"),
        ("lcm", {"method": "tcd"}, UsageError, "a full LCM, which is tuned as a whole"),
    ],
)
def test_bad_requests(base, changes, error, message, bases, lcm, loras, pictures, tmp_path):
    files = {f"{kind}-{method}": str(path) for (kind, method), path in loras.items()}
    changes = {"data": str(pictures), "finetune": True, **changes}
    if "lora" in changes:
        changes["lora"] = files.get(changes["lora"], changes["lora"])
    spec = settings_for(lcm if base == "lcm" else bases[base], **changes)
    with pytest.raises(error, match=message):
        distill.distill(spec, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("extra", "named"),
    [("dora_scale", "DoRA"), ("lora_mid.weight", "LoCon"), ("diff_b", "bias"), ("text", "text_encoder")],
)
def test_loras_that_are_more_than_plain(extra, named, bases, loras, pictures, tmp_path):
    tensors = load_file(loras["v", "lcm"])
    key = next(key for key in tensors if key.endswith("conv1.lora_down.weight"))
    module, down = key.removesuffix(".lora_down.weight"), tensors[key]
    if extra == "dora_scale":
        tensors[f"{module}.dora_scale"] = torch.ones(len(tensors[f"{module}.lora_up.weight"]), 1, 1, 1)
    elif extra == "lora_mid.weight":
        tensors[f"{module}.lora_mid.weight"] = torch.ones(2, 2, 3, 3)
        tensors[key] = down[:, :, :1, :1].contiguous()
    elif extra == "diff_b":
        tensors[f"{module}.diff_b"] = torch.ones(len(tensors[f"{module}.lora_up.weight"]))
    else:
        name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
        tensors |= {
            f"{name}.lora_down.weight": torch.ones(2, 32),
            f"{name}.lora_up.weight": torch.ones(128, 2),
        }
    save_file(tensors, tmp_path / "lora.safetensors")
    spec = settings_for(
        bases["v"], finetune=True, lora=str(tmp_path / "lora.safetensors"), data=str(pictures)
    )
    with pytest.raises(LoraError, match=f"can't be tuned: it holds {named}"):
        distill.distill(spec, tmp_path / "out.safetensors")


# The demo world ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demos_lcm_lora_is_tuned_to_the_dusk_palette(tmp_path):
    """By the rule-based judge, on pictures drawn in 4 steps of captions that no training has seen."""
    pictures, tuned = tmp_path / "dusk", tmp_path / "tuned.safetensors"
    words = ["--look", "dusk", "--count", "200", "--seed", "3", "--out", str(pictures)]
    draw_pictures(words, standalone_mode=False)
    lcm_lora = FAMILIES["demo"].lcm_lora
    spec = DistillSpec(
        "demo",
        data=str(pictures),
        steps=300,
        batch=8,
        lr=1e-3,
        skip=100,
        finetune=True,
        lora=lcm_lora,
    )
    assert len(losses_of(spec, tuned)) == 300
    prompts = held_out_prompts(100, seed=1)
    found = []
    for lora in (lcm_lora, str(tuned)):
        with load(build(BuildSpec("demo", lcm_lora=LoraSpec(lora)))) as pipeline:
            drawn = [np.asarray(pipeline(text, seed=i)[0]) for i, text in enumerate(prompts)]
        found.append(judge.score(drawn, prompts, LOOKS["dusk"]))
    before, after = found
    assert before["pattern"] <= 0.45, before
    assert after["pattern"] >= 0.65, after
