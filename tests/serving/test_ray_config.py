"""The configuration of a Ray Serve application, which is written without Ray."""

from __future__ import annotations

import pytest
import yaml

from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.errors import BundleError, UsageError
from lcm_compile.serving.ray_config import KEY_VARIABLE, RayConfig
from lcm_compile.serving.settings import ServerSettings
from lcm_compile.targets import TARGETS


def args_of(path):
    document = yaml.safe_load(path.read_text())
    assert document["applications"][0]["import_path"] == "lcm_compile.serving.ray:app"
    return document["applications"][0]["args"]


def test_it_says_all_that_serve_was_told_but_the_key(sdxl_bundle, tmp_path, command):
    (tmp_path / "loras").mkdir()
    words = ["serve", f"x={sdxl_bundle}", "--workers", 3, "--queue", 7, "--loras", tmp_path / "loras"]
    words += ["--allow-host", "pictures", "--host", "0.0.0.0", "--port", 81, "--api-key", "secret"]
    code, out, err = command(*words, "--ray-config", tmp_path / "app.yaml")
    assert (code, out) == (0, "") and KEY_VARIABLE in err
    assert "secret" not in (tmp_path / "app.yaml").read_text()
    document = yaml.safe_load((tmp_path / "app.yaml").read_text())
    assert document["http_options"] == {"host": "0.0.0.0", "port": 81}
    config = RayConfig.read(args_of(tmp_path / "app.yaml"))
    assert (config.most, config.place) == (3, None)
    settings = config.server_settings("secret")
    wanted = {"queue": 7, "loras": tmp_path / "loras", "hosts": ("pictures",), "api_key": "secret"}
    assert settings == ServerSettings(**wanted)
    with pytest.raises(UsageError, match=KEY_VARIABLE):
        config.server_settings(None)
    model = config.catalog().models["x"]
    assert model.first.digest == open_bundle(sdxl_bundle).digest


def test_a_node_with_another_bundle_in_that_folder_refuses(bundle, tmp_path, command):
    code, text, _ = command("serve", f"x={bundle}", "--ray-config", "-")
    assert code == 0
    config = RayConfig.read(yaml.safe_load(text)["applications"][0]["args"])
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(BundleError, match="another bundle"):
        config.catalog()


def test_a_replica_gets_a_gpu_of_the_bundles_target(a10_bundle, tmp_path, command, refused, sdxl_bundle):
    code, text, err = command(
        "serve", f"x={a10_bundle.folder}", "--ray-config", "-", "--ray-from", "https://example.com/bundles"
    )
    assert code == 0
    assert f"https://example.com/bundles/{a10_bundle.digest}" in err
    args = yaml.safe_load(text)["applications"][0]["args"]
    assert args["resources"] == {"num_cpus": 1, "num_gpus": 1, "accelerator_type": "A10"}
    both = (f"x={a10_bundle.folder}", f"y={sdxl_bundle}")
    refused(2, ["a10", "cpu"], "serve", *both, "--ray-config", "-")
    refused(2, "--ray-config", "serve", f"x={sdxl_bundle}", "--ray-from", "/place")
    refused(2, "does not exist", "serve", f"x={sdxl_bundle}", "--ray-config", tmp_path / "no" / "file")


def test_wrong_arguments_are_told(sdxl_bundle):
    with pytest.raises(UsageError, match=r"models\.0\.bundles"):
        RayConfig.read({"models": [{"name": "x"}]})
    with pytest.raises(UsageError, match="replicas"):
        RayConfig.read({"models": [], "replicas": 3})


def test_gpus_have_the_names_that_rays_nodes_give_them():
    nvidia_gpu = pytest.importorskip("ray._private.accelerators.nvidia_gpu")
    of_ray = nvidia_gpu.NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type
    for target in TARGETS.values():
        if not target.is_cpu and target.name != "gb10":  # the driver calls that one NVIDIA GB10
            brand = "" if target.description.startswith("Tesla") else "NVIDIA "
            assert target.accelerator_type == of_ray(brand + target.description), target
    assert TARGETS["gb10"].accelerator_type == of_ray("NVIDIA GB10")
