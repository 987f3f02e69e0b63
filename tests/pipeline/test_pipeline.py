"""Pictures equal diffusers' own: same checkpoint, LoRAs, prompt, seed and steps, LCMScheduler."""

from __future__ import annotations

from dataclasses import dataclass

import factories
import numpy as np
import pytest
from diffusers_reference import FLOOR, Pair, reference

from lcm_compile import BuildSpec, LoraSpec, build, load
from lcm_compile.engines.runner import Runner
from lcm_compile.errors import BackendError
from lcm_compile.pipeline.pipeline import LcmPipeline
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db


@pytest.fixture(scope="module")
def sdxl(sdxl_checkpoint, tmp_path_factory):
    """SDXL, 64×64, ONNX Runtime, with a kohya LoRA of UNet and text at 1 and a PEFT one at 0.6."""
    folder = tmp_path_factory.mktemp("fused")
    theirs = reference(sdxl_checkpoint)
    lcm = factories.write_lora(theirs, folder / "lcm.safetensors", "kohya", seed=1)
    style = factories.write_lora(theirs, folder / "style.safetensors", "peft", seed=2)
    spec = BuildSpec(
        base=str(sdxl_checkpoint),
        lcm_lora=LoraSpec(str(lcm)),
        loras=(LoraSpec(str(style), 0.6),),
        backend="onnxruntime",
    )
    theirs.load_lora_weights(lcm, adapter_name="lcm")
    theirs.load_lora_weights(style, adapter_name="style")
    theirs.set_adapters(["lcm", "style"], [1.0, 0.6])
    with load(build(spec, folder / "bundle")) as ours:
        yield Pair(ours, theirs, 64, 64)


@pytest.fixture(scope="module")
def sd15(sd15_checkpoint, tmp_path_factory):
    """SD1.5, 136×104 (latents of odd sides), TorchScript, with a kohya LoRA of UNet and text at −0.5."""
    folder = tmp_path_factory.mktemp("fused")
    theirs = reference(sd15_checkpoint)
    lora = factories.write_lora(theirs, folder / "lora.safetensors", "kohya", alpha=None, seed=3)
    spec = BuildSpec(
        base=str(sd15_checkpoint),
        lcm_lora=LoraSpec(str(lora), -0.5),
        height=136,
        width=104,
        backend="torchscript",
    )
    theirs.load_lora_weights(lora, adapter_name="lcm")
    theirs.set_adapters(["lcm"], [-0.5])
    with load(build(spec, folder / "bundle")) as ours:
        yield Pair(ours, theirs, 136, 104)


@pytest.fixture(params=["sdxl", "sd15"])
def pair(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("steps", range(1, 9))
def test_steps(pair, steps):
    assert min(pair.psnr(steps=steps)) >= FLOOR


def test_fifty_steps(sdxl):
    assert min(sdxl.psnr(steps=50)) >= FLOOR


@pytest.mark.parametrize("negative_prompt", [None, "", "a small blue circle"])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_guidance(pair, guidance_scale, negative_prompt):
    assert min(pair.psnr(guidance_scale=guidance_scale, negative_prompt=negative_prompt)) >= FLOOR


def test_guidance_and_negative_prompt_change_the_picture(pair):
    plain = pair.ours.draw(Request("a star", 7)).pictures
    guided = pair.ours.draw(Request("a star", 7, guidance_scale=1.5)).pictures
    negative = pair.ours.draw(Request("a star", 7, "a blue circle", guidance_scale=1.5)).pictures
    assert psnr_db(plain, guided) < FLOOR
    assert psnr_db(guided, negative) < FLOOR


@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_several_pictures_from_one_seed(pair, seed):
    assert min(pair.psnr(seed=seed, num_images=3)) >= FLOOR


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "Ein größerer Stern: ★ 🦀",
        "a   red\n\tstar",
        "red star " * 60,
        "STAR, red-ish (very:1.3) 'blue'!!",
    ],
    ids=["empty", "unicode", "spaces", "100 tokens", "punctuation"],
)
def test_prompts(pair, prompt):
    assert min(pair.psnr(prompt)) >= FLOOR


def test_tenth_of_a_lora_would_be_seen(sdxl):
    """The floor tells a LoRA at 0.9 of its weight from the whole."""
    sdxl.theirs.set_adapters(["lcm", "style"], [0.9, 0.6])
    try:
        assert max(sdxl.psnr()) < FLOOR
    finally:
        sdxl.theirs.set_adapters(["lcm", "style"], [1.0, 0.6])


