"""Measures a server under load against the bare pipeline, in turns, and compares every picture.

`python -m lcm_compile.benchmarks.measure.load_test --save benchmarks/results/load-demo-cpu.json`

Each round draws the same prompts, seeds and sizes in two ways: by the pipelines in this process, one after
another, and by a server for many clients at once. Every picture of the server must be the pipeline's own.
Then one client alone asks for pictures, which shows what the server adds to each. It needs the machine for
itself.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from lcm_compile import BuildSpec, build, load
from lcm_compile.benchmarks.measure.environment import environment_of
from lcm_compile.benchmarks.measure.stream import serving, wanted
from lcm_compile.builder.build import add_size
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.errors import LcmCompileError
from lcm_compile.output.console import print_table
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.system.dataclass_json import json_text
from lcm_compile.system.files import write_atomically
from lcm_compile.system.processor import threads

# Height and width of the pictures: those of each request are one of them in turn.
SIZES = ((64, 64), (64, 96))
SINGLES = 20  # pictures of one client alone in each round
Answers = dict[int, tuple[float, float, np.ndarray]]  # by number: ms of the client, ms of the engines, pixels


class Client:
    """A connection that sends one request after another, as little as a client can do."""

    async def open(self, address: str) -> Client:
        """Connects to HOST:PORT."""
        host, port = address.split(":")
        self._address = address
        self._reader, self._writer = await asyncio.open_connection(host, int(port))
        return self

    async def draw(self, body: Mapping[str, Any]) -> tuple[float, float, np.ndarray]:
        """Returns the milliseconds that a picture took, those of its engines, and its pixels.

        Raises LcmCompileError if there is no picture.
        """
        data = json.dumps(body).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {self._address}\r\nContent-Length: {len(data)}"
        start = time.perf_counter()
        self._writer.write(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + data)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = answer.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        content = await self._reader.readexactly(int(headers["content-length"]))
        ms = (time.perf_counter() - start) * 1000
        if " 200 " not in status:
            raise LcmCompileError(f"{status}: {content[:200]!r}")
        timings = dict(part.strip().split(";dur=") for part in headers["server-timing"].split(","))
        file = base64.b64decode(json.loads(content)["data"][0]["b64_json"])
        return ms, float(timings["total"]), np.asarray(Image.open(io.BytesIO(file)))

    def close(self) -> None:
        """Closes the connection."""
        self._writer.close()


def body_of(i: int) -> dict[str, Any]:
    """Returns the i-th request."""
    height, width = SIZES[i % len(SIZES)]
    return {**wanted(i), "size": f"{width}x{height}"}


async def served(address: str, numbers: Sequence[int], clients: int) -> tuple[float, Answers]:
    """Returns the seconds in which a server draws requests of several clients, and its answers."""
    opened = [await Client().open(address) for _ in range(clients)]
    left, answers = [*reversed(numbers)], Answers()

    async def ask(client: Client) -> None:
        while left:
            number = left.pop()
            answers[number] = await client.draw(body_of(number))

    start = time.perf_counter()
    await asyncio.gather(*map(ask, opened))
    seconds = time.perf_counter() - start
    for client in opened:
        client.close()
    return seconds, answers


def bare(pipelines: Sequence[Pipeline], numbers: Sequence[int]) -> tuple[float, dict[int, np.ndarray]]:
    """Returns the seconds in which pipelines of each size draw the same, and the pictures."""
    start = time.perf_counter()
    pictures = {i: np.asarray(pipelines[i % len(SIZES)](**wanted(i))[0]) for i in numbers}
    return time.perf_counter() - start, pictures


def measure(bundle: Path, rounds: int, count: int, clients: int) -> dict[str, Any]:
    """Returns pictures a second of each round, and milliseconds of pictures, bare and of one client alone.

    A round before them warms up. Raises LcmCompileError if a picture differs from the pipeline's own.
    """
    rates: list[dict[str, float]] = []
    singles: dict[str, list[float]] = {"bare": [], "served": []}
    with ExitStack() as stack:
        address = stack.enter_context(serving(bundle))
        pipelines = [stack.enter_context(load(bundle, height=h, width=w)) for h, w in SIZES]
        for i in range(rounds + 1):
            numbers = range(i * count, (i + 1) * count)
            own, expected = bare(pipelines, numbers)
            seconds, answers = asyncio.run(served(address, numbers, clients))
            for number in numbers:
                if not np.array_equal(expected[number], answers[number][2]):
                    raise LcmCompileError(f"picture {number} of the server is not the pipeline's own")
            rates.append({"bare": count / own, "served": count / seconds})
            few = range(-(i + 1) * SINGLES, -i * SINGLES)
            singles["bare"] += [bare(pipelines, [number])[0] * 1000 for number in few]
            singles["served"] += [ms for ms, _, _ in asyncio.run(served(address, few, 1))[1].values()]
    return {"pictures_per_second": rates[1:], "single_ms": singles}


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--pictures", type=click.IntRange(2), default=100, show_default=True, help="Of each round.")
@click.option("--clients", type=click.IntRange(1), default=16, show_default=True)
@click.option("--save", type=click.Path(path_type=Path), help="The JSON file for all samples.")
def main(rounds: int, pictures: int, clients: int, save: Path | None) -> None:
    """Measure a server of the demo model under load."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = build(BuildSpec(base="demo", gpu="cpu"), Path(folder) / "demo").folder
        for height, width in SIZES[1:]:
            add_size(bundle, height, width)
        samples = measure(bundle, rounds, pictures, clients)
        manifest = open_bundle(bundle).manifest
    share = statistics.median(one["served"] / one["bare"] for one in samples["pictures_per_second"])
    singles = samples["single_ms"]
    added = statistics.median(singles["served"]) - statistics.median(singles["bare"])
    report = {
        "environment": asdict(environment_of(manifest.target, threads(), {})),
        "backend": manifest.backend,
        "clients": clients,
        "summary": {"throughput_share": share, "added_ms": added},
        **samples,
    }
    if save is not None:
        write_atomically(save, json_text(report, indent=1) + "\n")
    rates = samples["pictures_per_second"]
    print_table(
        ("", "median", "against the bare pipeline"),
        [
            ("pictures a second, bare", f"{statistics.median(one['bare'] for one in rates):.1f}", ""),
            (
                f"served to {clients} clients",
                f"{statistics.median(one['served'] for one in rates):.1f}",
                f"{share:.3f} ×",
            ),
            ("added to a picture of one client", f"{added:.2f} ms", ""),
        ],
    )
    print(f"{rounds * pictures} pictures were the pipeline's own")


if __name__ == "__main__":
    main()
