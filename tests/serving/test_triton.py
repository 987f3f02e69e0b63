"""Model repositories for Triton: their configurations by Triton's own schema, and a real Triton that draws.

NVIDIA's wheel `nvidia-pytriton` carries a server with the Python backend alone, so the stages' models are
checked by the runtimes that Triton's other backends load them with; OpenVINO's in `test_openvino.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lcm_compile import BuildSpec, build, load
from lcm_compile.bundles.bundle import open_bundle

pytest.importorskip("tritonclient")
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

NUMPY = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8"}
# What running a bundle of ONNX Runtime needs, with the NumPy that this Triton was compiled for.
NEEDED = ("nvidia-pytriton==0.7.0", "numpy<2", "onnxruntime", "tokenizers", "pillow", "platformdirs", "click")


def config(folder):
    """A model's configuration, as Triton parses it."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def shown(tensors):
    """The names, types and shapes of a configuration's tensors."""
    return [(t.name, DataType.Name(t.data_type), list(t.dims)) for t in tensors]


def as_configured(specs, name="{}"):
    """The same of a stage's contract."""
    return [(name.format(s.name, i), f"TYPE_{NUMPY[s.dtype]}", list(s.shape)) for i, s in enumerate(specs)]


def test_each_stage_of_onnxruntime_is_a_model(sdxl_bundle, tmp_path, command):
    import onnxruntime

    code, out, err = command("export", f"x={sdxl_bundle}", "--triton", tmp_path / "models")
    assert code == 0, err
    bundle = open_bundle(sdxl_bundle)
    names = [f"x-{stage.contract.name}" for stage in bundle.manifest.stages]
    assert out.split() == [str(tmp_path / "models" / name) for name in names]
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == sorted(names)
    for name, stage in zip(names, bundle.manifest.stages, strict=True):
        own = config(tmp_path / "models" / name)
        assert (own.name, own.backend, own.max_batch_size) == (name, "onnxruntime", 0)
        assert own.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
        assert shown(own.input) == as_configured(stage.contract.inputs)
        assert shown(own.output) == as_configured(stage.contract.outputs)
        file = tmp_path / "models" / name / "1" / own.default_model_filename
        session = onnxruntime.InferenceSession(str(file))
        assert {t.name: list(t.dims) for t in own.input} == {i.name: i.shape for i in session.get_inputs()}
        assert {t.name: list(t.dims) for t in own.output} == {o.name: o.shape for o in session.get_outputs()}


def test_torchscript_takes_tensors_by_their_places(pairs, tmp_path, command):
    import torch

    assert command("export", f"x={pairs}", "--triton", tmp_path / "models")[0] == 0
    for stage in open_bundle(pairs).manifest.stages:
        folder = tmp_path / "models" / f"x-{stage.contract.name}"
        own = config(folder)
        assert own.backend == "pytorch"
        assert shown(own.input) == as_configured(stage.contract.inputs, "{}__{}")
        assert shown(own.output) == as_configured(stage.contract.outputs, "{}__{}")
        graph = torch.jit.load(folder / "1" / own.default_model_filename)
        # Triton's PyTorch backend gives them to `forward` in the order of the numbers in their names.
        assert len(graph.forward.schema.arguments) - 1 == len(own.input)


def test_a_model_that_draws_takes_a_batch(pairs, tmp_path, command):
    assert command("export", f"x={pairs}", "--triton", tmp_path, "--triton-whole")[0] == 0
    own = config(tmp_path / "x")
    shape = open_bundle(pairs).manifest.pipeline.shape
    assert (own.backend, own.max_batch_size) == ("python", 2)
    assert own.dynamic_batching.max_queue_delay_microseconds > 0
    assert [t.name for t in own.input if not t.optional] == ["PROMPT"]
    assert shown(own.output)[0] == ("IMAGE", "TYPE_UINT8", [shape.height, shape.width, 3])
    assert open_bundle(tmp_path / "x" / "1" / "bundle").digest == open_bundle(pairs).digest


