"""`compare`: fails when a benchmark is worse than its baseline."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lcm_compile.commands.options import json_option, quiet_option
from lcm_compile.errors import PerformanceError


@click.command()
@click.argument("baseline", type=click.Path(path_type=Path))
@click.argument("new", required=False, type=click.Path(path_type=Path))
@click.option(
    "--fail-on",
    "limits",
    multiple=True,
    metavar="METRIC:PERCENT%",
    help="Limit of median, p90, p99, memory, gpu-memory, engine-size, or parity:1dB; repeatable.",
)
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write the table as Markdown.")
@click.option("--junit", type=click.Path(path_type=Path), help="Also write the result as JUnit XML.")
@click.option("--update", is_flag=True, help="Unless a limit fails, store improvements in BASELINE.")
@click.option("--loosen", metavar="WHY", help="With --update: replace BASELINE even if worse; store WHY.")
@json_option
@quiet_option
def compare(
    baseline: Path,
    new: Path | None,
    limits: tuple[str, ...],
    markdown: Path | None,
    junit: Path | None,
    update: bool,
    loosen: str | None,
    as_json: bool,
) -> None:
    """Compare a benchmark with a baseline; exit 3 on a regression.

    BASELINE and NEW are files of bench --save. Without NEW, the benchmark of BASELINE is run again here, in
    several processes. The default limits are median:5%, memory:10%, engine-size:5% and parity:1dB.
    """
    if loosen is not None and not (update and loosen.strip()):
        raise click.UsageError("--loosen needs a reason, and --update.")
    from lcm_compile.benchmarks.gate import show
    from lcm_compile.benchmarks.gate.compare import compare_reports, parse_limits
    from lcm_compile.benchmarks.gate.run_again import PROCESSES, run_again
    from lcm_compile.benchmarks.gate.update import replaced, tightened
    from lcm_compile.benchmarks.measure.report import read_report
    from lcm_compile.output.console import note, print_json
    from lcm_compile.system.files import write_atomically

    wanted = parse_limits(limits)
    base = read_report(baseline)
    measured = read_report(new) if new else run_again(base.benchmark, note, PROCESSES)
    comparison = compare_reports(base, measured, wanted)
    if as_json:
        print_json({**comparison.to_dict(), "new": measured.to_dict()})
    else:
        sys.stdout.write(show.table(comparison))
    for path, content in ((markdown, show.markdown), (junit, show.junit)):
        if path:
            write_atomically(path, content(comparison))
    for remark in comparison.notes:
        note(remark)
    if loosen is not None:
        replaced(base, measured, loosen.strip()).save(baseline)
        note(f"{baseline} is replaced")
        return
    summary = show.summary(comparison)
    if comparison.failures:
        raise PerformanceError(
            summary,
            f"if this is intended: lcm-compile compare {baseline} --update --loosen 'why it may be worse'",
        )
    note(summary)
    if update:
        better = tightened(base, measured, comparison)
        if better != base:
            better.save(baseline)
        note(f"{baseline} is {'unchanged' if better == base else 'tightened'}")
