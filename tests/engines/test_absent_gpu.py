"""Engines for GPUs that are not here, as far as can be told without them: what they are made of.

`make test-cross` runs the slow ones too, in an environment with the version of torch that they need.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import shutil
import struct
import subprocess
import zipfile
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from lcm_compile import BuildSpec, build
from lcm_compile.benchmarks.gpu.launches import launches_of
from lcm_compile.builder.doctor import diagnose_backend
from lcm_compile.engines import absent_gpu, aotinductor, gpu
from lcm_compile.engines.gpu_rewrites import choose_attention, lay_out_convolutions
from lcm_compile.engines.weights_file import read_weights, write_weights
from lcm_compile.export import export_stage
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import snr_db
from lcm_compile.stages.quantize import choose_scales, install_layers, quantize_layers
from lcm_compile.stages.stage import Stage
from lcm_compile.targets import TARGETS, find_target

CPU, H100 = find_target("cpu"), find_target("h100")
CANNOT = "there is a GPU here" if gpu.gpu_here() else aotinductor.cannot_build(H100, Precision.FP16)
cross = pytest.mark.skipif(CANNOT is not None, reason=f"make test-cross runs it; here {CANNOT}")

# The first digits of the sha256 of the source of what absent_gpu replaces in torch 2.11, and of its callers.
SOURCES = {
    "AotCodeCompiler.compile": "aa487658ed46",
    "CachingAutotuner._precompile_config": "53840cbee0e9",
    "CachingAutotuner.save_gpu_kernel": "cc95eedf2161",
    "CompiledKernel._init_handles": "4ba7e2f0375f",
    "CudaDriver.__init__": "3c34e280e8b2",
    "CudaInterface.exchange_device": "64ebd2677178",
    "CudaInterface.get_device_properties": "cb006011f5d1",
    "CudaInterface.maybe_exchange_device": "64ebd2677178",
    "GraphLowering.allocate_non_dup_const_name": "b39fa2926bf8",
    "GraphLowering.get_attr": "3f2f823753ad",
    "PythonWrapperCodegen.generate_and_run_autotune_block": "02e49876799d",
    "torch._inductor.cpp_builder._get_optimization_cflags": "b44dc1a2ee7e",
    "torch._inductor.fx_passes.joint_graph.lazy_init": "8e35ec4f22bb",
    "torch._inductor.graph.is_same_tensor": "3ae525a3b0a8",
    "torch._inductor.runtime.triton_heuristics.cached_autotune": "e358aafc24d2",
    "torch._subclasses.fake_tensor.init_gpu_context": "c51e161c51f1",
    "torch.cuda._exchange_device": "64ebd2677178",
    "torch.cuda._maybe_exchange_device": "64ebd2677178",
    "torch.cuda.current_device": "6e9804168a5c",
    "torch.cuda.device_count": "c7fd457e1134",
    "torch.cuda.get_device_capability": "6809539b0a67",
    "torch.cuda.get_device_properties": "cb006011f5d1",
    "torch.cuda.get_rng_state": "1190f97901d7",
    "torch.cuda.is_available": "b91a896857c1",
    "torch.cuda.set_rng_state": "2aaed350f20b",
}


def test_what_can_not_be_compiled_for_is_told_by_name(monkeypatch):
    if torch.version.cuda is None:
        assert "was built without CUDA; pip install torch==2.11.0" in absent_gpu.cannot_compile(H100)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(absent_gpu, "installed_version", lambda packages: "torch 2.99.0+cu130")
    assert "torch 2.11.0 only, not 2.99.0+cu130" in absent_gpu.cannot_compile(H100)
    monkeypatch.setattr(absent_gpu, "installed_version", lambda packages: "torch 2.11.0+cu130")
    for name in ("a100", "a10", "4090", "h200", "b200", "5090"):
        assert absent_gpu.cannot_compile(find_target(name)) is None
    for name in ("t4", "gb10"):
        told = absent_gpu.cannot_compile(find_target(name))
        assert f"8.0, 8.6, 8.9, 9.0, 10.0, 12.0; {name} is {find_target(name).compute_capability}" in told
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "x86-64" in absent_gpu.cannot_compile(H100)


def test_an_engine_for_an_absent_gpu_needs_no_more_of_the_processor_than_avx2(monkeypatch):
    if gpu.gpu_here() is not None:
        pytest.skip("there is a GPU here")
    options = aotinductor.options(H100)
    assert options["without_gpu"]
    here = f"torch {torch.__version__}"
    has = ["x86_64", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "sse4_1", "sse4_2"]
    monkeypatch.setattr(aotinductor, "instruction_set", lambda: has)
    assert aotinductor.cannot_load(here, options) is None
    has.remove("avx2")
    assert "a processor with avx2" in aotinductor.cannot_load(here, options)
    # Attention is split if the GPU has room for its scores; with another memory it is another engine.
    assert options != aotinductor.options(replace(H100, memory_bytes=8 << 30))


class Attention(nn.Module):
    def forward(self, query, key, value, mask=None):
        return scaled_dot_product_attention(query, key, value, mask, scale=0.3)


class ByMath(torch.fx.Interpreter):
    """Runs a program on the processor, which has none of the GPU's kernels, and counts these."""

    def call_function(self, target, args, kwargs):
        name = re.search(r"_scaled_dot_product_(\w+)_attention\.default$", str(target))
        if name is None:
            return super().call_function(target, args, kwargs)
        self.kernels = [*getattr(self, "kernels", ()), name[1]]
        query, key, value = args[:3]
        assert query.shape[-1] % 8 == 0
        exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), **kwargs)
        return (exact.to(query.dtype),)


