"""Measures the stream of a server against the bare pipeline, in turns, on the demo model or another bundle.

`python -m lcm_compile.benchmarks.measure.stream --save benchmarks/results/stream-demo-cpu.json`

Each round times the same prompts and seeds in two ways: the pipeline in this process, and pictures of a
server over its WebSocket, asked for one ahead, as for a webcam. Then keys are pressed at random times while
the server draws for the last ones. It needs the machine for itself.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import socket
import statistics
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect

from lcm_compile import BuildSpec, build, load
from lcm_compile.benchmarks.measure.environment import environment_of
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.errors import LcmCompileError
from lcm_compile.output.console import print_table
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.system.dataclass_json import json_text
from lcm_compile.system.files import write_atomically
from lcm_compile.system.processor import threads

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange")
SHAPES = ("star", "circle", "ring", "cross", "square", "triangle")
START_SECONDS = 120.0
# A key is pressed this many pictures' times after the last one: faster than pictures come, and slower.
KEY_PAUSE = (0.3, 2.5)


def wanted(i: int) -> dict[str, Any]:
    """Returns what the i-th picture shows: each has a prompt of its own, as while one types."""
    return {"prompt": f"a {COLOURS[i % 6]} {SHAPES[i // 6 % 6]}, number {i}", "seed": abs(i)}


@contextmanager
def serving(bundle: Path) -> Iterator[tuple[str, int]]:
    """Runs `lcm-compile serve BUNDLE`, and yields its address and its process id.

    Raises LcmCompileError if it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", str(bundle), "--port", str(port), "--quiet"]
    process = subprocess.Popen([sys.executable, "-m", "lcm_compile", *words])
    try:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                break
            time.sleep(0.1)
        else:
            raise LcmCompileError("the server does not start", "lcm-compile serve tells why")
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


def bare(pipeline: Pipeline, first: int, count: int) -> list[float]:
    """Returns the milliseconds of each of `count` pictures that the pipeline draws in this process."""
    times = []
    for i in range(first, first + count):
        start = time.perf_counter()
        pipeline(**wanted(i))
        times.append((time.perf_counter() - start) * 1000)
    return times


async def ask(stream: ClientConnection, i: int) -> float:
    """Asks for the i-th picture, and returns the time."""
    await stream.send(json.dumps({**wanted(i), "id": i, "output_format": "png"}))
    return time.perf_counter()


async def answer(stream: ClientConnection) -> tuple[int, float, bytes]:
    """Returns the number of the next picture, the time at which it came, and its file."""
    message = await stream.recv()
    if isinstance(message, str):
        raise LcmCompileError(json.loads(message)["error"])
    length = struct.unpack(">I", message[:4])[0]
    return json.loads(message[4 : 4 + length])["id"], time.perf_counter(), message[4 + length :]


async def streamed(stream: ClientConnection, first: int, count: int) -> tuple[list[float], dict[int, bytes]]:
    """Returns the milliseconds between `count` pictures that are asked for one ahead, and their files."""
    await ask(stream, first)
    await asyncio.sleep(0.005)  # else the next would overtake it
    await ask(stream, first + 1)
    number, last, _ = await answer(stream)
    await ask(stream, first + 2)
    times, files = [], {}
    for i in range(first + 3, first + 3 + count):
        number, now, file = await answer(stream)
        times.append((now - last) * 1000)
        last, files[number] = now, file
        await ask(stream, i)
    while number < first + 2 + count:
        number = (await answer(stream))[0]
    return times, files


async def typed(stream: ClientConnection, first: int, count: int, picture: float) -> list[float]:
    """Returns the milliseconds from keys to their pictures, of keys whose pictures no later one overtook."""
    chance = random.Random(first)
    pressed: dict[int, float] = {}
    latencies = []

    async def press() -> None:
        for i in range(first, first + count):
            pressed[i] = await ask(stream, i)
            await asyncio.sleep(chance.uniform(*KEY_PAUSE) * picture / 1000)

    pressing = asyncio.ensure_future(press())
    number = -1
    while number < first + count - 1:
        number, now, _ = await answer(stream)
        latencies.append((now - pressed[number]) * 1000)
    await pressing
    return latencies


def check_same(pipeline: Pipeline, files: Mapping[int, bytes]) -> None:
    """Raises LcmCompileError if the first streamed picture is not the one that the pipeline draws."""
    number, file = next(iter(files.items()))
    own = np.asarray(pipeline(**wanted(number))[0])
    if not np.array_equal(own, np.asarray(Image.open(io.BytesIO(file)))):
        raise LcmCompileError(f"the picture {number} of the stream is not the pipeline's own")


async def measure(bundle: Path, rounds: int, count: int) -> list[dict[str, list[float]]]:
    """Returns the milliseconds of each round: `bare`, `streamed` and `typed`. One before them warms up."""
    samples = []
    with serving(bundle) as (address, _), load(bundle) as pipeline:
        async with connect(f"ws://{address}/live", max_size=None, compression=None) as stream:
            for i in range(rounds + 1):
                first = i * 10 * count
                own = bare(pipeline, first, count)
                times, files = await streamed(stream, first, count)
                check_same(pipeline, files)
                keys = await typed(stream, first + 5 * count, count, statistics.median(own))
                samples.append({"bare": own, "streamed": times, "typed": keys})
    return samples[1:]


def summary_of(samples: list[dict[str, list[float]]]) -> dict[str, float]:
    """Returns medians: in milliseconds, as shares of the bare pipeline's frames a second, and in pictures."""
    frames = [sum(one["bare"]) / len(one["bare"]) / statistics.mean(one["streamed"]) for one in samples]
    keys = [latency / statistics.median(one["bare"]) for one in samples for latency in one["typed"]]
    return {
        "bare_ms": statistics.median(time for one in samples for time in one["bare"]),
        "streamed_ms": statistics.median(time for one in samples for time in one["streamed"]),
        "key_ms": statistics.median(time for one in samples for time in one["typed"]),
        "frames_share": statistics.median(frames),
        "key_pictures": statistics.median(keys),
        "key_pictures_p90": float(np.quantile(keys, 0.9)),
    }


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Another than the demo's for this CPU.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option(
    "--pictures", type=click.IntRange(2), default=40, show_default=True, help="In each way and round."
)
@click.option("--save", type=click.Path(path_type=Path), help="The JSON file for all samples.")
def main(bundle: Path | None, rounds: int, pictures: int, save: Path | None) -> None:
    """Measure a server's stream of pictures against the bare pipeline."""
    bundle = bundle or build(BuildSpec(base="demo", gpu="cpu")).folder
    samples = asyncio.run(measure(bundle, rounds, pictures))
    summary = summary_of(samples)
    manifest = open_bundle(bundle).manifest
    report = {
        "environment": asdict(environment_of(manifest.target, threads(), {})),
        "backend": manifest.backend,
        "summary": summary,
        "samples_ms": samples,
    }
    if save is not None:
        write_atomically(save, json_text(report, indent=1) + "\n")
    frames = f"{summary['frames_share']:.3f} × frames a second"
    keys = f"{summary['key_pictures']:.2f} pictures; 90 % within {summary['key_pictures_p90']:.2f}"
    print_table(
        ("", "median", "against the bare pipeline"),
        [
            ("a picture, bare", f"{summary['bare_ms']:.1f} ms", ""),
            ("streamed", f"{summary['streamed_ms']:.1f} ms", frames),
            ("from key to picture", f"{summary['key_ms']:.1f} ms", keys),
        ],
    )


if __name__ == "__main__":
    main()
