"""A real server in a process of its own, with two small models."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import factories
import httpx
import pytest
from diffusers import DiffusionPipeline

from lcm_compile import BuildSpec, LoraSpec, build
from lcm_compile.builder.build import add_size


class Served:
    """A server that was started with some words of `lcm-compile serve`."""

    def __init__(self, *words, env=None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "lcm_compile", "serve", *map(str, words), "--port", str(self.port)]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def wait(self, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/ready").status_code == 200:
                    return self
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(self.process.communicate()[1])

    def metric(self, name):
        """The value of a metric, by its name with labels."""
        lines = [
            line for line in self.client.get("/metrics").text.splitlines() if line.startswith(name + " ")
        ]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0

    def workers(self):
        """The process ids of its workers."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        with open(children) as file:  # noqa: PTH123 - of /proc
            return [int(word) for word in file.read().split()]

    def stop(self, number=signal.SIGTERM):
        """Sends a signal; returns the exit code and what it wrote."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        self.client.close()
        return self.process.returncode, out + err

    def __enter__(self):
        return self.wait()

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        self.client.close()


@pytest.fixture(scope="session")
def lora_files(sd15_checkpoint, tmp_path_factory):
    """A LoRA that is built in with its weight as an input, and a folder with another for the slots."""
    pipe = DiffusionPipeline.from_pretrained(sd15_checkpoint)
    folder = tmp_path_factory.mktemp("loras")
    for name in ("built", "slots"):
        (folder / name).mkdir()
    factories.write_lora(pipe, folder / "built" / "style.safetensors", "kohya", text=False)
    factories.write_lora(pipe, folder / "slots" / "zebra.safetensors", "kohya", text=False, seed=5)
    return folder


@pytest.fixture(scope="session")
def small(sd15_checkpoint, lora_files, tmp_path_factory):
    """The folder of a bundle of two sizes that takes pictures and LoRAs."""
    style = LoraSpec(str(lora_files / "built/style.safetensors"), 0.5, name="style")
    spec = BuildSpec(
        str(sd15_checkpoint),
        no_lcm=True,
        few_step="lcm",
        backend="onnxruntime",
        height=64,
        image=True,
        loras=(style,),
        lora_slots=1,
        lora_rank=4,
    )
    bundle = build(spec, tmp_path_factory.mktemp("small") / "bundle")
    add_size(bundle.folder, 64, 96)
    return bundle.folder


@pytest.fixture(scope="session")
def batched(sdxl_checkpoint, tmp_path_factory):
    """The folder of a bundle that draws two pictures in a call."""
    spec = BuildSpec(str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="onnxruntime", batch=2)
    return build(spec, tmp_path_factory.mktemp("batched") / "bundle").folder


@pytest.fixture(scope="session")
def serve():
    """What starts a server with some words of `lcm-compile serve`, for a `with`."""
    return Served


@pytest.fixture(scope="session")
def served(small, batched, lora_files):
    """A server of `small`, which is called so, and of `pairs`."""
    words = (f"small={small}", f"pairs={batched}", "--loras", lora_files / "slots", "--queue", 32)
    with Served(*words) as server:
        yield server
