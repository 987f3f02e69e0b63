"""Half precision: layers that would overflow fp16 stay fp32, and the stage stays right."""

from __future__ import annotations

import copy
import json
import shutil
import time

import pytest
import torch
from factories import load_modules
from safetensors.torch import load_file, save_file

from lcm_compile.builder.export import export
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.engines import find_backend
from lcm_compile.export import export_stage
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import STAGE_FLOORS, snr_db
from lcm_compile.proof.recording import TorchRunner
from lcm_compile.spec import BuildSpec, Shape
from lcm_compile.stages.half_precision import FP16_LIMIT, layers_over, record_peaks, to_precision
from lcm_compile.stages.stage import Stage, make_stages
from lcm_compile.targets import find_target


def stages_of(checkpoint, change=lambda modules: None):
    opened = open_checkpoint(str(checkpoint))
    modules = load_modules(opened)
    change(modules)
    return {stage.name: stage for stage in make_stages(opened, modules.named(), Shape(1, 64, 64))}


def inputs_of(stage):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(spec.shape, generator=generator)
        if spec.dtype == "float32"
        else torch.randint(0, 200, spec.shape, generator=generator)
        for spec in stage.contract.inputs
    ]


def loud(modules):
    """A VAE as SDXL's own: its residual stream passes 65,504, its picture does not."""
    with torch.no_grad():
        decoder = modules.vae.decoder
        for block in (decoder.up_blocks[0].resnets[0], decoder.up_blocks[1].resnets[1]):
            block.conv2.weight.mul_(3e5 / 2)
            block.conv2.bias.mul_(1e5)


def test_plain_fp16_would_overflow_and_the_kept_layers_do_not(sdxl_checkpoint):
    stage = stages_of(sdxl_checkpoint, loud)["decode"]
    inputs = inputs_of(stage)
    with record_peaks(stage.module) as peaks:
        reference = stage.module(*inputs).numpy()
    assert max(max(pair) for pair in peaks.values()) > 65_504
    assert reference.std() > 0.01

    plain = to_precision(copy.deepcopy(stage.module), "fp16")(*inputs).numpy()
    assert snr_db(reference, plain) < STAGE_FLOORS["fp16"]

    kept = layers_over(stage.module, peaks)
    every = {n for n, m in stage.module.named_modules() if not list(m.children()) and list(m.parameters())}
    assert kept and kept < every
    mixed = to_precision(stage.module, "fp16", kept)
    assert snr_db(reference, mixed(*inputs).numpy()) >= STAGE_FLOORS["fp16"]


def test_no_fp16_layer_sees_a_value_over_the_limit(sdxl_checkpoint):
    stage = stages_of(sdxl_checkpoint, loud)["decode"]
    inputs = inputs_of(stage)
    with record_peaks(stage.module) as peaks:
        stage.module(*inputs)
    mixed = to_precision(stage.module, "fp16", layers_over(stage.module, peaks))
    halves = {
        n
        for n, m in mixed.named_modules()
        if [p for p in m.parameters(recurse=False) if p.dtype == torch.float16]
    }
    with record_peaks(mixed) as seen:
        mixed(*inputs)
    assert halves
    assert all(max(seen[name]) <= FP16_LIMIT * 1.01 for name in halves)


def test_mixed_graph_exports_and_keeps_its_casts(sdxl_checkpoint, tmp_path):
    stage = stages_of(sdxl_checkpoint, loud)["decode"]
    inputs = inputs_of(stage)
    with record_peaks(stage.module) as peaks:
        reference = stage.module(*inputs).numpy()
    mixed = Stage(stage.contract, to_precision(stage.module, "fp16", layers_over(stage.module, peaks)))
    graph = export_stage(mixed, "onnx", Precision.FP16, tmp_path)
    with find_backend("onnxruntime").load(graph.path, stage.contract, find_target("cpu")) as runner:
        actual = runner({"latent": inputs[0].numpy()})["picture"]
    assert snr_db(reference, actual) >= STAGE_FLOORS["fp16"]
    import onnx

    types = {t.data_type for t in onnx.load(graph.path).graph.initializer}
    assert {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16} <= types


