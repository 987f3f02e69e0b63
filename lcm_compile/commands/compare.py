"""`compare`: the performance gate."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lcm_compile.commands.options import json_option, quiet_option
from lcm_compile.errors import PerformanceError


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("new", required=False, type=click.Path(path_type=Path))
@click.option(
    "--fail-on",
    "limits",
    multiple=True,
    metavar="METRIC:PERCENT%",
    help="A limit: median, p90, p99, memory, gpu-memory, engine-size, or parity:1dB; repeatable.",
)
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write a table for a web page.")
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit's XML.")
@click.option("--update", is_flag=True, help="Write into BASE what became better, where nothing fails.")
@click.option("--loosen", metavar="WHY", help="With --update: replace BASE, worse or not, and note why.")
@json_option
@quiet_option
def compare(
    base: Path,
    new: Path | None,
    limits: tuple[str, ...],
    markdown: Path | None,
    junit: Path | None,
    update: bool,
    loosen: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Hold a benchmark to a baseline that bench --save wrote; exit 3 on a regression.

    Without NEW, BASE's own benchmark is run here, in several processes. Limits that are not given:
    median:5%, memory:10%, engine-size:5%, parity:1dB.
    """
    if loosen is not None and not (update and loosen.strip()):
        raise click.UsageError("--loosen takes a reason, and goes with --update.")
    from lcm_compile.benchmarks.gate import show
    from lcm_compile.benchmarks.gate.compare import compare_reports, parse_limits
    from lcm_compile.benchmarks.gate.run_again import PROCESSES, run_again
    from lcm_compile.benchmarks.gate.update import replaced, tightened
    from lcm_compile.benchmarks.measure.report import read_report
    from lcm_compile.output.console import note, print_json
    from lcm_compile.system.files import write_atomically

    wanted = parse_limits(limits)
    baseline = read_report(base)
    if new:
        measured = read_report(new)
    else:
        measured = run_again(baseline.benchmark, lambda text: note(text, quiet), PROCESSES)
    comparison = compare_reports(baseline, measured, wanted)
    if as_json:
        print_json({**comparison.to_dict(), "new": measured.to_dict()})
    else:
        sys.stdout.write(show.table(comparison))
    for path, content in ((markdown, show.markdown), (junit, show.junit)):
        if path:
            write_atomically(path, content(comparison))
    for remark in comparison.notes:
        note(remark, quiet)
    if loosen is not None:
        replaced(baseline, measured, loosen.strip()).save(base)
        note(f"{base} is replaced", quiet)
        return
    told = show.summary(comparison)
    if comparison.failures:
        raise PerformanceError(
            told, f"if that is meant: lcm-compile compare {base} --update --loosen 'why it may be worse'"
        )
    note(told, quiet)
    if update:
        better = tightened(baseline, measured, comparison)
        if better != baseline:
            better.save(base)
        note(f"{base} is {'as it was' if better == baseline else 'tightened'}", quiet)
