"""AOTInductor: engines compiled by torch, which run anywhere that has torch and this instruction set."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler
from factories import load_modules
from torch._guards import detect_fake_mode

from lcm_compile import BuildSpec, build, load
from lcm_compile.checkpoint.find import open_checkpoint
from lcm_compile.engines import aotinductor
from lcm_compile.errors import BackendError
from lcm_compile.export import export_stage
from lcm_compile.graphs import StageContract
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.request import Request
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import psnr_db, snr_db
from lcm_compile.spec import REWRITES, Shape
from lcm_compile.stages.half_precision import to_precision
from lcm_compile.stages.stage import make_stages, rewrite_modules
from lcm_compile.system.processor import instruction_set
from lcm_compile.targets import find_target

CPU = find_target("cpu")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def decode(sdxl_checkpoint, tmp_path_factory):
    """The decoder's engine, moved away from where it was built, and its contract."""
    folder = tmp_path_factory.mktemp("aotinductor")
    (folder / "graphs").mkdir()
    (folder / "engines").mkdir()
    checkpoint = open_checkpoint(str(sdxl_checkpoint))
    stage = make_stages(checkpoint, load_modules(checkpoint).named(), Shape(1, 64, 64))[2]
    graph = export_stage(stage, aotinductor.GRAPH_FORMAT, Precision.FP32, folder / "graphs")
    path = aotinductor.build(graph, CPU, folder / "engines", aotinductor.options(CPU))
    assert {p.name for p in (folder / "engines").iterdir()} == {"decode.pt2", "decode.safetensors"}
    path.with_suffix(".safetensors").rename(folder / "moved.safetensors")
    moved = path.rename(folder / "moved.pt2")
    shutil.rmtree(folder / "graphs")
    shutil.rmtree(folder / "engines")
    return moved, stage.contract


def latents(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, 16, 16, generator=generator).numpy() for _ in range(count)]