@pytest.mark.parametrize(
    ("target", "dtype", "width", "mask", "kernel"),
    [
        ("h100", "float16", 28, None, "cudnn"),
        ("b200", "bfloat16", 64, None, "cudnn"),
        ("h100", "float16", 160, None, "flash"),
        ("4090", "float16", 28, None, "flash"),
        ("4090", "bfloat16", 512, None, "efficient"),
        ("h100", "float32", 64, None, "efficient"),
        ("h100", "float16", 64, "float", None),
        ("4090", "float32", 64, "bool", None),
    ],
)
def test_attention_is_by_the_kernel_that_torch_would_take(target, dtype, width, mask, kernel):
    dtype, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 77, width, generator=generator).to(dtype) for _ in range(3))
    masks = []
    if mask:
        lower = torch.ones(77, 77).tril().bool()[None, None]
        masks = [lower if mask == "bool" else torch.zeros(lower.shape).masked_fill(~lower, -1e4).to(dtype)]
    program = torch.export.export(Attention(), (query, key, value, *masks))
    choose_attention(program, find_target(target))
    assert "scaled_dot_product_attention.default" not in program.graph_module.code
    interpreter = ByMath(program.graph_module)
    [found] = interpreter.run(query, key, value, *masks)
    assert getattr(interpreter, "kernels", [None]) == [kernel]
    exact = (
        query.double(),
        key.double(),
        value.double(),
        *(m if mask == "bool" else m.double() for m in masks),
    )
    db = snr_db(Attention()(*exact).numpy(), found.double().numpy())
    assert found.dtype == dtype and db > {torch.float32: 120, torch.float16: 65, torch.bfloat16: 45}[dtype]


def test_weights_come_back_with_their_strides(tmp_path):
    rows = torch.arange(24.0).reshape(4, 6)
    weights = {
        "plain": rows,
        "transposed": rows.t(),
        "part": rows[1:3],
        "scalar": torch.tensor(3),
        "conv": torch.randn(4, 3, 3, 3).half().to(memory_format=torch.channels_last),
        "pointwise": torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
    }
    path = tmp_path / "weights.safetensors"
    write_weights(path, weights)
    assert path.stat().st_mode & 0o777 == 0o644  # as the engine beside it, which others may read
    found = read_weights(path, "cpu")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].stride() == weight.stride() and torch.equal(found[name], weight)
        assert found[name].dtype == weight.dtype


