"""Records how equal programs differ: the demo model in many fresh processes, in turn with diffusers.

`python -m lcm_compile.benchmarks.record_processes --out tests/data/processes.json`; tests/test_gate_power.py
draws A/A and slowed comparisons from what it wrote.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from lcm_compile import BuildSpec, build, load
from lcm_compile.benchmarks.gate_run import joined
from lcm_compile.benchmarks.report import Benchmark, BenchmarkReport, Case, Environment, Rival
from lcm_compile.console import note
from lcm_compile.families import DEMO_FOLDER
from lcm_compile.pipeline import Request

WARM_UP = 3
PROMPT = "a large red star on a striped pink background"


def diffusers_eager() -> Callable[[int], object]:
    import torch
    from diffusers import DiffusionPipeline, LCMScheduler

    pipe = DiffusionPipeline.from_pretrained(DEMO_FOLDER / "checkpoint")
    pipe.load_lora_weights(str(DEMO_FOLDER / "lcm_lora.safetensors"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def draw(seed: int) -> object:
        generator = torch.Generator("cpu").manual_seed(seed)
        return pipe(PROMPT, num_inference_steps=4, guidance_scale=1.0, generator=generator).images

    return draw


def engines(bundle: Path) -> Callable[[int], object]:
    pipeline = load(bundle)
    return lambda seed: pipeline.draw(Request(PROMPT, seed)).images()


def serve(drawer: str, bundle: Path) -> None:
    """Draws with every seed that comes in, and answers with the milliseconds."""
    draw = engines(bundle) if drawer == "ours" else diffusers_eager()
    print("ready", flush=True)
    for seed in sys.stdin:
        start = time.perf_counter()
        draw(int(seed))
        print((time.perf_counter() - start) * 1000, flush=True)


def measure(bundle: Path, runs: int) -> dict[str, list[float]]:
    """Samples in pairs that change their order: A B, B A. Who is not drawing is stopped, its threads too."""
    samples: dict[str, list[float]] = {"ours": [], "eager": []}
    with ExitStack() as stack:
        drawers = {}
        for name in samples:
            command = [sys.executable, "-m", __spec__.name, "--drawer", name, "--bundle", str(bundle)]
            options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            drawers[name] = stack.enter_context(subprocess.Popen(command, **options))
            stack.callback(drawers[name].kill)
        for process in drawers.values():
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
        for i in range(WARM_UP + runs):
            for name in list(drawers)[:: -1 if i % 2 else 1]:
                ms = asked(drawers[name], i)
                if i >= WARM_UP:
                    samples[name].append(round(ms, 2))
    return samples


def asked(process: subprocess.Popen[str], seed: int) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.send_signal(signal.SIGCONT)
    process.stdin.write(f"{seed}\n")
    process.stdin.flush()
    ms = float(process.stdout.readline())
    process.send_signal(signal.SIGSTOP)
    return ms


@click.command()
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--processes", default=20, show_default=True)
@click.option("--runs", default=20, show_default=True)
@click.option("--drawer", hidden=True)
@click.option("--bundle", type=click.Path(path_type=Path), hidden=True)
def main(out: Path | None, processes: int, runs: int, drawer: str | None, bundle: Path | None) -> None:
    """Writes a report whose groups are the processes."""
    if drawer and bundle:
        serve(drawer, bundle)
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    spec = BuildSpec(base="demo")
    bundle = build(spec).folder
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), platform.machine())
    environment = Environment(
        device=processor,
        processor=processor,
        cores=len(os.sched_getaffinity(0)),
        versions={name: metadata.version(name) for name in ("torch", "diffusers")},
        taken=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    reports = []
    for i in range(processes):
        found = measure(bundle, runs)
        case = Case("picture", tuple(found["ours"]), {"eager": Rival(tuple(found["eager"]))})
        benchmark = Benchmark(spec, ("eager",), processes * runs, 0.0)
        reports.append(BenchmarkReport(environment, benchmark, (case,)))
        note(f"process {i + 1} of {processes}")
        joined(reports).save(out)


if __name__ == "__main__":
    main()