def test_engines_that_triton_has_no_backend_for_are_refused_by_name(a10_bundle, tmp_path, refused, command):
    repository = tmp_path / "models"
    refused(2, ["tensorrt-rtx", "--triton-whole"], "export", f"x={a10_bundle.folder}", "--triton", repository)
    assert not repository.exists()
    code, _, err = command("export", f"x={a10_bundle.folder}", "--triton", repository, "--triton-whole")
    assert code == 0, err
    assert config(repository / "x").instance_group[0].kind == ModelInstanceGroup.KIND_GPU


def test_a_model_is_never_replaced_and_other_models_stay(sdxl_bundle, tmp_path, command, refused):
    (tmp_path / "other").mkdir()
    words = ("export", f"x={sdxl_bundle}", "--triton", tmp_path)
    assert command(*words)[0] == 0
    refused(2, ["x-encode", "NAME="], *words)
    (tmp_path / "x-encode").rename(tmp_path / "x-encode-2")
    refused(2, "x-context", *words)
    assert not (tmp_path / "x-encode").exists() and (tmp_path / "other").is_dir()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_wrong_words_are_refused(sdxl_bundle, tmp_path, refused):
    refused(2, "export BUNDLE --triton DIR", "export", sdxl_bundle)
    refused(2, "export BUNDLE --triton DIR", "export", "--triton", tmp_path)
    refused(2, "export BUNDLE --triton DIR", "export", sdxl_bundle, "--triton", tmp_path, "--base", "demo")
    refused(2, "--out", "export", "--base", "demo")
    (tmp_path / "file").touch()
    refused(1, "can't be written", "export", f"x={sdxl_bundle}", "--triton", tmp_path / "file")


