"""3×3 convolutions by Winograd's algorithm in OpenVINO: against float64, and in whole bundles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from lcm_compile import BuildSpec, build, load
from lcm_compile.engines import find_backend, openvino
from lcm_compile.engines.winograd import choice, library
from lcm_compile.engines.winograd.layers import form_for, replace_convolutions
from lcm_compile.errors import BackendError
from lcm_compile.pipeline.request import Request
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import snr_db
from lcm_compile.targets import find_target

ov = pytest.importorskip("openvino")
if reason := library.cannot_compile():
    pytest.skip(reason, allow_module_level=True)

CPU = find_target("cpu")
COMPUTES_BF16 = openvino.cannot_compute(Precision.BF16) is None
F2, F4 = ({"1@1": form} for form in ("F2", "F4"))
needs_bf16 = pytest.mark.skipif(not COMPUTES_BF16, reason="this processor does not compute in bf16")


def test_the_kernels_compute_convolutions_and_touch_no_other_memory(tmp_path):
    """Random layers against float64, with every memory access and every overflow checked."""
    source, checked = (
        Path(library.__file__).parent,
        ("-O1", "-fsanitize=address,undefined", "-static-libasan"),
    )
    common = [library.compiler(), "-std=c++17", *checked, "-fno-sanitize-recover", f"-I{source}"]
    objects = []
    for name, options in library.KERNELS.items():
        objects.append(tmp_path / f"{name}.o")
        kernel = [*options, f"-DWINOGRAD_FUNCTION={name}", "-c", source / "kernel.cpp", "-o", objects[-1]]
        subprocess.run([*common, *kernel], check=True)
    program = tmp_path / "check"
    others = [Path(__file__).with_name("winograd_check.cpp"), source / "weights.cpp", *objects]
    subprocess.run([*common, *others, "-o", program], check=True)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "LD_PRELOAD": ""}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "avx2, F4" in done.stdout


def block(channels, outputs, height, width, pictures):
    """A ResBlock's convolution in torch, and in OpenVINO with bias, time embedding and residual."""
    from openvino import opset13 as op

    torch.manual_seed(height * width)
    layer = torch.nn.Conv2d(channels, outputs, 3, padding=1).double()
    x, time = (
        op.parameter([pictures, channels, height, width], np.float32),
        op.parameter([pictures, outputs], np.float32),
    )
    skip = op.parameter([pictures, outputs, height, width], np.float32)
    weights, bias = (value.detach().float().numpy() for value in (layer.weight, layer.bias))
    y = op.convolution(x, op.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1])
    y = op.add(y, op.constant(bias.reshape(1, -1, 1, 1)))
    y = op.add(y, op.unsqueeze(time, op.constant(np.array([2, 3]))))
    y = op.add(skip, y)
    return layer, ov.Model([op.result(y)], [x, time, skip])