def test_cut_of_a_long_prompt_is_told(pair):
    drawing = pair.ours.draw(Request("red star " * 37 + "blue circle on white", 1))
    assert drawing.cut == "circle on white"
    assert pair.ours.draw(Request("red star " * 37, 1)).cut == ""


def test_pil_images_from_python(sdxl):
    images = sdxl.ours("a red star", seed=3, num_images=2)
    assert [image.size for image in images] == [(64, 64), (64, 64)]
    again = sdxl.ours("a red star", seed=3, num_images=2)
    np.testing.assert_array_equal(np.asarray(images[1]), np.asarray(again[1]))
    assert not np.array_equal(np.asarray(images[0]), np.asarray(images[1]))


def test_seed_zero_is_a_seed(sdxl):
    one, two = sdxl.ours("a star", seed=0)[0], sdxl.ours("a star", seed=0)[0]
    assert one.tobytes() == two.tobytes()
    assert sdxl.ours("a star")[0].tobytes() != sdxl.ours("a star")[0].tobytes()


@pytest.fixture(scope="module")
def full_lcm(tmp_path_factory):
    """SD1.5 with a guidance embedding and v prediction, bundle of batch 2: no LoRA is looked for."""
    folder = tmp_path_factory.mktemp("full")
    base = factories.write_sd15(
        folder / "base", factor=4, prediction_type="v_prediction", time_cond_proj_dim=16
    )
    spec = BuildSpec(base=str(base), batch=2, height=48, width=64, backend="torchscript")
    with load(build(spec, folder / "bundle")) as ours:
        yield Pair(ours, reference(base), 48, 64)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5, 8.0])
def test_full_lcm_takes_guidance_as_an_input(full_lcm, guidance_scale):
    assert min(full_lcm.psnr(guidance_scale=guidance_scale)) >= FLOOR


def test_batch_of_two_draws_three_pictures(full_lcm):
    assert min(full_lcm.psnr(num_images=3)) >= FLOOR


@dataclass
class Watched(Runner):
    """A runner that tells in which order it is used; its clock tells how often it was asked."""

    runner: Runner
    told: list[str]

    @property
    def contract(self):
        return self.runner.contract

    def __call__(self, inputs):
        self.told.append(self.contract.name)
        return self.runner(inputs)

    def to_device(self, array):
        self.told.append("to the device")
        return self.runner.to_device(array)

    def to_host(self, array):
        self.told.append("to the host")
        return self.runner.to_host(array)

    def mark(self):
        return len(self.told)

    def between(self, start, end):
        return end - start

    def close(self):
        self.runner.close()


def test_within_a_picture_the_host_waits_for_nothing(sdxl):
    """A copy to the host between two steps would leave a GPU without work; one from it is queued."""
    told: list[str] = []
    runners = {name: Watched(runner, told) for name, runner in sdxl.ours.runners.items()}
    watched = LcmPipeline(sdxl.ours.settings, runners, sdxl.ours.prompts.tokenizers)
    drawing = watched.draw(Request("a small blue ring", 3))
    loop = told[told.index("step") :]
    copied = ["step", "to the device"] * 2  # noise for the second and the third
    assert loop == [*copied, "step", "step", "decode", "to the host", "to the host"]
    # Stages are timed by the device's clock; what is prepared on the host is none's. The latent comes to the
    # host with the picture.
    assert drawing.ms["step"] == [1, 1, 1, 1] and drawing.ms["decode"] == 3


def filling(sdxl, stage, output, value):
    """A pipeline whose stage gives nothing but this value."""

    class Filled(Watched):
        def __call__(self, inputs):
            arrays = super().__call__(inputs)
            return {**arrays, output: np.full_like(arrays[output], value)} if output in arrays else arrays

    runners = {**sdxl.ours.runners, stage: Filled(sdxl.ours.runners[stage], [])}
    return LcmPipeline(sdxl.ours.settings, runners, sdxl.ours.prompts.tokenizers)


def test_nan_is_an_error_and_no_picture(sdxl):
    shown = []
    pipeline = filling(sdxl, "step", "next_latent", np.nan)
    with pytest.raises(BackendError, match="overflow") as error:
        pipeline.draw(Request("a small blue ring", 3), show=shown.append)
    assert "verify" in error.value.hint and not shown


@pytest.mark.parametrize("colour", [0, 128, 255])
def test_a_picture_of_one_colour_is_drawn_with_a_warning(sdxl, colour):
    """It may be what was asked for; but where a decoder gives 8 bits, NaN is black."""
    with pytest.warns(UserWarning, match="one colour"):
        pictures = filling(sdxl, "decode", "picture", colour)("a black wall", seed=3)
    assert pictures[0].getextrema() == ((colour, colour),) * 3
