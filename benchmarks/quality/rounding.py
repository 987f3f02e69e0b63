"""Measures how far pictures in bf16 are from fp32's: ours, diffusers' and those of OpenVINO's own export.

`python -m lcm_compile.benchmarks.quality.rounding --save benchmarks/results/rounding-demo-bf16-cpu.json`

A few pictures say little: some prompts stand between two pictures, and any rounding decides.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import click
import numpy as np

from lcm_compile import BuildSpec, build
from lcm_compile.benchmarks.measure import timing
from lcm_compile.benchmarks.measure.environment import environment_of
from lcm_compile.benchmarks.measure.rivals import Setup, draw_with_bundle, makers
from lcm_compile.benchmarks.measure.worker import Draw
from lcm_compile.output.console import print_table
from lcm_compile.proof.parity import psnr_db
from lcm_compile.system.dataclass_json import json_text
from lcm_compile.system.files import write_atomically
from lcm_compile.system.processor import threads

RIVALS = ("eager-bf16", "openvino")


def row(name: str, psnr: Sequence[float]) -> tuple[str, ...]:
    """Returns the table's row of a program, whose pictures have these PSNRs in dB."""
    mean = -10 * math.log10(statistics.mean(10 ** (-one / 10) for one in psnr))
    figures = statistics.median(psnr), float(np.percentile(psnr, 5)), min(psnr), mean
    return name, *(f"{figure:.1f}" for figure in figures)


@click.command()
@click.option("--pictures", type=click.IntRange(1), default=60, show_default=True)
@click.option("--save", type=click.Path(path_type=Path), help="The JSON file for each picture's PSNR.")
def main(pictures: int, save: Path | None) -> None:
    """Compare the demo model's pictures in bf16 with ours in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        fp32, bf16 = (
            build(BuildSpec("demo", gpu="cpu", backend="openvino", precision=name), Path(folder) / name)
            for name in ("fp32", "bf16")
        )
        manifest = bf16.manifest
        settings = manifest.pipeline
        setup = Setup(settings.shape, "bf16", threads(), False, settings)
        asked = list(islice(timing.requests(settings.sample_prompt), pictures))

        def drawn(draw: Draw) -> list[np.ndarray]:
            return [draw(prompt, seed).pictures for prompt, seed in asked]

        reference = drawn(draw_with_bundle(fp32.folder))
        found = {"ours": drawn(draw_with_bundle(bf16.folder))}
        with makers(dict.fromkeys(RIVALS), manifest.spec, "openvino", setup, lambda task: None) as made:
            found |= {name: drawn(maker()) for name, maker in made.items()}
    psnr = {
        name: [round(psnr_db(one, other), 2) for one, other in zip(reference, own, strict=True)]
        for name, own in found.items()
    }
    header = "bf16", "median, dB", "5 % are below", "the worst", "of the mean square error"
    print_table(header, (row(*one) for one in psnr.items()))
    if save is not None:
        environment = asdict(environment_of(manifest.target, threads(), {}))
        write_atomically(save, json_text({"environment": environment, "psnr_db": psnr}, indent=1) + "\n")


if __name__ == "__main__":
    main()
