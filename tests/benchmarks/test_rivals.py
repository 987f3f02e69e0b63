"""Each rival draws what it says that it draws, held to diffusers' own picture."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import factories
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler
from torch._dynamo.utils import counters

from lcm_compile import BuildSpec, LoraSpec
from lcm_compile.benchmarks.measure import rivals
from lcm_compile.benchmarks.measure.rivals import RIVALS, Setup, makers
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.engines import openvino
from lcm_compile.errors import UsageError
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import Shape

PROMPT, SEED = "a red star", 7
SHAPE = Shape(1, 64, 64)
# Other kernels add in another order, in fp32 and in bf16.
SAME, NEAR = 60, 25


def settings_of(checkpoint):
    return PipelineSettings(SHAPE, open_checkpoint(str(checkpoint)).scheduler, (), True, PROMPT)


@pytest.fixture(scope="module")
def lora(sdxl_checkpoint, tmp_path_factory):
    pipe = DiffusionPipeline.from_pretrained(sdxl_checkpoint)
    return factories.write_lora(
        pipe, tmp_path_factory.mktemp("lora") / "lcm.safetensors", "diffusers", seed=1
    )


@pytest.fixture(scope="module")
def rival(sdxl_checkpoint, lora):
    """What loads a rival by name, in a precision, from weights that are fused once."""
    spec = BuildSpec(str(sdxl_checkpoint), lcm_lora=LoraSpec(str(lora)), height=64, width=64)
    setup = Setup(SHAPE, "fp32", 1, False, settings_of(sdxl_checkpoint))
    names = [name for name, rival in RIVALS.items() if rival.write is None]  # test_peers.py has the others
    with makers(dict.fromkeys(names), spec, "torchscript", setup, lambda _: None) as made:

        def load(name, precision="fp32"):
            folder, setup = made[name].args
            return made[name].function(folder, replace(setup, precision=precision))

        yield load


@pytest.fixture(scope="module")
def theirs(sdxl_checkpoint, lora):
    """Diffusers' picture: of the LCM-LoRA in four steps, of the base without it in 25 of Euler's."""
    pipe = DiffusionPipeline.from_pretrained(sdxl_checkpoint)
    draw, config = partial(pipe, PROMPT, height=SHAPE.height, width=SHAPE.width), pipe.scheduler.config
    pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    generator = torch.Generator("cpu").manual_seed
    euler = draw(num_inference_steps=25, guidance_scale=7.5, generator=generator(SEED)).images
    pipe.scheduler = LCMScheduler.from_config(config)
    pipe.load_lora_weights(lora)
    lcm = draw(num_inference_steps=4, guidance_scale=1.0, generator=generator(SEED)).images
    return {"euler": np.stack(euler), "lcm": np.stack(lcm)}


@pytest.fixture
def loaded(monkeypatch):
    """The pipelines that rivals draw with, as they are loaded."""
    pipes = []
    draw_with_diffusers = rivals.draw_with_diffusers

    def watched(pipe, *args, **kwargs):
        pipes.append(pipe)
        return draw_with_diffusers(pipe, *args, **kwargs)

    monkeypatch.setattr(rivals, "draw_with_diffusers", watched)
    return pipes


def modules_of(pipe):
    return [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]


def test_the_lora_and_the_sampler_change_the_picture(theirs):
    """Or a rival without them would pass."""
    assert psnr_db(theirs["lcm"], theirs["euler"]) < 20


def test_eager_is_diffusers_with_the_lora_fused_in_fp32(rival, theirs, loaded):
    drawn = rival("eager", "bf16")(PROMPT, SEED)  # whatever our engines compute in
    assert psnr_db(theirs["lcm"], drawn.pictures) >= SAME
    assert {p.dtype for module in modules_of(loaded[0]) for p in module.parameters()} == {torch.float32}
    assert set(drawn.stages) == {"encode", "step", "decode"} and min(drawn.stages.values()) > 0


def test_eager_bf16_computes_in_bf16_and_channels_last(rival, theirs, loaded):
    picture = rival("eager-bf16")(PROMPT, SEED).pictures
    [pipe] = loaded
    assert NEAR <= psnr_db(theirs["lcm"], picture) < SAME
    assert {p.dtype for module in modules_of(pipe) for p in module.parameters()} == {torch.bfloat16}
    kernels = [p for model in (pipe.unet, pipe.vae) for p in model.parameters() if p.ndim == 4]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


@pytest.mark.parametrize(("name", "mode"), [("compile", "default"), ("compile-max", "max-autotune")])
def test_compile_hands_unet_and_decoder_to_torch_in_the_bundles_precision(
    rival, theirs, loaded, monkeypatch, name, mode
):
    given, really = [], torch.compile

    def traced(what, mode):  # by torch, but not compiled, which takes a minute
        given.append((getattr(what, "__self__", what), mode))
        return really(what, backend="eager")

    torch._dynamo.reset()  # what it has traced of the same code before
    monkeypatch.setattr(torch, "compile", traced)
    draw = rival(name, "bf16")
    [pipe] = loaded
    assert given == [(pipe.unet._orig_mod, mode), (pipe.vae, mode)]
    counters.clear()
    assert NEAR <= psnr_db(theirs["lcm"], draw(PROMPT, SEED).pictures) < SAME
    assert counters["stats"]["unique_graphs"] >= 2
    assert {p.dtype for module in modules_of(pipe) for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["compile", "compile-max"])
def test_what_torch_compiles_draws_the_same(rival, theirs, loaded, name):
    counters.clear()
    assert psnr_db(theirs["lcm"], rival(name)(PROMPT, SEED).pictures) >= SAME
    assert counters["stats"]["unique_graphs"] >= 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("precision", "floor", "most"),
    [("fp32", SAME, 201), pytest.param("bf16", NEAR, SAME, marks=pytest.mark.slow)],
)
def test_openvino_draws_with_its_own_models_alone(rival, theirs, loaded, precision, floor, most):
    can_openvino(precision)
    draw = rival("openvino", precision)
    compute_nothing_in_torch(loaded[0])
    assert floor <= psnr_db(theirs["lcm"], draw(PROMPT, SEED).pictures) < most


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_openvino_draws_sd15_whose_models_take_less(sd15_checkpoint, loaded):
    can_openvino("fp32")
    setup = Setup(SHAPE, "fp32", 1, False, settings_of(sd15_checkpoint))
    expected = rivals.draw_eagerly(sd15_checkpoint, setup)(PROMPT, SEED).pictures
    draw = rivals.draw_with_openvino(sd15_checkpoint, setup)
    compute_nothing_in_torch(loaded[-1])
    assert psnr_db(expected, draw(PROMPT, SEED).pictures) >= SAME


def can_openvino(precision):
    pytest.importorskip("openvino")
    if reason := openvino.cannot_compute(Precision(precision)):
        pytest.skip(reason)


def compute_nothing_in_torch(pipe):
    """From now on a module that computes fails the test, but for the models that OpenVINO's stand behind."""

    def fail(module, _):
        pytest.fail(f"{type(module).__name__} computed in torch")

    for model in modules_of(pipe):
        for part in list(model.modules())[1:]:
            part.register_forward_pre_hook(fail)


@pytest.mark.parametrize("name", ["euler-25", "euler-25-engine"])
def test_euler_25_is_the_base_without_the_lora_in_25_guided_steps(rival, theirs, name):
    assert psnr_db(theirs["euler"], rival(name)(PROMPT, SEED).pictures) >= SAME


def test_euler_25_brings_its_engines(sdxl_bundle):
    assert [*rivals.check_rivals(("euler-25",), open_bundle(sdxl_bundle))] == ["euler-25", "euler-25-engine"]


@pytest.mark.parametrize(("option", "value"), [("prompt_tokens", 154), ("clip_skip", 1)])
def test_rivals_that_read_prompts_otherwise_are_refused(sdxl_bundle, option, value):
    bundle = open_bundle(sdxl_bundle)
    assert rivals.check_rivals(("eager",), bundle) == {"eager": None}
    spec = replace(bundle.manifest.spec, **{option: value})
    other = replace(bundle, manifest=replace(bundle.manifest, spec=spec))
    with pytest.raises(UsageError, match=f"eager reads 77 tokens.*{value}"):
        rivals.check_rivals(("eager",), other)
    assert list(rivals.check_rivals((str(sdxl_bundle),), other)) == [str(sdxl_bundle)]
