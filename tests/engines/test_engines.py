"""Backends: what they build, what they refuse, and how their runners take arrays."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lcm_compile import BuildSpec, build, load
from lcm_compile.builder.doctor import try_backend
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.engines import (
    BACKENDS,
    choose_backend,
    find_backend,
    find_target_here,
    gpu,
    onnxruntime,
    tensorrt,
    tensorrt_caches,
)
from lcm_compile.errors import BackendError, UsageError
from lcm_compile.graphs import ExportedGraph, StageContract
from lcm_compile.pipeline.pipeline import LcmPipeline
from lcm_compile.pipeline.prompts import Condition
from lcm_compile.pipeline.request import Request
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import psnr_db, snr_db
from lcm_compile.proof.recording import read_calls
from lcm_compile.system.versions import installed_version
from lcm_compile.targets import TARGETS, find_target

CPU = find_target("cpu")
# What the manifest says of engines for a GPU that is not here.
NOT_RUN = "the engine was compiled without the GPU, not yet run"


def test_threads_of_a_stage_do_not_take_the_cores_from_the_next(sdxl_bundle):
    """While nothing is asked of a session, its threads take no time: others would wait for the core."""
    bundle = open_bundle(sdxl_bundle)
    stage = bundle.manifest.stages[-1]
    session = onnxruntime.open_checked(bundle.path(stage.file), stage.contract, [onnxruntime.CPU])
    waiting = session.get_session_options().get_session_config_entry("session.intra_op.allow_spinning")
    assert waiting == "0"


def test_rtx_builds_every_stage_for_an_absent_a10(a10_bundle):
    manifest = a10_bundle.manifest
    assert (manifest.target.compute_capability, manifest.backend) == ("8.6", "tensorrt-rtx")
    for stage in manifest.stages:
        assert stage.precision == "fp16"
        engine = a10_bundle.path(stage.file).read_bytes()
        # A serialised plan, of the size of its weights, not an ONNX file under another name.
        assert engine[:4] in (b"ftrt", b"rttr", b"trtx") or b"TRT" in engine[:4096].upper()
        assert len(engine) > 200_000


def test_manifest_says_that_the_graph_was_checked_and_not_the_engine(a10_bundle):
    figures = a10_bundle.manifest.parity
    if gpu.gpu_here() is None:
        assert {f.checked for f in figures.values()} == {f"graph, on ONNX Runtime's CPU provider; {NOT_RUN}"}
    assert all(figures[name].db >= 45 for name in ("encode", "context", "step", "decode"))


def test_rtx_builds_bf16_and_says_what_was_compared(sdxl_checkpoint, tmp_path):
    """ONNX Runtime's CPU provider has no bf16 kernels."""
    pytest.importorskip("tensorrt_rtx")
    spec = BuildSpec(base=str(sdxl_checkpoint), gpu="a10", no_lcm=True, few_step="lcm", precision="bf16")
    manifest = build(spec, tmp_path / "bundle").manifest
    if gpu.gpu_here() is None:
        assert {f.checked for f in manifest.parity.values()} == {f"torch module that was exported; {NOT_RUN}"}
    assert {stage.precision for stage in manifest.stages} == {"bf16"}
    assert all(30 <= manifest.parity[name].db < 80 for name in ("encode", "context", "step", "decode"))


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"])
def test_rtx_builds_for_each_capability(capability):
    pytest.importorskip("tensorrt_rtx")
    target = next(t for t in TARGETS.values() if t.compute_capability == capability)
    assert choose_backend(target, Precision.FP16)[0] == "tensorrt-rtx"
    try_backend(find_backend("tensorrt-rtx"), target, Precision.FP16)


def test_t4_has_no_bf16():
    assert Precision.BF16 in (
        find_backend("tensorrt-rtx").cannot_build(find_target("t4"), Precision.BF16) or ""
    )


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_hopper_needs_tensorrt_on_the_gpu_itself(name):
    if gpu.gpu_here():
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError) as caught:
        choose_backend(find_target(name), Precision.FP16)
    assert all(f"{backend}: " in caught.value.message for backend in BACKENDS)
    hint = caught.value.hint or ""
    assert find_target(name).description in hint and "pip install 'lcm-compile[tensorrt]'" in hint