class Small(nn.Module):
    """Two convolutions of equal shape, one of one pixel, attention, and constants that are no weights.

    Unless it is told otherwise, torch's compiler writes arrays of up to 8 elements into the code.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.last, self.shift = nn.Conv2d(12, 12, 1), torch.arange(12.0)[:, None, None]
        self.register_buffer("factor", torch.tensor([2.0, 3.0]), persistent=False)

    def forward(self, x):
        x = nn.functional.silu(self.first(x.to(self.first.weight.dtype)))
        x = nn.functional.silu(self.second(x))
        tokens = x.flatten(2).transpose(1, 2)[:, None]
        x = x + scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].transpose(1, 2).reshape(x.shape)
        return (self.last(x).float() + self.shift) * self.factor[1]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


def graph_of(module, folder, precision):
    spec = TensorSpec("x", (1, 12, 16, 16), "float32", "input")
    contract = StageContract("small", (spec,), (TensorSpec("y", (1, 12, 16, 16), "float32", "output"),))
    return export_stage(Stage(contract, module), aotinductor.GRAPH_FORMAT, precision, folder)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_constants_are_beside_the_engine_under_their_own_names(small, tmp_path):
    """And the package is without them: what the file says is what the engine computes with."""
    graph = graph_of(small, tmp_path, Precision.FP32)
    (tmp_path / "engines").mkdir()
    path = aotinductor.build(graph, CPU, tmp_path / "engines", aotinductor.options(CPU))
    beside = path.with_suffix(".safetensors")
    weights = read_weights(beside, "cpu")
    layers = {
        f"module.{layer}.{part}" for layer in ("first", "second", "last") for part in ("weight", "bias")
    }
    assert weights.keys() == layers | {"module.shift", "module.factor"}
    x = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(1))
    with aotinductor.load(path, graph.contract, CPU) as runner:
        assert snr_db(small(x).numpy(), runner({"x": x})["y"].numpy()) > 100
    write_weights(beside, {name: weight * 0 for name, weight in weights.items()})
    with aotinductor.load(path, graph.contract, CPU) as runner:
        assert not runner({"x": x})["y"].any()


def test_convolutions_are_laid_out_as_gpus_compute_them(small):
    program = torch.export.export(small, (torch.zeros(1, 12, 16, 16),))
    lay_out_convolutions(program)
    weights = {n: w for n, w in program.state_dict.items() if w.dim() == 4}
    assert len(weights) == 3
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights.values())
    x = torch.randn(1, 12, 16, 16)
    assert snr_db(small(x).numpy(), program.module()(x).numpy()) > 110


def replaced():
    """What absent_gpu replaces, before it does, and what it relies on besides, by name."""
    from torch._inductor.codecache import AotCodeCompiler
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler.compiler import CompiledKernel

    for owner, name, _ in absent_gpu.changes(H100):
        yield f"{owner.__name__}.{name}", getattr(owner, name)
    for owner, name in (
        (AotCodeCompiler, "compile"),
        (GraphLowering, "get_attr"),
        (GraphLowering, "allocate_non_dup_const_name"),
        (CachingAutotuner, "_precompile_config"),
        (CachingAutotuner, "save_gpu_kernel"),
        (CudaDriver, "__init__"),
        (CompiledKernel, "_init_handles"),
    ):
        yield f"{owner.__name__}.{name}", getattr(owner, name)


@cross
def test_what_is_replaced_in_torch_is_what_was_read():
    """A version with other source is not among absent_gpu.TRIED before the difference has been read."""
    digests = {}
    for name, thing in replaced():
        try:
            source = inspect.getsource(thing)
        except TypeError:  # it is compiled, as torch.cuda._exchange_device
            source = "compiled"
        digests[name] = hashlib.sha256(source.encode()).hexdigest()[:12]
    assert digests == SOURCES


class Package:
    """What is in a compiled engine's file."""

    def __init__(self, path, scratch):
        with zipfile.ZipFile(path) as package:
            files = {name: package.read(name) for name in package.namelist()}
        self.cubins = [content for name, content in files.items() if name.endswith(".cubin")]
        [self.source] = [c.decode() for name, c in files.items() if name.endswith("wrapper.cpp")]
        [library] = [content for name, content in files.items() if name.endswith(".so")]
        self._library = scratch / "engine.so"
        self._library.write_bytes(library)

    def capabilities(self):
        """The compute capability in each kernel's ELF header: it is in the second byte of e_flags."""
        assert {struct.unpack_from("<H", cubin, 18)[0] for cubin in self.cubins} == {190}  # EM_CUDA
        return {cubin[49] for cubin in self.cubins}

    def read(self, *command):
        done = subprocess.run([*command, self._library], capture_output=True, text=True, check=True)
        return done.stdout

    def strides(self):
        """The strides that the code takes each constant to have, by the constant's name."""
        found = re.findall(r"constants_info_\[(\d+)\]\.(stride|original_fqn) = (.+);", self.source)
        fields = {(i, key): value for i, key, value in found}
        names = {i: value.strip('"') for (i, key), value in fields.items() if key == "original_fqn"}
        return {name: tuple(map(int, re.findall(r"\d+", fields[i, "stride"]))) for i, name in names.items()}