def decoded(checkpoint, latent):
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae")
    with torch.no_grad():
        picture = vae.decode(torch.from_numpy(latent) / vae.config.scaling_factor).sample
    return (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_the_engine_computes_what_diffusers_does(decode, sdxl_checkpoint):
    latent = latents(1)[0]
    with aotinductor.load(*decode, CPU) as runner:
        picture = runner.to_host(runner({"latent": latent})["picture"])
    assert snr_db(decoded(sdxl_checkpoint, latent), picture) > 100


def test_it_runs_without_a_compiler_or_diffusers(decode, tmp_path, sdxl_checkpoint):
    """In a process of its own, from a folder that holds nothing but the engine."""
    path, contract = decode
    np.save(tmp_path / "latent.npy", latents(1)[0])
    script = f"""
import sys, numpy as np
from pathlib import Path
from lcm_compile.engines import aotinductor
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.targets import find_target
latent = np.load("latent.npy")
runner = aotinductor.load(Path({str(path)!r}), {contract!r}, find_target("cpu"))
np.save("picture.npy", runner.to_host(runner({{"latent": latent}})["picture"]))
assert not set(sys.modules) & {{"diffusers", "transformers", "sympy", "torch._dynamo"}}
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env={"PATH": "/nonexistent"})
    assert snr_db(decoded(sdxl_checkpoint, latents(1)[0]), np.load(tmp_path / "picture.npy")) > 100


def test_arrays_of_other_layouts_and_types_give_the_same_picture(decode):
    """Compiled code reads memory as it was told to; the runner brings every array into that form."""
    latent = latents(1)[0]
    strided = np.empty((1, 4, 16, 32), np.float32)[..., ::2]
    strided[...] = latent
    frozen = latent.copy()
    frozen.flags.writeable = False
    with aotinductor.load(*decode, CPU) as runner:
        expected = runner({"latent": latent})["picture"]
        for other in (strided, frozen, latent.astype(np.float64), torch.from_numpy(latent)):
            np.testing.assert_array_equal(runner({"latent": other})["picture"], expected)


def test_without_a_temporary_folder_the_variable_is_named(decode, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(BackendError, match="temporary directory") as error:
        aotinductor.load(*decode, CPU)
    assert "TMPDIR" in error.value.hint


def test_an_array_of_another_shape_is_refused(decode):
    with aotinductor.load(*decode, CPU) as runner, pytest.raises(BackendError, match=r"not \(1, 4, 8, 8\)"):
        runner({"latent": np.zeros((1, 4, 8, 8), np.float32)})


def test_threads_may_share_a_runner(decode):
    given = latents(4)
    found = {}
    with aotinductor.load(*decode, CPU) as runner:
        expected = [runner({"latent": latent})["picture"] for latent in given]

        def work(i):
            found[i] = [runner({"latent": given[i]})["picture"] for _ in range(5)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, pictures in found.items():
        assert all((picture == expected[i]).all() for picture in pictures)
    assert len(found) == 4


def test_a_broken_engine_is_a_plain_error(decode, tmp_path):
    path = tmp_path / "decode.pt2"
    path.write_bytes(decode[0].read_bytes()[:1000])
    with pytest.raises(BackendError, match="can't open"):
        aotinductor.load(path, decode[1], CPU)
    shutil.copy(decode[0], path)
    with pytest.raises(BackendError, match=r"decode\.safetensors"):  # an engine without its weights
        aotinductor.load(path, decode[1], CPU)
    weights = path.with_suffix(".safetensors")
    weights.write_bytes(decode[0].with_suffix(".safetensors").read_bytes()[:1000])
    with pytest.raises(BackendError, match="can't open"):
        aotinductor.load(path, decode[1], CPU)


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "g++ is not installed" in (aotinductor.cannot_build(CPU, Precision.FP32) or "")
    assert aotinductor.cannot_run(CPU) is None
    monkeypatch.setenv("CXX", sys.executable)
    assert aotinductor.cannot_build(CPU, Precision.FP32) is None


@pytest.mark.parametrize(("precision", "exact"), [("fp32", True), ("int8+fp32", True), ("fp16", False)])
def test_a_stage_in_fp32_does_not_round_to_tf32_on_a_gpu(decode, monkeypatch, precision, exact):
    """By what torch is set to while the engine runs. It runs on the processor, where nothing rounds."""
    seen = []

    def settings():
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    class Model:
        def run(self, inputs):
            seen.append(settings())
            return model.run(inputs)

    torch.set_float32_matmul_precision("high")
    try:
        with aotinductor.load(*decode, CPU, Precision(precision)) as runner:
            model = runner._model
            monkeypatch.setattr(runner, "_model", Model())
            monkeypatch.setattr(runner, "device", "cuda")
            monkeypatch.setattr(runner, "tensor", lambda spec, array: torch.from_numpy(array))
            runner({"latent": latents(1)[0]})
            assert seen == [(False, "highest") if exact else (True, "high")]
            assert settings() == (True, "high")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_key_holds_the_instruction_set(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    core = "flags\t\t: fpu sse sse4_2 avx2 avx512f avx512_bf16 amx_int8 hypervisor\n"
    cpuinfo.write_text(core + core.replace(" amx_int8", ""))
    assert instruction_set(cpuinfo)[1:] == ["avx2", "avx512_bf16", "avx512f", "sse4_2"]
    here = aotinductor.options(CPU)["instruction_set"]
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("avx512f" in here) >= ("AVX512" in capability) and ("avx2" in here) >= ("AVX" in capability)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "floor"), [("fp32", 65), ("bf16", 25)])
def test_a_bundle_draws_what_diffusers_draws(sdxl_checkpoint, tmp_path, precision, floor):
    """About a minute of compiling for each precision."""
    spec = BuildSpec(
        base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="aotinductor", precision=precision
    )
    bundle = build(spec, tmp_path / "bundle")
    theirs = DiffusionPipeline.from_pretrained(sdxl_checkpoint)
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(7)
    expected = theirs("a red star", num_inference_steps=4, guidance_scale=1.0, generator=generator,
                      height=64, width=64, output_type="np").images  # fmt: skip
    with load(bundle) as ours:
        assert psnr_db(eight_bits(expected), ours.draw(Request("a red star", 7)).pictures) >= floor


def test_on_a_gpu_every_array_of_a_graph_is_there(sdxl_checkpoint, tmp_path):
    """The graphs that are moved before they are compiled, run on torch's fake GPU: it knows shapes, types
    and devices, and refuses to mix devices, as a real one does."""
    from torch.export.passes import move_to_device_pass

    checkpoint, shape = open_checkpoint(str(sdxl_checkpoint)), Shape(1, 64, 64)
    modules = rewrite_modules(load_modules(checkpoint).named(), REWRITES, [shape], checkpoint.vae_factor)
    for stage in make_stages(checkpoint, modules, shape, REWRITES):
        to_precision(stage.module, "fp16")
        program = torch.export.load(
            export_stage(stage, aotinductor.GRAPH_FORMAT, Precision.FP16, tmp_path).path
        )
        mode = detect_fake_mode([node.meta.get("val") for node in program.graph.nodes])
        for arrays in (program._state_dict, program._constants):
            arrays.update({name: mode.from_tensor(array.detach()) for name, array in arrays.items()})
        program._example_inputs = (tuple(mode.from_tensor(a) for a in program.example_inputs[0]), {})
        program.validate = lambda: None  # it wants parameters, which fake arrays are not
        with mode:
            moved = move_to_device_pass(program, "cuda:0")
            given = [node.meta["val"] for node in moved.graph.nodes if node.op == "placeholder"]
            outputs = torch.fx.Interpreter(moved.graph_module).run(*given)
        told = [(tuple(o.shape), str(o.dtype).removeprefix("torch."), o.device.type) for o in outputs]
        assert told == [(spec.shape, spec.dtype, "cuda") for spec in stage.contract.outputs]


def test_cudnn_times_its_convolutions_in_the_first_call_alone(monkeypatch):
    """Torch keeps the kernel of a convolution's first call, which is never captured: no later one chooses."""
    seen = []

    class Loader:
        def __init__(self, *_):
            pass

        def get_metadata(self):
            return {"AOTI_DEVICE_KEY": "cuda"}

        def load_constants(self, *_):
            pass

        def run(self, arrays):
            seen.append(torch.backends.cudnn.benchmark)
            return []

    monkeypatch.setattr(aotinductor, "read_weights", lambda path, device: {})
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
    runner = aotinductor.AotInductorRunner(Path("decode.pt2"), StageContract("decode", (), ()))
    for _ in range(3):
        runner({})
    assert seen == [True, False, False] and not torch.backends.cudnn.benchmark
