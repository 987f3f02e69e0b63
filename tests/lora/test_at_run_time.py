"""LoRAs that are not fused, as inputs of the engines, against diffusers with the same LoRAs loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import factories
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers_reference import FLOOR, SCHEDULERS, reference
from PIL import Image
from safetensors.torch import load_file, save_file

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.builder.plan import make_plan
from lcm_compile.errors import LoraError, UsageError
from lcm_compile.lora.fuse import fuse
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.proof.parity import psnr_db

ASKED = {"negative_prompt": "blue", "guidance_scale": 2.0, "seed": 7}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request):
    """The folder of a base."""
    return request.getfixturevalue(f"{request.param}_checkpoint")


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """Two LoRAs of other ranks: of the usual layers and the text encoders, and of all of the UNet's."""
    folder, pipe = tmp_path_factory.mktemp("loras"), DiffusionPipeline.from_pretrained(base)
    one = factories.write_lora(pipe, folder / "usual.safetensors", "kohya", rank=4, alpha=2.0)
    other = factories.write_lora(
        pipe, folder / "every.safetensors", "peft", rank=2, text=False, seed=1, every=True
    )
    return {"usual": one, "every": scaled(other, 0.4)}


def scaled(path, factor):
    """Makes a LoRA weaker, so that the pictures of several layers' changes stay pictures."""
    save_file({k: v * factor if "lora_B" in k else v for k, v in load_file(path).items()}, path)
    return path


@pytest.fixture(scope="module")
def spec(base):
    return BuildSpec(str(base), no_lcm=True, few_step="lcm", backend="torchscript")


@pytest.fixture(scope="module")
def at_run_time(spec, files, tmp_path_factory):
    """A bundle whose two LoRAs have weights that are inputs, the second one's by default 0.5."""
    loras = (LoraSpec.parse(f"{files['usual']}:runtime"), LoraSpec.parse(f"{files['every']}:0.5:runtime:all"))
    return build(replace(spec, loras=loras), tmp_path_factory.mktemp("runtime") / "bundle")


@pytest.fixture(scope="module")
def slots(base, spec, sd15_checkpoint, tmp_path_factory):
    """A bundle with two slots of rank 4, of one base as ONNX: so many inputs take long to export."""
    backend = "onnxruntime" if base == sd15_checkpoint else "torchscript"
    chosen = replace(spec, backend=backend, lora_slots=2, lora_rank=4)
    return build(chosen, tmp_path_factory.mktemp("slots") / "bundle")


def theirs(base, files, weights, steps=4):
    """diffusers' picture with LoRAs of these weights."""
    pipe = reference(base)
    for name in weights:
        pipe.load_lora_weights(files[name], adapter_name=name)
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))
    return eight_bits(
        pipe(
            "a red star",
            negative_prompt=ASKED["negative_prompt"],
            guidance_scale=ASKED["guidance_scale"],
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(ASKED["seed"]),
            output_type="np",
        ).images
    )[0]


def ours(pipeline, **options):
    return np.asarray(pipeline("a red star", **{**ASKED, **options})[0])


WEIGHTS = [(1.0, 0.5), (-1.0, 0.0), (0.0, 0.0), (0.3, 2.0), (2.0, -1.0)]


def test_weights_are_those_of_diffusers(base, files, at_run_time):
    with load(at_run_time) as pipeline:
        plain = ours(pipeline, lora_weights={"usual": 0, "all": 0})
        assert psnr_db(theirs(base, files, {}), plain) >= FLOOR
        for one, other in WEIGHTS:
            drawn = ours(pipeline, lora_weights={"usual": one, "all": other})
            expected = theirs(base, files, {"usual": one, "every": other})
            assert psnr_db(expected, drawn) >= FLOOR, (one, other)
            assert (one == other == 0) == (psnr_db(plain, drawn) > FLOOR)
        expected = theirs(base, files, {"usual": 1.0, "every": 0.5})
        assert psnr_db(expected, ours(pipeline)) >= FLOOR