def layers_of(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


@pytest.mark.parametrize(("choices", "bf16", "floor"), [(F2, False, 115), (F4, False, 100)], ids=["F2", "F4"])
@pytest.mark.parametrize(
    "size", [(8, 10, 16, 16, 2), (32, 66, 33, 70, 1), (4, 6, 1, 5, 1), (64, 64, 96, 64, 1)]
)
def test_a_convolution_and_what_is_added_to_it_become_one_operation(choices, bf16, floor, size):
    layer, model = block(*size)
    assert replace_convolutions(model, choices, bf16) == 1
    assert "Convolution" not in layers_of(model) and layers_of(model).count("WinogradConvolution") == 1
    core = ov.Core()
    core.add_extension(library.library())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x, time, skip = (torch.randn(list(port.shape), dtype=torch.float32) for port in model.inputs)
    found = compiled([x.numpy(), time.numpy(), skip.numpy()])[0]
    right = layer(x.double()) + time.double()[:, :, None, None] + skip.double()
    assert snr_db(right.detach().numpy(), found) >= floor


def test_other_convolutions_stay():
    from openvino import opset13 as op

    x = op.parameter([1, 8, 16, 16], np.float32)
    results = []
    for size, stride, pad, dilation in ((1, 1, 0, 1), (3, 2, 1, 1), (3, 1, 0, 1), (3, 1, 2, 2), (5, 1, 2, 1)):
        weights = op.constant(np.ones((8, 8, size, size), np.float32))
        results.append(
            op.result(op.convolution(x, weights, [stride] * 2, [pad] * 2, [pad] * 2, [dilation] * 2))
        )
    model = ov.Model(results, [x])
    assert replace_convolutions(model, F2, bf16=False) == 0
    assert layers_of(model).count("Convolution") == len(results)


@pytest.fixture
def fast(monkeypatch):
    """The home's measurements say that Winograd's forms are faster for every size."""

    def choices(precision, report=None):
        return {"fp32": {"64@8": "F2", "64@32": "F4"}, "bf16": {"64@8": "F2"}}[precision.floats]

    monkeypatch.setattr(choice, "choose", choices)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_a_bundle_with_it_draws_the_picture_of_one_without(fast, precision, tmp_path):
    """The proof compares both with torch; the demo's step and decoder have convolutions of both sizes."""
    spec = BuildSpec("demo", backend="openvino", precision=precision)
    bundle = build(spec, tmp_path / "with")
    texts = [(bundle.folder / "engines" / f"{stage}.xml").read_text() for stage in ("step", "decode")]
    assert all(text.count('type="WinogradConvolution"') >= 10 for text in texts)
    tiles = {"2", "3", "4"} if precision == "fp32" else {"2", "3"}  # 3 is of a doubled map
    assert {tile for tile in "234" if any(f'tile="{tile}"' in text for text in texts)} == tiles
    assert (bundle.folder / "engines" / "winograd.so").stat().st_size < 1_000_000
    assert all(figure.passed for figure in bundle.manifest.parity.values())
    if precision == "fp32":
        assert min(figure.db for figure in bundle.manifest.parity.values()) >= 75
    without = build(
        BuildSpec("demo", backend="openvino", precision=precision, without=("winograd",)), tmp_path / "plain"
    )
    assert (
        not list(without.folder.rglob("*.so"))
        and "Winograd" not in (without.folder / "engines/step.xml").read_text()
    )
    assert bundle.manifest.key["builder options"] != without.manifest.key["builder options"]
    graphs = [{k: v for k, v in b.manifest.key.items() if k != "builder options"} for b in (bundle, without)]
    assert graphs[0] == graphs[1]
    with load(bundle) as pipeline:
        first, again = (pipeline.draw(Request("two blue rings on dots", 3)).pictures for _ in range(2))
        assert (first == again).all()


def test_a_bundle_whose_library_is_another_or_gone_is_refused(fast, tmp_path):
    bundle = build(BuildSpec("demo", backend="openvino", precision="fp32"), tmp_path / "bundle")
    stage = next(stage for stage in bundle.manifest.stages if stage.contract.name == "decode")
    path, kernels = bundle.path(stage.file), bundle.folder / "engines" / "winograd.so"
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (path, path.with_suffix(".bin")):
        shutil.copy(file, copy)
    for content in (None, kernels.read_bytes() + b" "):
        if content:
            (copy / "winograd.so").write_bytes(content)
        with pytest.raises(BackendError, match=r"not the library that decode\.xml was built with"):
            openvino.load(copy / path.name, stage.contract, CPU)
    shutil.copy(kernels, copy)
    openvino.load(copy / path.name, stage.contract, CPU).close()


def test_a_library_that_a_taken_engine_brought_is_not_written_over(fast, tmp_path, monkeypatch):
    spec = BuildSpec("demo", backend="openvino", precision="fp32")
    first = build(spec, tmp_path / "first")
    kernels = (first.folder / "engines" / "winograd.so").stat()
    asked = iter((first.folder, first.folder, first.folder, None))  # the decoder is built
    monkeypatch.setattr("lcm_compile.builder.build.find_engine", lambda made_of: next(asked))
    tasks = set()
    second = build(spec, tmp_path / "second", report=lambda task, cost: tasks.add(task))
    assert {"take encode from first", "take step from first", "build decode"} <= tasks
    after = (second.folder / "engines" / "winograd.so").stat()
    assert (after.st_ino, after.st_mtime_ns) == (kernels.st_ino, kernels.st_mtime_ns)


def test_a_processor_that_can_not_run_it_is_told_so(fast, tmp_path, monkeypatch):
    bundle = build(BuildSpec("demo", backend="openvino", precision="fp32"), tmp_path / "bundle")
    monkeypatch.setattr(library, "instruction_set", lambda: ["x86_64", "avx"])
    with pytest.raises(BackendError, match=r"no avx2 and no fma"):
        load(bundle)
    assert (
        find_backend("openvino").options(CPU, Precision.FP32, ("winograd",), lambda *_: None)["winograd"]
        == {}
    )


def test_without_a_compiler_bundles_are_built_without_it(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler is not installed" in library.cannot_compile()
    options = openvino.options(CPU, Precision.FP32, ("winograd",))
    assert options == {"sinusoids": "fp32", "winograd": {}}


def test_a_compiler_that_fails_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'kernel.cpp:1: error: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("LCM_COMPILE_HOME", str(tmp_path / "home"))
    with pytest.raises(BackendError, match="out of luck"):
        library.library()
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_forms_are_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LCM_COMPILE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "SIZES", ((64, 16),))
    told = []
    chosen = choice.choose(Precision.FP32, lambda task, cost: told.append(task))
    assert chosen.keys() == {"64@16"} and set(chosen.values()) <= {"direct", "F2", "F4"}
    assert told == ["time the convolutions here"] * 2
    assert choice.choose(Precision.FP32, lambda task, cost: told.append(task)) == chosen
    assert len(told) == 2
    stored = json.loads((tmp_path / "winograd.json").read_text())
    assert list(stored.values()) == [chosen]
    assert choice.choose(Precision.FP16) == {}


def test_a_layer_takes_the_form_of_the_nearest_size():
    choices = {"64@8": "direct", "320@64": "F4", "1280@16": "F2"}
    assert form_for(choices, 320, 320, 64, 64) == "F4"
    assert form_for(choices, 512, 512, 128, 128) == "F4"
    assert form_for(choices, 1280, 2560, 16, 16) == "F2"
    assert form_for(choices, 64, 48, 9, 9) == "direct"
    assert form_for({}, 64, 64, 8, 8) == "direct"