def check_engine(path, graph, scratch, capability):
    """Checks that an engine's file has all that its GPU needs, and that the weights are the graph's."""
    package = Package(path, scratch)
    assert package.cubins and package.capabilities() == {int(capability.replace(".", ""))}
    assert {"[libcuda.so.1]", "[libtorch_cuda.so]"} <= set(package.read("readelf", "-d").split())
    assert "%zmm" not in package.read("objdump", "-d") and "-march=native" not in package.source
    assert "-march=x86-64-v3" in package.source
    weights = read_weights(path.with_suffix(".safetensors"), "cpu")
    assert package.strides() == {name: weight.stride() for name, weight in weights.items()}
    program = torch.export.load(graph)
    given = {**program.state_dict, **program.constants}
    for name, weight in weights.items():
        assert torch.equal(weight, given[name])
    return package, weights, given


@pytest.mark.slow
@cross
@pytest.mark.parametrize("name", ["a100", "a10", "4090", "h100", "b200", "5090"])
def test_an_engine_for_each_compute_capability(small, tmp_path, name):
    target = find_target(name)
    torch.manual_seed(0)
    graph = graph_of(Small().eval().requires_grad_(False).half(), tmp_path, Precision.FP16)
    (tmp_path / "engines").mkdir()
    path = aotinductor.build(graph, target, tmp_path / "engines", aotinductor.options(target))
    assert sorted(p.name for p in (tmp_path / "engines").iterdir()) == ["small.pt2", "small.safetensors"]
    package, weights, given = check_engine(path, graph.path, tmp_path, target.compute_capability)
    assert weights.keys() == given.keys()
    wanted = "cudnn" if name in ("h100", "b200") else "flash"
    assert f"aoti_torch_cuda__scaled_dot_product_{wanted}_attention(" in package.source
    # No weight is converted before it is convolved with.
    convolved = re.findall(r"aoti_torch_cuda_convolution\(\w+, (\w+)", package.source)
    assert convolved == ["module_first_weight", "module_second_weight", "module_last_weight"]
    # What is counted in the host code is what torch counts in the program.
    program = torch.export.load(graph.path)
    with FlopCounterMode(display=False) as counter:
        program.module()(torch.zeros(1, 12, 16, 16))
    counted = launches_of(path, graph.contract)
    # The kernel of attention takes heads of a multiple of 8: 16 in place of 12.
    attention = counted.flop["attention"] * 12 / 16
    assert counted.flop["convolutions"] + attention == counter.get_total_flops()
    assert counted.counts["convolutions"] == 3 and counted.counts["attention"] == 1


class Tokens(nn.Module):
    """A convolution, whose result lies on a GPU with its channels last, and products of its pixels."""

    def __init__(self):
        super().__init__()
        self.conv, self.wide = nn.Conv2d(12, 64, 3, padding=1), nn.Linear(64, 128)
        self.narrow, self.odd = nn.Linear(64, 32, bias=False), nn.Linear(32, 12)

    def forward(self, x):
        x = self.conv(x.to(self.conv.weight.dtype)).flatten(2).transpose(1, 2)
        hidden, gate = self.wide(x).chunk(2, -1)
        x = self.odd(self.narrow(hidden * nn.functional.gelu(gate)))
        return x.transpose(1, 2).reshape(1, 12, 16, 16).float()