def test_rtx_builds_a_mixed_graph(sdxl_checkpoint, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    stage = stages_of(sdxl_checkpoint, loud)["decode"]
    with record_peaks(stage.module) as peaks:
        stage.module(*inputs_of(stage))
    mixed = Stage(stage.contract, to_precision(stage.module, "fp16", layers_over(stage.module, peaks)))
    graph = export_stage(mixed, "onnx", Precision.FP16, tmp_path)
    engines = tmp_path / "engines"
    engines.mkdir()
    backend, a10 = find_backend("tensorrt-rtx"), find_target("a10")
    path = backend.build(graph, a10, engines, backend.options(a10, Precision.FP16, ()))
    assert path.stat().st_size > 100_000


@pytest.fixture(scope="module")
def loud_checkpoint(sdxl_checkpoint, tmp_path_factory):
    base = shutil.copytree(sdxl_checkpoint, tmp_path_factory.mktemp("loud") / "base")
    modules = load_modules(open_checkpoint(str(base)))
    loud(modules)
    modules.vae.save_pretrained(base / "vae")
    return base


def test_layers_that_stay_fp32_are_told(command, loud_checkpoint, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "b"
    code, _, err = command("build", "--base", loud_checkpoint, "--no-lcm", "--gpu", "a10", "--out", out)
    assert code == 0, err
    layers = json.loads(command("inspect", out, "--json")[1])["fp32_layers"]
    assert list(layers) == ["decode"] and 0 < len(layers["decode"]) < 60
    told = (
        f"decode: {len(layers['decode'])} layers stay fp32, as fp16 would overflow: lcm-compile inspect {out}"
    )
    assert [line for line in err.splitlines() if "stay fp32" in line] == [told]
    assert any(name.startswith("decoder.up_blocks.0.resnets.0.") for name in layers["decode"])
    inspected = command("inspect", out)[1]
    assert all(name in inspected for name in layers["decode"])


@pytest.mark.parametrize("base", ["loud_checkpoint", "sdxl_checkpoint"])
def test_an_export_tells_them_where_there_are_some(command, request, base, tmp_path):
    folder = request.getfixturevalue(base)
    code, _, err = command("export", "--base", folder, "--no-lcm", "--out", tmp_path / "graphs")
    assert code == 0, err
    loudly = "layers stay fp32, as fp16 would overflow: " + str(tmp_path / "graphs" / "export.json")
    assert (loudly in err) == (base == "loud_checkpoint") == ("stay fp32" in err)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["encode", "step", "decode"])
def test_half_stages_take_and_give_fp32(sdxl_checkpoint, name, precision):
    stage = stages_of(sdxl_checkpoint)[name]
    inputs = inputs_of(stage)
    reference = stage.module(*inputs)
    half = to_precision(stage.module, precision)(*inputs)
    for a, b in zip(as_tuple(reference), as_tuple(half), strict=True):
        assert b.dtype == torch.float32
        assert snr_db(a.numpy(), b.numpy()) >= STAGE_FLOORS[precision]


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_latent_scaling_stays_exact_in_half_precision(sdxl_checkpoint):
    opened = open_checkpoint(str(sdxl_checkpoint))
    stages = {s.name: s for s in make_stages(opened, load_modules(opened).named(), Shape(1, 1000, 1016))}
    decode = to_precision(stages["decode"].module, "fp16")
    assert decode.scale.unique().item() == pytest.approx(1 / 0.13025, rel=1e-6)


def test_a_block_whose_sum_overflows_is_kept_whole():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

        def forward(self, x):
            return self.one(x) + self.two(x)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.last = torch.nn.Linear(1, 1), Block(), torch.nn.Linear(1, 1)

        def forward(self, x):
            return self.last(self.block(self.first(x)) * 1e-3)

    net = Net()
    peaks = {
        "first": (1.0, 1.0),
        "block": (1.0, 40_000.0),
        "block.one": (1.0, 20_000.0),
        "block.two": (1.0, 20_000.0),
        "last": (40.0, 1.0),
    }
    assert layers_over(net, peaks) == {"block.one", "block.two"}


def test_the_encoder_of_pictures_is_held_to_the_same(sdxl_checkpoint, tmp_path):
    """Its overflowing layers stay in fp32, and its graph is near torch's."""
    base = shutil.copytree(sdxl_checkpoint, tmp_path / "base")
    path = base / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.startswith("encoder.down_blocks.1.resnets.0.conv2."):
            weights[name] = weights[name] * 1e6
    save_file(weights, path)
    spec = BuildSpec(str(base), no_lcm=True, precision="fp16", image=True)
    manifest = export(spec, tmp_path / "graphs")
    [stage] = [stage for stage in manifest.stages if stage.contract.name == "encode-image"]
    assert 0 < len(stage.fp32_layers) < 60 and stage.largest_activation > 65504
    assert any(name.startswith("encoder.down_blocks.1.resnets.0.") for name in stage.fp32_layers)
    assert 45 <= manifest.parity["encode-image"].db < 110


def test_a_processor_adds_up_fp16_in_fp32_and_in_no_more_time():
    """What is checked in place of an engine for a GPU that is not here."""

    class Halves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = torch.nn.Conv2d(320, 320, 3, padding=1), torch.nn.Linear(320, 640)

        def forward(self, x):
            x = self.conv(x.to(self.conv.weight.dtype))
            return self.linear(x.flatten(2).transpose(1, 2)).float()

    torch.manual_seed(0)
    module = Halves().eval().requires_grad_(False)
    x = torch.randn(1, 320, 16, 16)
    contract = StageContract(
        "halves",
        (TensorSpec("x", (1, 320, 16, 16), "float32", ""),),
        (TensorSpec("y", (1, 256, 640), "float32", ""),),
    )
    seconds = {}
    for precision in ("fp32", "fp16"):
        runner = TorchRunner(Stage(contract, to_precision(module, precision)))
        runner({"x": x.numpy()})
        start = time.process_time()
        given = runner({"x": x.numpy()})["y"]
        seconds[precision] = time.process_time() - start
    convolved = torch.nn.functional.conv2d(
        x.half().float(), module.conv.weight.float(), module.conv.bias.float(), padding=1
    )
    products = convolved.half().float().flatten(2).transpose(1, 2) @ module.linear.weight.float().T
    expected = (products + module.linear.bias.float()).half().float()
    assert snr_db(expected.numpy(), given) > 90  # torch's own are 69 dB from it
    assert seconds["fp16"] < 20 * seconds["fp32"]
