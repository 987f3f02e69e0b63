"""Builds on a node of a real Ray cluster of two nodes on this machine; one says that it has an A10."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lcm_compile import BuildSpec
from lcm_compile.builder.on_ray import build_on_ray
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.errors import BackendError, UsageError

ray = pytest.importorskip("ray")
pytest.importorskip("tensorrt_rtx")  # builds for an A10 without one
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node_home(tmp_path_factory):
    """The cache folder of the node that has the GPU; RAY_ADDRESS names the cluster meanwhile."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("node")
    memory = {"object_store_memory": 100 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ADDRESS", "")
        own = os.environ["LCM_COMPILE_HOME"]
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory}
        )
        patch.setenv("LCM_COMPILE_HOME", str(folder))
        cluster.add_node(num_cpus=2, num_gpus=1, resources={"accelerator_type:A10": 1}, **memory)
        patch.setenv("LCM_COMPILE_HOME", own)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield folder
        cluster.shutdown()


@pytest.fixture
def spec(sdxl_checkpoint):
    return BuildSpec(str(sdxl_checkpoint), gpu="a10", no_lcm=True, few_step="lcm")


def test_a_node_with_the_gpu_builds_and_the_bundle_comes_here(spec, node_home):
    told = []
    bundle = build_on_ray(spec, report=lambda task, cost: told.append((task, cost)))
    assert bundle.manifest.target.name == "a10" and bundle.manifest.backend == "tensorrt-rtx"
    assert bundle.folder.parent == Path(os.environ["LCM_COMPILE_HOME"]) / "bundles"
    there = open_bundle(node_home / "bundles" / bundle.folder.name)
    assert there.digest == bundle.digest == open_bundle(bundle.folder).digest
    assert any(task == "build step" and cost is not None for task, cost in told)
    before = (bundle.folder / "manifest.json").stat()
    told.clear()
    again = build_on_ray(spec, report=lambda task, cost: told.append((task, cost)))
    assert again.digest == bundle.digest and not told
    after = (bundle.folder / "manifest.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_command_puts_it_where_it_is_asked_for(spec, node_home, command, tmp_path):
    words = ("--base", spec.base, "--gpu", "a10", "--no-lcm", "--few-step", "lcm", "--out", tmp_path / "b")
    code, out, err = command("build", *words, "--on", "ray")
    assert (code, out.strip()) == (0, str(tmp_path / "b")), err
    assert "parity with torch" in err
    assert open_bundle(tmp_path / "b").manifest.spec.base == spec.base


def test_what_no_node_has_or_can_build_is_told(node_home, tmp_path, refused):
    words = "--base", tmp_path / "nothing", "--on", "ray"
    refused(1, ["none of the 2 nodes", "H100", "they have A10"], "build", *words, "--gpu", "h100")
    with pytest.raises(UsageError, match=r"unknown base .*nothing"):
        build_on_ray(BuildSpec(str(tmp_path / "nothing"), gpu="a10"))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_without_a_cluster_it_says_how_to_start_one(spec, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(BackendError, match="no Ray cluster") as raised:
        build_on_ray(spec)
    assert "ray start" in raised.value.hint


def test_it_takes_no_graphs(refused, sdxl_graphs):
    refused(2, "--on ray builds one size", "build", "--gpu", "cpu", "--on", "ray", "--from", sdxl_graphs)