@pytest.mark.slow
@cross
@pytest.mark.parametrize("name", ["4090", "h100", "b200"])
def test_products_in_fp8(tmp_path, name):
    torch.manual_seed(0)
    module, x = Tokens().eval().requires_grad_(False), torch.randn(1, 12, 16, 16)
    scales = choose_scales(module, Precision.FP8_FP16, *[lambda: module(x)] * 2)
    layers = quantize_layers(module, scales, Precision.FP8_FP16, scaled_mm=True)
    install_layers(module.half(), layers)
    graph = graph_of(module, tmp_path, Precision.FP8_FP16)
    (tmp_path / "engines").mkdir()
    target = find_target(name)
    path = aotinductor.build(graph, target, tmp_path / "engines", aotinductor.options(target))
    package, weights, _ = check_engine(path, graph.path, tmp_path, target.compute_capability)
    assert {n for n, w in weights.items() if w.dtype == torch.float8_e4m3fn} == {
        "module.wide.weight",
        "module.narrow.weight",
    }
    source = package.source
    scales = re.findall(r"aoti_torch_cuda__scaled_mm_out\(.*?\)\), (\w+), (\w+), ", source)
    assert scales == [
        (f"module_{layer}_input_scale", f"module_{layer}_weight_scale") for layer in ("wide", "narrow")
    ]
    inputs = re.findall(r"empty_strided\(2, \w+, (\w+), cached_torch_dtype_float8_e4m3fn", source)
    for strides in inputs:  # cuBLAS takes the first matrix by rows alone
        assert re.search(rf"{strides}\[\] = {{64L, 1L}};", source)
    assert inputs
    # What comes before a product rounds to fp8 as well, which takes no kernel of its own: one casts the
    # input, one adds the convolution's bias, one is the GEGLU, and one casts the output.
    counted = launches_of(path, graph.contract)
    assert counted.counts == {"Triton": 4, "convolutions": 1, "products": 3}
    rows = 16 * 16
    assert counted.flop["products"] == 2 * rows * (64 * 128 + 64 * 32 + 32 * 12)


@pytest.mark.slow
@cross
def test_doctor_compiles_for_one_gpu_that_is_not_here_and_tells_of_all(monkeypatch):
    compiled, compile_for = [], aotinductor.build

    def noting(graph, target, *arguments):
        compiled.append(target)
        return compile_for(graph, target, *arguments)

    monkeypatch.setattr(aotinductor, "build", noting)
    found = diagnose_backend("aotinductor")
    assert [target.is_cpu for target in compiled] == [False, True] and found.runs
    known = [name for name, t in TARGETS.items() if t.compute_capability in absent_gpu.CAPABILITIES]
    assert list(found.builds_for) == ["cpu", *known]


@pytest.mark.slow
@cross
def test_a_bundle_for_an_h100_that_is_not_here(sdxl_checkpoint, tmp_path):
    """Five minutes: all stages, by `--backend auto`. The manifest does not claim that an engine has run."""
    spec = BuildSpec(base=str(sdxl_checkpoint), gpu="h100", no_lcm=True, few_step="lcm")
    bundle = build(spec, tmp_path / "bundle")
    assert bundle.manifest.backend == "aotinductor"
    for figure in bundle.manifest.parity.values():
        assert figure.passed and "compiled without the GPU, not yet run" in figure.checked
    for stage in bundle.manifest.stages:
        package = Package(bundle.path(stage.file), tmp_path)
        assert package.cubins and package.capabilities() == {90}
        weights = read_weights(bundle.path(stage.file).with_suffix(".safetensors"), "cpu")
        assert package.strides() == {name: weight.stride() for name, weight in weights.items()}
    assert "no NVIDIA GPU here" in aotinductor.cannot_run(H100)