def test_timings_are_kept_for_the_next_build(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    path = tmp_path / "new" / "timings.bin"
    for content in (None, b"no timing cache"):
        if content:
            path.write_bytes(content)
        with tensorrt_caches.keeping_timings(config, path):
            assert config.get_timing_cache() is not None
        written = path.read_bytes()
        assert config.create_timing_cache(written) is not None and written != content


def test_timings_that_cannot_be_told_are_not_kept(tmp_path, monkeypatch):
    """A build has succeeded then, and the file has those of former builds."""
    trt = pytest.importorskip("tensorrt_rtx")
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    path = tmp_path / "timings.bin"
    path.write_bytes(b"of former builds")
    monkeypatch.setattr(trt.ITimingCache, "serialize", lambda cache: None)
    with tensorrt_caches.keeping_timings(config, path):
        pass
    assert path.read_bytes() == b"of former builds"


def test_an_engine_whose_header_is_broken_is_refused_before_it_is_read(tmp_path, a10_bundle):
    path = tmp_path / "decode.engine"
    path.write_bytes(bytes(100))
    stage = a10_bundle.manifest.stages[2]
    with pytest.raises(BackendError, match=r"decode\.engine: malformed engine"):
        find_backend("tensorrt-rtx").load(path, stage.contract, find_target("a10"))


def test_what_an_inspected_engine_consists_of():
    """Layers are bare names where a build kept no more."""
    layers = [
        {"Name": "a", "Outputs": [{"Format/Datatype": "FP16 NHWC"}, {"Format/Datatype": "FP32"}]},
        {"Name": "b", "Outputs": [{"Format/Datatype": "FP16 NHWC"}]},
        "c",
    ]
    assert tensorrt.count_formats({"Layers": layers}) == {"FP16 NHWC": 2, "FP32": 1}


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Installs a driver: the library whose function tells the CUDA version, and the module's version."""

    def install(cuda, module=None):
        source, library = tmp_path / "cuda.c", tmp_path / f"libcuda-{cuda}.so.1"
        source.write_text(f"int cuDriverGetVersion(int *version) {{ *version = {cuda}; return 0; }}")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        monkeypatch.setattr(gpu, "LIBRARY", str(library))
        monkeypatch.setattr(gpu, "DRIVER", tmp_path / "version")
        if module:
            gpu.DRIVER.write_text(f"{module}\n")

    return install


def test_a_driver_that_is_too_old(driver, monkeypatch):
    driver(12080, "570.211.01")
    reason = gpu.old_driver(13)
    assert "570.211.01" in reason and "CUDA 13 needs 580" in reason and "driver to 580" in reason.update
    assert gpu.old_driver(12) is None and gpu.old_driver(None) is None
    if gpu.gpu_here() is None:
        assert "570.211.01" in (find_backend("aotinductor").cannot_run(find_target("a10")) or "")
        monkeypatch.setattr(torch.version, "cuda", "13.0")  # torch sees no GPU then, and can't tell why
        assert find_backend("aotinductor").cannot_run(find_target("a10")) == reason


def test_a_driver_whose_module_is_hidden_or_older_than_its_library(driver, monkeypatch):
    """As in a container, and with a cuda-compat package."""
    driver(12040)
    assert "one for CUDA 12" in gpu.old_driver(13)
    driver(13000, "535.183.01")
    assert gpu.old_driver(13) is None
    monkeypatch.setattr(gpu, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    assert gpu.old_driver(13) is None


def test_the_cuda_version_that_a_package_is_linked_with():
    """The distribution that pip installs behind it is named for it."""
    pytest.importorskip("tensorrt_rtx")
    requirements = str(metadata.requires("tensorrt_rtx"))
    assert f"tensorrt_rtx_cu{tensorrt.linked_cuda('tensorrt_rtx')}" in requirements
    assert tensorrt.linked_cuda("no_such_package") is None


@pytest.mark.parametrize(
    ("version", "old"), [(None, False), ("tensorrt 10.14.1.48", True), ("tensorrt 11.4.0.106", False)]
)
def test_tensorrt_10_is_told_to_be_too_old(version, old):
    """Its networks are not strongly typed unless asked to be."""
    assert (version is not None and version in (tensorrt.too_old(version) or "")) == old


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt", "aotinductor"])
def test_an_engine_of_another_version_is_not_loaded(name):
    backend = find_backend(name)
    here = installed_version(backend.PACKAGES)
    if here:
        assert backend.cannot_load(here, {}) is None
    reason = backend.cannot_load(f"{name} 0.1", {})
    assert f"{name} 0.1" in reason and str(here) in reason


def test_loading_an_engine_without_a_gpu_is_a_plain_error(a10_bundle):
    if gpu.gpu_here():
        pytest.skip("there is a GPU here")
    stage = a10_bundle.manifest.stages[2]
    script = f"""
from pathlib import Path
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.engines import find_backend
from lcm_compile.errors import BackendError
from lcm_compile.targets import find_target
stage = open_bundle(Path({str(a10_bundle.folder)!r})).manifest.stages[2]
try:
    path = Path({str(a10_bundle.path(stage.file))!r})
    find_backend("tensorrt-rtx").load(path, stage.contract, find_target("a10"))
except BackendError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("refused:"), done.stderr


@pytest.fixture(scope="module")
def torchscript_bundle(sdxl_checkpoint, tmp_path_factory):
    spec = BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="torchscript")
    return build(spec, tmp_path_factory.mktemp("ts") / "bundle")


def test_a_torchscript_stage_loads_without_this_package(torchscript_bundle, tmp_path):
    contract = torchscript_bundle.manifest.stages[2].contract
    assert contract.name == "step"
    inputs, outputs = read_calls(torchscript_bundle.path("proof/step.npz"), contract)[0]
    np.savez(tmp_path / "in.npz", *inputs.values())
    script = f"""
import sys, numpy as np, torch
step = torch.jit.load({str(torchscript_bundle.path("engines/step.pt"))!r})
data = np.load({str(tmp_path / "in.npz")!r})
np.save({str(tmp_path / "out.npy")!r}, step(*(torch.from_numpy(data[k]) for k in data.files))[0].numpy())
assert "lcm_compile" not in sys.modules and "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert snr_db(outputs["prediction"], np.load(tmp_path / "out.npy")) >= 80


@pytest.mark.parametrize("name", ["onnxruntime", "torchscript"])
def test_runners_take_numpy_and_dlpack(name, request):
    bundle = request.getfixturevalue("torchscript_bundle")
    if name == "onnxruntime":
        bundle = open_bundle(request.getfixturevalue("sdxl_bundle"))
    stage = bundle.manifest.stages[3]
    inputs, _ = read_calls(bundle.path("proof/decode.npz"), stage.contract)[0]
    with find_backend(name).load(bundle.path(stage.file), stage.contract, CPU) as runner:
        from_numpy = runner(inputs)["picture"]
        from_torch = runner({k: torch.from_numpy(v) for k, v in inputs.items()})["picture"]
    np.testing.assert_array_equal(from_numpy, from_torch)


def test_torchscript_computes_in_bf16(sdxl_checkpoint, tmp_path):
    spec = BuildSpec(
        base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="torchscript", precision="bf16"
    )
    figures = build(spec, tmp_path / "bundle").manifest.parity
    assert all(30 <= f.db < 80 for f in figures.values())


def test_onnxruntime_refuses_bf16_on_a_cpu():
    assert Precision.BF16 in (find_backend("onnxruntime").cannot_build(CPU, Precision.BF16) or "")


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-tensorrt"])
def test_onnxruntime_on_a_gpu_takes_that_gpu(name):
    if gpu.gpu_here():
        pytest.skip("there is a GPU here")
    backend = find_backend(name)
    reason = backend.cannot_build(find_target("a10"), Precision.FP16) or ""
    assert "no NVIDIA GPU here" in reason and "only on the GPU" in reason
    assert choose_backend(find_target("a10"), Precision.FP16)[0] == "tensorrt-rtx"


@pytest.mark.parametrize(
    ("provider", "libraries", "missing"),
    [
        ("CUDAExecutionProvider", onnxruntime.CUDA_LIBRARIES, "libcu"),
        ("TensorrtExecutionProvider", ("libm.so.6", "libnvinfer.so.10"), "libnvinfer.so.10"),
        ("VulkanExecutionProvider", (), "without VulkanExecutionProvider"),
    ],
)
def test_a_library_that_a_provider_lacks_is_named(provider, libraries, missing, capfd):
    if gpu.gpu_here():
        pytest.skip("its libraries may be here")
    assert missing in (onnxruntime.cannot_open(provider, libraries, "pip install it") or "")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "capability", "gigabytes", "target"),
    [
        ("NVIDIA H200", "9.0", 140, "h200"),
        ("NVIDIA H100 80GB HBM3", "9.0", 80, "h100"),
        ("NVIDIA GH200 480GB", "9.0", 95, "h100"),
        ("NVIDIA L4", "8.9", 22, "l4"),
        ("NVIDIA L40S", "8.9", 45, "l40s"),
        ("NVIDIA GeForce RTX 4090", "8.9", 24, "4090"),
        ("NVIDIA GeForce RTX 3090 Ti", "8.6", 24, "3090"),
        ("NVIDIA A10", "8.6", 22, "a10"),
        ("NVIDIA A10G", "8.6", 22, "a10g"),
        ("NVIDIA RTX A6000", "8.6", 48, "a6000"),
        ("NVIDIA A100-SXM4-40GB", "8.0", 39, "a100"),
        ("NVIDIA A100-SXM4-80GB", "8.0", 79, "a100-80gb"),
        ("Tesla T4", "7.5", 15, "t4"),
        ("Quadro GV100", "7.0", 32, "cpu"),
    ],
)
def test_the_gpu_here_has_its_own_name(monkeypatch, name, capability, gigabytes, target):
    monkeypatch.setattr(gpu, "gpu_here", lambda: (name, capability))
    monkeypatch.setattr(gpu, "gpu_memory", lambda: gigabytes << 30)
    assert find_target_here() == target


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_session_on_a_gpu_has_its_libraries_loaded_in_its_own_process(provider, sdxl_bundle, monkeypatch):
    """Large stages are built in processes of their own, where nothing was asked before."""
    import onnxruntime as ort

    loaded = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: loaded.append(provider))
    path = sdxl_bundle / "engines/decode.onnx"
    onnxruntime.open_session(path, onnxruntime.quiet_options(), [onnxruntime.CPU])
    assert loaded == []
    if gpu.gpu_here() is None:
        with pytest.raises(BackendError):
            onnxruntime.open_session(path, onnxruntime.quiet_options(), [(provider, {})])
        assert loaded == [provider]


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_cpu_session_in_place_of_a_gpu_session_is_an_error(provider, sdxl_bundle):
    """ONNX Runtime gives one, with no more than a line in its log."""
    if gpu.gpu_here():
        pytest.skip("there is a GPU here")
    path = sdxl_bundle / "engines/decode.onnx"
    with pytest.raises(BackendError, match=f"asked ONNX Runtime for {provider}, got CPUExecutionProvider"):
        onnxruntime.open_session(path, onnxruntime.quiet_options(), [provider])


