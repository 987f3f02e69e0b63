"""Records how much equal programs differ: the demo model in many fresh processes, in turn with diffusers.

`python -m lcm_compile.benchmarks.pages.record_processes --out tests/benchmarks/processes.json`

test_gate_power.py, next to that file, takes its comparisons from it: of the program with itself, and with a
slowed copy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from lcm_compile.benchmarks.gate.run_again import run_again
from lcm_compile.benchmarks.measure.report import Benchmark
from lcm_compile.output.console import note
from lcm_compile.spec import BuildSpec


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The report to write.")
@click.option("--processes", default=20, show_default=True)
@click.option("--runs", default=20, show_default=True, help="Pictures of each program in every process.")
def main(out: Path, processes: int, runs: int) -> None:
    """Writes a report that has only the case of the picture, with a group of samples for each process."""
    benchmark = Benchmark(BuildSpec(base="demo"), ("eager",), processes * runs, seconds=processes * 600.0)
    report = run_again(benchmark, note, processes)
    replace(report, cases=report.cases[:1]).save(out)


if __name__ == "__main__":
    main()
