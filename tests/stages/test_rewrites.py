"""Graphs shaped for LCM give what diffusers' own modules give, with less arithmetic."""

from __future__ import annotations

import factories
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from factories import load_modules
from torch.utils.flop_counter import FlopCounterMode

from lcm_compile import BuildSpec, build, load
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.errors import ParityError
from lcm_compile.export.onnx_graph import onnx_from_stage
from lcm_compile.pipeline.request import Request
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import psnr_db, snr_db
from lcm_compile.samplers import schedule
from lcm_compile.spec import ENGINE_REWRITES, REWRITES, Shape
from lcm_compile.stages.contracts import CONTEXT_STEPS, make_contracts
from lcm_compile.stages.rewrites import Upsampling, doublings
from lcm_compile.stages.stage import make_stages, rewrite_modules

DB = 100.0  # fp32 in another order


@pytest.fixture(scope="module")
def lcm_checkpoint(tmp_path_factory):
    """A full LCM, whose UNet takes the guidance scale."""
    return factories.write_sd15(tmp_path_factory.mktemp("full"), time_cond_proj_dim=16)


def shaped(path, shape, rewrites=tuple(REWRITES)):
    checkpoint = open_checkpoint(str(path))
    modules = rewrite_modules(load_modules(checkpoint).named(), rewrites, [shape], checkpoint.vae_factor)
    return {stage.name: stage for stage in make_stages(checkpoint, modules, shape, rewrites)}