def test_a_gpu_session_that_leaves_its_work_to_the_processor_is_an_error(sdxl_bundle, monkeypatch):
    """As versions do that have no kernel of Attention for CUDA. The session here is one of the processor."""
    import onnxruntime as ort

    class Session(ort.InferenceSession):
        def __init__(self, path, options, providers):
            super().__init__(path, options, providers=[onnxruntime.CPU])

        def get_providers(self):
            return [onnxruntime.CUDA, onnxruntime.CPU]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    path = sdxl_bundle / "engines/step.onnx"
    with pytest.raises(BackendError, match=r"Attention.* is left to the processor"):
        onnxruntime.open_session(path, onnxruntime.quiet_options(), [(onnxruntime.CUDA, {})])
    monkeypatch.setattr(onnxruntime, "HEAVY", {"NoSuchNode"})
    onnxruntime.open_session(path, onnxruntime.quiet_options(), [(onnxruntime.CUDA, {})])


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", "0"), ("fp16", "1"), ("int8+fp16", "1")])
def test_a_cuda_session_in_fp32_does_not_round_to_tf32(monkeypatch, precision, allowed):
    """ONNX Runtime's own setting, which its library for CUDA knows by that name."""
    asked = []

    def refuse(path, contract, providers):
        asked.extend(options for _, options in providers)
        raise BackendError("there is no GPU")

    monkeypatch.setattr(onnxruntime, "open_checked", refuse)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=1))
    with pytest.raises(BackendError, match="no GPU"):
        onnxruntime.load(Path("step.onnx"), None, find_target("a10"), Precision(precision))
    assert len(asked) == 2 and {options["use_tf32"] for options in asked} == {allowed}
    import onnxruntime as ort

    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if library.is_file():
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            assert content.find(b"use_tf32\0") >= 0


