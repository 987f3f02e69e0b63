"""`bench`: measures how fast a bundle is, alone and against rivals."""

from __future__ import annotations

from pathlib import Path

import click

from lcm_compile.commands.options import json_option, quiet_option


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--base", metavar="BASE", help="The base of the bundle; needs --gpu.")
@click.option("--gpu", metavar="TARGET", help="The target of the bundle; needs --base.")
@click.option(
    "--against",
    multiple=True,
    metavar="RIVAL",
    help="A rival: eager, eager-bf16, compile, openvino, openvino-genai, sd-cpp, sd-cpp-q8_0, euler-25 or a "
    "bundle; repeatable.",
)
@click.option(
    "--runs", type=click.IntRange(1), default=20, show_default=True, help="Pictures to draw with each."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=120.0,
    show_default=True,
    help="Start no picture after this many seconds, but draw at least 3 with each.",
)
@click.option(
    "--save", type=click.Path(path_type=Path), help="Write the samples as JSON, for lcm-compile compare."
)
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Write a PNG chart of stages, time and quality."
)
@json_option
@quiet_option
def bench(
    bundle: Path | None,
    base: str | None,
    gpu: str | None,
    against: tuple[str, ...],
    runs: int,
    seconds: float,
    save: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast a bundle starts, draws and runs each stage.

    Rivals use the same weights with the LoRAs fused, the same number of threads, and the same prompts and
    seeds, which change with every picture. The bundle and its rivals take turns; each has a process of its
    own, which is paused while another draws.
    """
    from lcm_compile.benchmarks.measure.bench import bench as measure
    from lcm_compile.benchmarks.measure.chart import check_plot, plot_report
    from lcm_compile.benchmarks.measure.summary import print_report, summarise
    from lcm_compile.commands.find_bundle import find_bundle
    from lcm_compile.output.console import Bar, note, print_json
    from lcm_compile.system.files import check_file

    found = find_bundle(bundle, base, gpu)
    if save is not None:
        check_file(save, "--save")
    if plot is not None:
        check_plot(plot)
    note(f"measuring {found.folder}")
    with Bar("measuring") as bar:
        report = measure(
            found, against, runs, seconds, lambda doing, done, total: bar.update(done, total, doing)
        )
    if save is not None:
        report.save(save)
    if plot is not None:
        plot_report(report, plot)
    if as_json:
        print_json({**report.to_dict(), "summary": summarise(report)})
    else:
        print_report(report)
    for path in filter(None, (save, plot)):
        note(f"wrote {path}")
