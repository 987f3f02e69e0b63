"""Measures a server under load against the bare pipeline, in turns, and compares every picture.

`python -m lcm_compile.benchmarks.measure.load_test --save benchmarks/results/load-demo-cpu.json`

Each round draws the same prompts, seeds and sizes in two ways: by the pipelines in this process, one after
another, and by a server for many clients at once. Every picture of the server must be the pipeline's own.
Then one client alone asks for pictures, which shows what the server adds to each, and the memory of the
server and of its workers is read. It needs the machine for itself, but for a soak, of which memory alone
counts: `--pictures 300 --minutes 60`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from lcm_compile.system.stopwatch import own_memory, tree_memory

# Height and width of the pictures: those of each request are one of them in turn.
SIZES = ((64, 64), (64, 96))
MIB = 1 << 20
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


@dataclass
class Samples:
    """What the rounds after the warm-up measured.

    `pictures_per_second` and `memory_bytes` have a mapping for each round, the latter with the anonymous
    memory of the `server` and of its `workers`; `single_ms` has milliseconds of pictures, `bare` and
    `served` to one client alone.
    """

    pictures_per_second: list[dict[str, float]] = field(default_factory=list)
    single_ms: dict[str, list[float]] = field(default_factory=lambda: {"bare": [], "served": []})
    memory_bytes: list[dict[str, int]] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Returns the server's share of the bare pipeline's rate, and the milliseconds that it adds."""
        share = statistics.median(one["served"] / one["bare"] for one in self.pictures_per_second)
        added = statistics.median(self.single_ms["served"]) - statistics.median(self.single_ms["bare"])
        return {"throughput_share": share, "added_ms": added}


def measure(bundle: Path, rounds: int, minutes: float, count: int, clients: int) -> Iterator[Samples]:
    """Yields the samples so far after each round: of `rounds`, and of more until `minutes` have passed.

    A round before them warms up. Raises LcmCompileError if a picture differs from the pipeline's own.
    """
    samples = Samples()
    end = time.monotonic() + 60 * minutes
    with ExitStack() as stack:
        address, process = stack.enter_context(serving(bundle))
        pipelines = [stack.enter_context(load(bundle, height=h, width=w)) for h, w in SIZES]
        for i in itertools.count():
            if i > rounds and time.monotonic() >= end:
                return
            numbers = range(i * count, (i + 1) * count)
            own, expected = bare(pipelines, numbers)
            seconds, answers = asyncio.run(served(address, numbers, clients))
            for number in numbers:
                if not np.array_equal(expected[number], answers[number][2]):
                    raise LcmCompileError(f"picture {number} of the server is not the pipeline's own")
            few = range(-(i + 1) * SINGLES, -i * SINGLES)
            alone = [bare(pipelines, [number])[0] * 1000 for number in few]
            one_client = [ms for ms, _, _ in asyncio.run(served(address, few, 1))[1].values()]
            if i == 0:
                continue
            server = own_memory(process)
            samples.pictures_per_second.append({"bare": count / own, "served": count / seconds})
            samples.single_ms["bare"] += alone
            samples.single_ms["served"] += one_client
            samples.memory_bytes.append({"server": server, "workers": tree_memory(process) - server})
            yield samples


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True)
@click.option("--minutes", type=click.FloatRange(0), default=0.0, help="More rounds until these have passed.")
@click.option("--pictures", type=click.IntRange(2), default=100, show_default=True, help="Of each round.")
@click.option("--clients", type=click.IntRange(1), default=16, show_default=True)
@click.option("--save", type=click.Path(path_type=Path), help="The JSON file for all samples.")
def main(rounds: int, minutes: float, pictures: int, clients: int, save: Path | None) -> None:
    """Measure a server of the demo model under load."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = build(BuildSpec(base="demo", gpu="cpu"), Path(folder) / "demo").folder
        for height, width in SIZES[1:]:
            add_size(bundle, height, width)
        manifest = open_bundle(bundle).manifest
        for samples in measure(bundle, rounds, minutes, pictures, clients):
            report = {
                "environment": asdict(environment_of(manifest.target, threads(), {})),
                "backend": manifest.backend,
                "clients": clients,
                "pictures_per_round": pictures,
                "summary": samples.summary(),
                **asdict(samples),
            }
            if save is not None:
                write_atomically(save, json_text(report, indent=1) + "\n")
            rates, memory = samples.pictures_per_second, samples.memory_bytes
            print(f"round {len(rates)}: {in_words(memory[-1])}")
    summary = samples.summary()
    print_table(
        ("", "median", "against the bare pipeline"),
        [
            ("pictures a second, bare", f"{statistics.median(one['bare'] for one in rates):.1f}", ""),
            (
                f"served to {clients} clients",
                f"{statistics.median(one['served'] for one in rates):.1f}",
                f"{summary['throughput_share']:.3f} ×",
            ),
            ("added to a picture of one client", f"{summary['added_ms']:.2f} ms", ""),
        ],
    )
    print(f"{len(rates) * pictures} pictures were the pipeline's own")
    print(f"memory after the first round: {in_words(memory[0])}; after the last: {in_words(memory[-1])}")


def in_words(memory: Mapping[str, int]) -> str:
    """Returns anonymous memory in words."""
    return ", ".join(f"{name} {value / MIB:.1f} MiB" for name, value in memory.items())


if __name__ == "__main__":
    main()