@pytest.mark.parametrize(("precision", "told"), [("fp32", "0"), ("fp16", None)])
def test_the_tensorrt_provider_builds_no_kernels_in_tf32_for_fp32(monkeypatch, tmp_path, precision, told):
    """By NVIDIA's own variable, which is as it was afterwards."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    seen = []

    def built(path, options, providers):
        seen.append(os.environ.get("NVIDIA_TF32_OVERRIDE"))
        Path(providers[0][1]["trt_ep_context_file_path"]).touch()

    monkeypatch.setattr(onnxruntime, "open_session", built)
    graph = ExportedGraph(tmp_path / "step.onnx", Precision(precision), StageContract("step", (), ()))
    (tmp_path / "engines").mkdir()
    find_backend("onnxruntime-tensorrt").build(graph, find_target("a10"), tmp_path / "engines")
    assert seen == [told] and "NVIDIA_TF32_OVERRIDE" not in os.environ


def test_bound_arrays_draw_the_same_picture(sdxl_bundle):
    """The very lines that a GPU runs, with ONNX Runtime's CPU provider and tensors on the CPU."""
    bundle = open_bundle(sdxl_bundle)
    runners = {}
    for stage in bundle.manifest.stages:
        session = onnxruntime.open_checked(bundle.path(stage.file), stage.contract, [onnxruntime.CPU])
        runners[stage.contract.name] = onnxruntime.BoundRunner(session, stage.contract, "cpu")
    settings = bundle.manifest.pipeline
    request = Request("a red star", 7, negative_prompt="blue", guidance_scale=1.5, num_images=2)
    with load(bundle) as plain:
        expected = plain.draw(request).pictures
        with LcmPipeline(settings, runners, plain.prompts.tokenizers) as bound:
            assert isinstance(
                bound.prompts.text(Condition(("a star",))).arrays["hidden_states"], torch.Tensor
            )
            # Rounding alone: tensors of torch do the loop's arithmetic, not NumPy.
            assert psnr_db(expected, bound.draw(request).pictures) > 65


def test_unknown_backend_is_told_with_the_closest():
    with pytest.raises(UsageError, match="Did you mean 'onnxruntime'"):
        find_backend("onnxruntim")


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "4090", "A100-80GB", "a100 80gb"])
def test_targets_by_any_spelling(name):
    assert find_target(name).name in ("4090", "a100-80gb")


def test_onnxruntime_with_tensorrt_refuses_what_one_file_can_not_hold(tmp_path):
    """A large stage, whose weights are in a file of their own, is refused only if it is too large."""
    graph = ExportedGraph(tmp_path / "step.onnx", Precision.FP16, StageContract("step", (), ()))
    for size, refused in ((300_000_000, False), (1_600_000_000, True)):
        with graph.weights.open("wb") as file:
            file.truncate(size)  # takes no room
        with pytest.raises(BackendError) as caught:  # in both cases: there is no such graph
            find_backend("onnxruntime-tensorrt").build(graph, find_target("a10"), tmp_path)
        assert ("too large for one ONNX file" in str(caught.value)) == refused