def test_slots_are_filled_without_diffusers(slots, files, tmp_path):
    """Its import alone would take seconds of each `run --lora`."""
    program = f"""
import sys
from lcm_compile import load
with load({str(slots.folder)!r}) as pipeline:
    pipeline("a star", seed=1, loras=[{str(files["usual"])!r}])
assert "diffusers" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_parts_have_weights_of_their_own(base, files, spec, at_run_time, tmp_path):
    text = "0.8@text=0.3,down_blocks.1=0,mid_block=1.5"
    fused = build(replace(spec, loras=(LoraSpec.parse(f"{files['usual']}:{text}"),)), tmp_path / "fused")
    with load(at_run_time) as pipeline, load(fused) as other:
        weights = {"usual": LoraSpec.parse(f"x:{text}"), "all": 0}
        assert psnr_db(ours(other), ours(pipeline, lora_weights=weights)) >= FLOOR


def test_slots_are_those_of_diffusers_and_leave_nothing_behind(base, files, slots):
    with load(slots) as pipeline:
        before = ours(pipeline)
        assert psnr_db(theirs(base, files, {}), before) >= FLOOR
        for weights in ({"usual": 0.7}, {"every": -0.5}, {"every": 1.0, "usual": 0.4}):
            drawn = ours(pipeline, loras=[f"{files[name]}:{weight}" for name, weight in weights.items()])
            assert psnr_db(theirs(base, files, weights), drawn) >= FLOOR, weights
        assert (ours(pipeline) == before).all()
    with load(slots) as pipeline:
        assert (ours(pipeline) == before).all()


@pytest.mark.parametrize("backend", ["openvino", "torchscript"])
def test_slots_without_the_context_on_another_backend(sd15_checkpoint, tmp_path, backend):
    pipe = DiffusionPipeline.from_pretrained(sd15_checkpoint)
    lora = factories.write_lora(pipe, tmp_path / "x.safetensors", "kohya", every=True, text=True)
    scaled(lora, 1)
    spec = BuildSpec(
        str(sd15_checkpoint),
        no_lcm=True,
        few_step="lcm",
        backend=backend,
        without=("context", "qkv", "upsampling") if backend == "torchscript" else (),
        loras=(LoraSpec.parse(f"{lora}:0.2:runtime"),),
        lora_slots=1,
        lora_rank=6,
    )
    with load(build(spec, tmp_path / "bundle")) as pipeline:
        once = ours(pipeline, lora_weights={"x": 0.4})
        twice = ours(pipeline, lora_weights={"x": 0.2}, loras=[f"{lora}:0.2"])
        assert psnr_db(once, twice) >= FLOOR > psnr_db(once, ours(pipeline))


def test_a_bundle_draws_few_steps_or_ordinary_ones(sd15_checkpoint, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(sd15_checkpoint)
    lora = factories.write_lora(pipe, tmp_path / "lcm.safetensors", "kohya", text=False)
    spec = BuildSpec(str(sd15_checkpoint), lcm_lora=LoraSpec.parse(f"{lora}:runtime"), backend="torchscript")
    with load(build(spec, tmp_path / "bundle")) as pipeline:
        few = ours(pipeline)
        assert psnr_db(theirs(sd15_checkpoint, {"lcm": lora}, {"lcm": 1.0}), few) >= FLOOR
        ordinary = ours(pipeline, lora_weights={"lcm": 0}, sampler="euler", steps=25, guidance_scale=7.5)
    pipe.scheduler = SCHEDULERS["euler"](pipe.scheduler.config)
    expected = pipe(
        "a red star",
        negative_prompt="blue",
        num_inference_steps=25,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="np",
    ).images
    assert psnr_db(eight_bits(expected)[0], ordinary) >= 60


def test_run_and_again(command, at_run_time, slots, files, tmp_path):
    for bundle, words in (
        (at_run_time, ["--lora-weight", "usual=0.3@text=1", "--lora-weight", "all=0"]),
        (slots, ["--lora", f"{files['every']}:0.5"]),
    ):
        command("run", "x", "--bundle", bundle.folder, "--seed", 1, *words, "--out", tmp_path / "a.png")
        command("run", "--again", tmp_path / "a.png", "--bundle", bundle.folder, "--out", tmp_path / "b.png")
        command("run", "x", "--bundle", bundle.folder, "--seed", 1, "--out", tmp_path / "c.png")
        first, again, without = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
        assert first == again != without


def test_another_file_under_the_name_of_a_lora(command, refused, slots, files, tmp_path):
    lora = shutil.copy(files["every"], tmp_path / "x.safetensors")
    words = ["--lora", f"{lora}:0.5", "--seed", 1, "--out", tmp_path / "a.png", "--json"]
    _, out, _ = command("run", "x", "--bundle", slots.folder, *words)
    assert json.loads(out)["loras"] == [f"{lora}:0.5"]
    shutil.copy(files["usual"], lora)
    again = ["run", "--again", tmp_path / "a.png", "--bundle", slots.folder, "--out", tmp_path / "b.png"]
    refused(2, ["x.safetensors", "content is another"], *again)
    command(*again, "--lora", lora)


def test_one_graph_refuses_them_from_python_too(pairs):
    with load(pairs) as pipeline:
        for asked in ({"lora_weights": {"usual": 1}}, {"loras": ["usual.safetensors"]}):
            with pytest.raises(UsageError, match="this bundle has no"):
                pipeline("a star", seed=1, guidance_scale=1.0, **asked)


def test_a_bundle_tells_its_loras(command, at_run_time, slots):
    _, out, _ = command("inspect", at_run_time.folder)
    assert "usual" in out and "run --lora-weight" in out
    _, out, _ = command("inspect", slots.folder)
    assert "rank: 4" in out and "run --lora" in out
    _, out, _ = command("inspect", slots.folder, "--json")
    assert json.loads(out)["lora_slots"]["rank"] == 4


def test_the_key_knows(spec, files):
    keys = [
        make_plan(changed).key
        for lora in (f"{files['usual']}", f"{files['usual']}:runtime", f"{files['usual']}:runtime:other")
        for changed in (
            replace(spec, loras=(LoraSpec.parse(lora),)),
            replace(spec, loras=(LoraSpec.parse(lora),), lora_slots=1),
        )
    ]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lora-weight", "other=1"], ["no LoRA other", "usual", ":runtime"]),
        (["--lora-weight", "usual=strong"], "'strong'"),
        (["--lora-weight", "usual"], "NAME=0.8"),
        (["--lora-weight", "usual=nan"], "not finite"),
        (["--lora-weight", "usual=1@down_blocks.9=0"], "down_blocks.9"),
        (["--lora-weight", "usual=1", "--lora-weight", "usual=2"], "two weights"),
        (["--lora", "FILE"], ["no slots", "--lora-slots 1"]),
    ],
)
def test_what_a_bundle_cannot_do(refused, at_run_time, files, tmp_path, words, told):
    words = [str(files["usual"]) if word == "FILE" else word for word in words]
    told = [told] if isinstance(told, str) else told
    refused(2, told, "run", "x", "--bundle", at_run_time.folder, *words, "--out", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_lora_of_too_high_a_rank(refused, base, slots, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(base)
    lora = factories.write_lora(pipe, tmp_path / "high.safetensors", "kohya", rank=5)
    told = ["rank 5", "rank 4", "--lora-rank 5"]
    refused(1, told, "run", "x", "--bundle", slots.folder, "--lora", lora, "--out", tmp_path / "x.png")
    three = [word for _ in range(3) for word in ("--lora", lora)]
    refused(2, "3 LoRAs for 2 slots", "run", "x", "--bundle", slots.folder, *three)
    refused(
        1, "does not exist", "run", "x", "--bundle", slots.folder, "--lora", tmp_path / "none.safetensors"
    )


def test_a_full_difference_in_a_slot(command, base, slots, spec, tmp_path):
    """One of the slots' rank is exact, and of one of full rank it is said what is left out."""
    unet = DiffusionPipeline.from_pretrained(base).unet
    name, layer = next((n, m) for n, m in unet.named_modules() if n.endswith("attn1.to_q"))
    out, inputs = layer.weight.shape
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(out, inputs, generator=generator) * 0.3
    low = torch.randn(out, 3, generator=generator) @ torch.randn(3, inputs, generator=generator) * 0.2
    errors = {}
    for kind, matrix in (("full", full), ("low", low)):
        path = tmp_path / f"{kind}.safetensors"
        save_file({f"unet.{name}.diff": matrix}, path)
        drawn = tmp_path / f"{kind}.png"
        _, _, errors[kind] = command(
            "run", "a red star", "--bundle", slots.folder, "--lora", path, "--seed", 7, "--out", drawn
        )
    sizes = torch.linalg.svdvals(full)
    assert f"leaves out up to {float(sizes[4:].norm() / sizes.norm()):.2%}" in errors["full"]
    assert "leaves out" not in errors["low"]
    lora = LoraSpec(str(tmp_path / "low.safetensors"))
    with load(build(replace(spec, loras=(lora,)), tmp_path / "fused")) as fused:
        expected = np.asarray(fused("a red star", seed=7)[0])
    assert psnr_db(expected, np.asarray(Image.open(tmp_path / "low.png"))) >= FLOOR


def test_loras_that_cannot_be_changed_at_run_time(spec, files, tmp_path):
    tensors = load_file(files["usual"])
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key.replace("lora_up.weight", "dora_scale")] = torch.ones(len(tensors[key]), 1)
    save_file(tensors, tmp_path / "dora.safetensors")
    lora = LoraSpec.parse(f"{tmp_path}/dora.safetensors:runtime")
    with pytest.raises(LoraError, match="DoRA"):
        build(replace(spec, loras=(lora,)), tmp_path / "bundle")
    with pytest.raises(UsageError, match="can't be changed later"):
        fuse(replace(spec, loras=(LoraSpec.parse(f"{files['usual']}:runtime"),)), tmp_path / "fused", "fp32")
    with pytest.raises(UsageError, match="8 bits"):
        make_plan(replace(spec, precision="int8", backend="onnxruntime", lora_slots=1))
    with pytest.raises(UsageError, match="two LoRAs are called usual"):
        replace(spec, loras=(LoraSpec.parse(f"{files['usual']}:runtime"),) * 2)
    with pytest.raises(UsageError, match="whole-loop"):
        replace(spec, lora_slots=1, whole_loop=True)
    assert not (tmp_path / "bundle").exists()