@pytest.fixture(scope="module")
def tritonserver(tmp_path_factory):
    """The command of a Triton whose Python backend finds this package, in an environment of its own."""
    folder = tmp_path_factory.mktemp("triton")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    root = Path(__file__).parents[2]
    for words in (NEEDED, ("safetensors", "--no-deps", "-e", str(root))):
        done = subprocess.run([python, "-m", "pip", "install", "-q", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nvidia-pytriton can't be installed here: {done.stderr.strip()[-200:]}")
    site = next((folder / "venv" / "lib").glob("python3.*/site-packages"))
    own = site / "pytriton" / "tritonserver"
    stub = own / "python_backend_stubs" / f"3.{sys.version_info.minor}" / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip(f"this Triton has no Python backend for Python 3.{sys.version_info.minor}")
    shutil.copytree(own / "backends" / "python", folder / "backends" / "python")
    shutil.copy(stub, folder / "backends" / "python")
    server = own / "bin" / "tritonserver"
    for program in (server, folder / "backends" / "python" / stub.name):
        program.chmod(0o755)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(site / "nvidia_pytriton.libs"),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    return [server, "--backend-directory", folder / "backends"], environment


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def drawing(tritonserver, tmp_path_factory):
    """A Triton that draws with a bundle of the demo, a function that asks it, and the bundle's pipeline."""
    folder = tmp_path_factory.mktemp("models")
    bundle = build(BuildSpec(base="demo", backend="onnxruntime", image=True, batch=2), folder / "bundle")
    command = [sys.executable, "-m", "lcm_compile", "export", f"demo={bundle.folder}", "--triton-whole"]
    subprocess.run([*command, "--triton", folder / "models"], check=True)
    words, environment = tritonserver
    port = free_port()
    options = ["--http-port", free_port(), "--grpc-port", port, "--allow-metrics", "false"]
    log = (folder / "log").open("wb")
    server = subprocess.Popen(
        [*map(str, (*words, "--model-repository", folder / "models", *options))],
        env=environment,
        stdout=log,
        stderr=log,
    )
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(triton.InferenceServerException):
            if client.is_model_ready("demo"):
                break
        time.sleep(0.2)
    else:
        pytest.fail((folder / "log").read_text()[-3000:])

    def ask(**fields):
        inputs = []
        for name, array in fields.items():
            kind = {"f": "FP64", "i": "INT32", "u": f"UINT{8 * array.itemsize}"}.get(
                array.dtype.kind, "BYTES"
            )
            inputs.append(triton.InferInput(name, array.shape, kind))
            inputs[-1].set_data_from_numpy(array)
        return client.infer("demo", inputs)

    with load(bundle) as pipeline:
        yield ask, pipeline
    client.close()
    server.send_signal(signal.SIGTERM)
    server.wait(60)


def texts(*words):
    return np.array([[word.encode()] for word in words], object)


def assert_same(theirs, own):
    """NumPy 1, in Triton's process, has another last bit of the logarithm for a few seeds' noise."""
    differences = np.abs(theirs.astype(int) - np.asarray(own))
    assert differences.max() <= 1 and (differences > 0).mean() < 1e-3


@pytest.mark.slow
def test_a_real_triton_draws_the_pipelines_pictures(drawing):
    ask, pipeline = drawing
    prompts = ["a large red star", "two blue rings"]
    answer = ask(PROMPT=texts(*prompts), SEED=np.array([[7], [8]], np.uint64))
    own = pipeline(prompts, seed=[7, 8])
    assert_same(answer.as_numpy("IMAGE"), np.stack(own))
    assert answer.as_numpy("SEED").tolist() == [[7], [8]]

    one = {"PROMPT": texts("a small star"), "SEED": np.array([[2**63]], np.uint64)}
    more = {"NEGATIVE_PROMPT": texts("red"), "STEPS": np.array([[6]], np.int32), "SAMPLER": texts("tcd")}
    more |= {"GUIDANCE_SCALE": np.array([[1.3]]), "ETA": np.array([[0.3]]), "PROMPT_SYNTAX": texts("webui")}
    answer = ask(**one, **more)
    settings = {"negative_prompt": "red", "steps": 6, "sampler": "tcd", "guidance_scale": 1.3, "eta": 0.3}
    own = pipeline("a small star", seed=2**63, prompt_syntax="webui", **settings)
    assert_same(answer.as_numpy("IMAGE")[0], own[0])

    from PIL import Image

    pixels = np.random.default_rng(1).integers(0, 256, (48, 80, 3), np.uint8)
    mask = np.zeros((48, 80), np.uint8)
    mask[:, 40:] = 255
    answer = ask(**one, INIT_IMAGE=pixels[None], MASK=mask[None], STRENGTH=np.array([[0.7]]))
    images = {"image": Image.fromarray(pixels), "mask": Image.fromarray(mask), "strength": 0.7}
    own = pipeline("a small star", seed=2**63, **images)
    assert_same(answer.as_numpy("IMAGE")[0], own[0])


@pytest.mark.slow
def test_a_real_triton_draws_for_many_clients_and_tells_what_it_cannot_draw(drawing):
    ask, pipeline = drawing

    def one(seed):
        steps = 4 if seed % 3 else 5  # those of other steps can't share a call of the engines
        fields = {"SEED": np.array([[seed]], np.uint64), "STEPS": np.array([[steps]], np.int32)}
        picture = ask(PROMPT=texts(f"star {seed}"), **fields).as_numpy("IMAGE")[0]
        return picture, np.asarray(pipeline(f"star {seed}", seed=seed, steps=steps)[0])

    with ThreadPoolExecutor(8) as threads:
        for theirs, own in threads.map(one, range(24)):
            assert_same(theirs, own)
    for wrong, told in (
        ({"PROMPT": texts("a star"), "SAMPLER": texts("none")}, "unknown sampler"),
        ({"PROMPT": texts("a star"), "STEPS": np.array([[0]], np.int32)}, "steps"),
        ({"PROMPT": np.array([[b"\xff"]], object)}, "UTF-8"),
    ):
        with pytest.raises(triton.InferenceServerException, match=told) as error:
            ask(**wrong)
        assert "INVALID_ARG" in error.value.status()
    assert ask(PROMPT=texts("a star")).as_numpy("IMAGE").shape[0] == 1