def call(stage, given):
    with torch.no_grad():
        outputs = stage.module(*(given[spec.name] for spec in stage.contract.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = dict(zip([spec.name for spec in stage.contract.outputs], outputs, strict=True))
    assert {name: tuple(array.shape) for name, array in found.items()} == {
        spec.name: spec.shape for spec in stage.contract.outputs
    }
    return found


@pytest.fixture(params=["sd15", "sdxl", "lcm"])
def checkpoint(request):
    return request.getfixturevalue(f"{request.param}_checkpoint")


@pytest.mark.parametrize("shape", [Shape(1, 64, 64), Shape(2, 64, 104)], ids=str)
def test_context_and_step_are_diffusers_unet_and_scheduler(checkpoint, shape):
    opened = open_checkpoint(str(checkpoint))
    stages = shaped(checkpoint, shape)
    generator = torch.Generator().manual_seed(0)
    steps = schedule("lcm", 4, opened.scheduler).steps
    contracts = stages["context"].contract, stages["step"].contract
    given = {
        spec.name: torch.randn(spec.shape, generator=generator)
        for contract in contracts
        for spec in contract.inputs
    }
    given["timesteps"] = torch.tensor([float(step.timestep) for step in steps])
    context = call(stages["context"], given)
    i = 2
    given |= {**context, "time": context["times"][i]}
    given["coefficients"] = torch.tensor(steps[i].coefficients)
    found = call(stages["step"], given)

    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    options = {}
    if "pooled" in given:
        options["added_cond_kwargs"] = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    if "guidance" in given:
        from diffusers import LatentConsistencyModelPipeline as Pipeline

        embedding = Pipeline.get_guidance_scale_embedding(None, given["guidance"], embedding_dim=16)
        options["timestep_cond"] = embedding
    with torch.no_grad():
        expected = unet(given["latent"], steps[i].timestep, given["hidden_states"], **options).sample
    assert snr_db(expected.numpy(), found["prediction"].numpy()) > DB

    scheduler = LCMScheduler.from_config(opened.scheduler_config)
    scheduler.set_timesteps(4)
    scheduler._step_index = i
    torch.manual_seed(1)
    noise = torch.randn(given["noise"].shape)
    torch.manual_seed(1)
    after = scheduler.step(expected, steps[i].timestep, given["latent"]).prev_sample
    found = call(stages["step"], {**given, "noise": noise})
    assert snr_db(after.numpy(), found["next_latent"].numpy()) > DB


def test_the_step_no_longer_computes_what_the_prompt_settles(sdxl_checkpoint):
    """Fewer operations, by as many as keys, values and time embeddings take."""
    shape = Shape(1, 64, 64)
    plain, context = shaped(sdxl_checkpoint, shape, ()), shaped(sdxl_checkpoint, shape, ("context",))
    unet = UNet2DConditionModel.from_pretrained(sdxl_checkpoint / "unet")
    layers = [m for name, m in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    times = [m for name, m in unet.named_modules() if name.endswith("time_emb_proj")]
    added = [*unet.time_embedding.modules(), *unet.add_embedding.modules()]
    linears = [m for m in added if isinstance(m, torch.nn.Linear)]
    saved = 2 * sum(77 * m.weight.numel() for m in layers)
    saved += 2 * sum(m.weight.numel() for m in (*times, *linears))
    assert flops(plain["step"]) - flops(context["step"]) == saved


def flops(stage):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stage.module(*stage.example_inputs())
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8)])
def test_upsampling_is_exact_at_every_pixel(size):
    conv = torch.nn.Conv2d(6, 10, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    with FlopCounterMode(display=False) as counter:
        found = Upsampling(conv)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    if size == (8, 8):
        assert counter.get_total_flops() < 0.6 * 2 * 2 * 10 * 6 * 9 * 16 * 16


def test_a_decoder_takes_fewer_operations_and_gives_eight_bits(sd15_checkpoint):
    shape = Shape(1, 64, 64)
    plain, rewritten = (shaped(sd15_checkpoint, shape, some)["decode"] for some in ((), tuple(REWRITES)))
    assert flops(rewritten) < 0.9 * flops(plain)
    vae = AutoencoderKL.from_pretrained(sd15_checkpoint / "vae")
    latent = torch.randn(plain.contract.inputs[0].shape)
    with torch.no_grad():
        picture = vae.decode(latent / vae.config.scaling_factor).sample
    expected = (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
    found = call(rewritten, {"latent": latent})["picture"]
    assert found.dtype == torch.uint8
    assert (found - expected).abs().max() <= 0.501


@pytest.mark.parametrize(
    ("latent", "exact"),
    [((64, 64), [True] * 3), ((100, 64), [False, True, True]), ((125, 127), [True, False, False])],
)
def test_only_maps_that_double_are_rewritten(latent, exact):
    """100 is halved to 50, 25 and 13, and 13 goes back to 25."""
    assert doublings(latent, 3) == exact


def test_a_unet_that_is_told_more_is_refused(tmp_path, refused):
    path = factories.write_sd15(tmp_path / "odd", class_embed_type="timestep")
    refused(1, "class_embed_type is 'timestep'", "build", "--base", path, "--gpu", "cpu", "--no-lcm")


def test_a_unet_that_no_context_can_be_taken_from_is_told_the_way_out(tmp_path, command):
    path = factories.write_sd15(tmp_path / "odd", time_embedding_act_fn="silu")
    words = "build", "--base", path, "--gpu", "cpu", "--no-lcm", "--out", tmp_path / "b"
    code, _, err = command(*words)
    assert code == 1 and "no context can be taken" in err and "try: --without context" in err
    assert command(*words, "--without", "context")[0] == 0


@pytest.mark.parametrize("name", [name for name in REWRITES if name not in ENGINE_REWRITES])
def test_each_rewrite_can_be_left_out(name, sd15_checkpoint, tmp_path):
    """The bundle is another one, and draws the same picture with and without guidance, in 4 and 6 steps."""
    base = BuildSpec(base=str(sd15_checkpoint), no_lcm=True, few_step="lcm")
    whole, part = build(base), build(BuildSpec(base=base.base, no_lcm=True, few_step="lcm", without=(name,)))
    assert whole.manifest.key != part.manifest.key and f"--without {name}" in part.manifest.spec.command()
    stages = [stage.contract for stage in whole.manifest.stages], [s.contract for s in part.manifest.stages]
    assert (stages[0] == stages[1]) == (name in ("qkv", "upsampling"))
    with load(whole) as one, load(part) as other:
        for request in (
            Request("a red star", 7),
            Request("a red star", 7, "blue", steps=6, guidance_scale=1.5, num_images=2),
        ):
            pictures = one.draw(request).pictures, other.draw(request).pictures
            assert psnr_db(*pictures) > 65 and pictures[0].std() > 3


def test_an_unknown_rewrite_is_told(refused):
    words = "build", "--base", "demo", "--gpu", "cpu", "--without", "upsamplign"
    refused(2, ["upsamplign", "upsampling"], *words)


def test_a_rewrite_that_is_not_exact_is_not_published(sd15_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("lcm_compile.stages.rewrites.corner_kernel", lambda weight, *_: weight[..., :2, :2])
    with pytest.raises(ParityError, match="rewritten for LCM, the model's prediction"):
        build(BuildSpec(base=str(sd15_checkpoint), no_lcm=True, few_step="lcm"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_graphs_hold_no_sequences(sdxl_checkpoint, tmp_path):
    """As exported, before any engine: TensorRT's parser refuses them. They come from GEGLU's chunk."""
    stages = shaped(sdxl_checkpoint, Shape(1, 64, 64)).values()
    for stage in stages:
        model = onnx.load(onnx_from_stage(stage, Precision.FP32, tmp_path).path)
        nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
        assert nodes and not [node.op_type for node in nodes if "Sequence" in node.op_type], stage.name
        halves = [node for node in nodes if node.op_type == "Split" and len(node.output) == 2]
        geglus = [m for m in stage.module.modules() if isinstance(m, GEGLU)]
        assert len(halves) >= len(geglus), stage.name


def test_the_timesteps_of_one_context_are_those_of_four_steps(sdxl_checkpoint):
    contracts = make_contracts(open_checkpoint(str(sdxl_checkpoint)), Shape(1, 64, 64), REWRITES)
    assert contracts["context"].inputs[0].shape == (CONTEXT_STEPS,) == (4,)
    heads = {spec.name: spec.shape for spec in contracts["context"].outputs[:-1]}
    assert all(np.prod(shape[2:]) % 77 == 0 for shape in heads.values())
