"""Engines of TensorRT for RTX that run on GPUs of several compute capabilities, built by its own builder."""

from __future__ import annotations

import json

import pytest

from lcm_compile import BuildSpec, build
from lcm_compile.builder.plan import make_plan, make_plan_from
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.bundles.export_manifest import open_export
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.engines import gpu
from lcm_compile.errors import BundleError
from lcm_compile.pipeline.load import check_backend
from lcm_compile.spec import Shape
from lcm_compile.targets import RTX, TARGETS, find_target

trt = pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def configs(monkeypatch):
    """The compute capabilities of each of the builder's configs."""
    made, create = [], trt.Builder.create_builder_config
    monkeypatch.setattr(
        trt.Builder, "create_builder_config", lambda self: made.append(create(self)) or made[-1]
    )
    return lambda: [
        [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)]
        for config in made
    ]


def small(base, **others):
    return BuildSpec(str(base), no_lcm=True, few_step="lcm", height=64, width=64, **others)


def test_one_bundle_for_every_gpu_that_it_builds_for(configs, tmp_path, monkeypatch, refused, command):
    """The demo's, in fp16."""
    folder = build(BuildSpec("demo", gpu="rtx"), tmp_path / "rtx").folder
    assert configs() == 4 * [["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]]
    bundle = open_bundle(folder)
    assert bundle.manifest.target == RTX and bundle.manifest.pipeline.shape == Shape(1, 64, 64)
    data = json.loads(command("inspect", folder, "--json")[1])
    assert (data["target"], data["compute_capability"]) == ("rtx", "7.5, 8.0, 8.6, 8.9, 12.0, 12.1")
    for target in TARGETS.values():
        if target.is_cpu:
            continue
        here = target.description, target.compute_capability
        monkeypatch.setattr(gpu, "gpu_here", lambda here=here: here)
        if target.compute_capability in RTX.capabilities:
            check_backend(bundle)
        else:
            with pytest.raises(BundleError, match=rf"{target.description} .*, rtx is 7\.5, 8\.0, .* 12\.1"):
                check_backend(bundle)
    monkeypatch.setattr(gpu, "gpu_here", lambda: ("NVIDIA H100", "9.0"))
    told = ["was built for rtx", "NVIDIA H100 (compute capability 9.0)", "--gpu h100"]
    assert "--gpu rtx" not in refused(1, told, "run", "a star", "--bundle", folder)


@pytest.mark.parametrize(
    ("precision", "capabilities"),
    [
        ("fp32", ("8.0", "8.6", "8.9", "12.0", "12.1")),
        ("fp16", ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")),
        ("bf16", ("8.0", "8.6", "8.9", "12.0", "12.1")),
        ("int8", ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")),
        ("fp8", ("8.9", "12.0", "12.1")),
    ],
)
def test_a_precision_leaves_out_gpus_without_it(sdxl_checkpoint, precision, capabilities):
    plan = make_plan(small(sdxl_checkpoint, gpu="rtx", precision=precision))
    assert plan.target.capabilities == tuple(plan.options["compute_capabilities"]) == capabilities
    assert plan.key["target"] == " ".join(("rtx", *capabilities))


def test_bundles_of_one_command_share_their_engines(command, sdxl_checkpoint, configs, tmp_path):
    """Each is for its own GPU alone; the processor's engines are another backend's."""
    words = ("build", "--base", sdxl_checkpoint, "--no-lcm", "--few-step", "lcm", "--out", tmp_path / "b")
    words += ("--precision", "fp16", "--gpu", "a10", "--gpu", "RTX 4090")
    code, _, err = command(*words)
    assert code == 0, err
    assert configs() == 4 * [["SM86", "SM89"]] and err.count("build step") == 1
    a10, ada = (tmp_path / "b" / name for name in ("a10", "4090"))
    manifest = open_bundle(a10).manifest
    assert [find_target(name).capabilities for name in ("a10", "4090")] == [
        read_manifest(folder)[0].target.capabilities for folder in (a10, ada)
    ]
    assert all((a10 / stage.file).samefile(ada / stage.file) for stage in manifest.stages)
    code, out, _ = command(*words, "--json")
    assert code == 0 and [bundle["hit"] for bundle in json.loads(out)] == [True, True]
    # The bundle knows what it was built with: its spec alone gives the same key.
    assert manifest.spec.beside == ("4090",) and make_plan(manifest.spec, a10).hit
    assert "--gpu a10 --gpu 4090" in manifest.spec.command()


def test_bundles_from_one_export_share_their_engines(command, sdxl_graphs, configs, tmp_path):
    out = tmp_path / "b"
    words = ("build", "--from", sdxl_graphs, "--gpu", "l4", "--gpu", "a100", "--gpu", "a10", "--out", out)
    code, _, err = command(*words)
    assert code == 0, err
    assert configs() == 4 * [["SM80", "SM86", "SM89"]]
    names = [stage.file for stage in open_bundle(out / "l4").manifest.stages]
    for other in ("a100", "a10"):
        assert all((out / "l4" / name).samefile(out / other / name) for name in names)


def test_others_are_no_part_of_a_bundle(sdxl_checkpoint):
    """What another backend builds for, or this one not in that precision, changes neither key nor engines."""
    alone = make_plan(small(sdxl_checkpoint, gpu="l4", precision="fp8"))
    together = make_plan(
        small(sdxl_checkpoint, gpu="l4", precision="fp8", beside=("h100", "a10", "cpu", "4090"))
    )
    assert together.spec.beside == ("4090",)  # of the same compute capability
    assert together.key == alone.key
    cpu = small(sdxl_checkpoint, backend="onnxruntime")
    assert make_plan(cpu).key == make_plan(small(sdxl_checkpoint, backend="onnxruntime", beside=("a10",))).key


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime", "aotinductor", "onnxruntime-tensorrt"])
def test_other_backends_build_for_one_gpu_at_a_time(refused, backend, monkeypatch):
    """Even on a machine with one of the GPUs: the bundle would run on that one alone."""
    monkeypatch.setattr(gpu, "gpu_here", lambda: ("NVIDIA A10", "8.6"))
    told = [backend, "for rtx", "one kind of GPU at a time"]
    refused(1, told, "build", "--base", "demo", "--gpu", "rtx", "--backend", backend)


def test_an_export_in_fp32_leaves_out_turing(sdxl_graphs):
    export = open_export(sdxl_graphs)
    assert export.manifest.precision == "fp32"
    assert make_plan_from(export, "rtx").target.capabilities == RTX.capabilities[1:]
