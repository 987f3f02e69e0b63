"""Measures what each rewrite for LCM gains, and fills the table of docs/performance.md.

A bundle with all rewrites is timed in turn with bundles that lack one of them, and with one that lacks all.
With --one-graph, a bundle that draws the picture with a single graph takes part too.

Run `python -m lcm_compile.benchmarks.pages.rewrites_table --base demo --backend onnxruntime` in a clone. It
builds the bundles and keeps the raw samples in benchmarks/results/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import click
import numpy as np

from lcm_compile.benchmarks.markdown import markdown_table
from lcm_compile.benchmarks.measure.bench import picture_case, take_warm
from lcm_compile.benchmarks.measure.environment import environment_of
from lcm_compile.benchmarks.measure.report import Benchmark, BenchmarkReport, read_report
from lcm_compile.benchmarks.measure.rivals import SELF, draw_with_bundle
from lcm_compile.benchmarks.measure.summary import ms_text
from lcm_compile.benchmarks.measure.timing import ratios, too_noisy
from lcm_compile.benchmarks.measure.worker import Maker
from lcm_compile.benchmarks.pages.readme_table import RESULTS, ROOT, filled
from lcm_compile.builder.build import build
from lcm_compile.output.console import Bar, BuildProgress, note
from lcm_compile.spec import REWRITES, BuildSpec
from lcm_compile.system.files import write_atomically
from lcm_compile.system.processor import physical_cores

PAGE = ROOT / "docs" / "performance.md"
# Names of bundles, as the reports and the table have them.
ALL = "without any"
WHOLE = "as one graph"


def without_rewrites(spec: BuildSpec, each: bool, one_graph: bool) -> dict[str, BuildSpec]:
    """Returns the specs of bundles without rewrites, by name.

    `each` adds one without each single rewrite, and `one_graph` one that draws with a single graph.
    """
    left_out: dict[str, tuple[str, ...]] = {}
    if each:
        left_out |= {f"without {name}": (name,) for name in REWRITES}
    left_out[ALL] = tuple(REWRITES)
    specs = {name: replace(spec, without=rewrites) for name, rewrites in left_out.items()}
    if one_graph:
        specs[WHOLE] = replace(spec, whole_loop=True)
    return specs


def measure(spec: BuildSpec, specs: Mapping[str, BuildSpec], runs: int, seconds: float) -> BenchmarkReport:
    """Times pictures of a spec's bundle in turn with those of others. Raises what `build` raises."""
    with BuildProgress() as progress:
        bundle = build(spec, report=progress)
        others = {name: build(other, report=progress) for name, other in specs.items()}
    manifest, cores = bundle.manifest, physical_cores()
    drawers = {name: Maker(draw_with_bundle, (b.folder,)) for name, b in {SELF: bundle, **others}.items()}
    with Bar("draw in turn") as bar:
        measured = take_warm(
            drawers, manifest.pipeline.sample_prompt, cores, runs, seconds, lambda _, *done: bar.update(*done)
        )
    picture = picture_case(bundle, others, (), measured)
    precisions = {stage.contract.name: stage.precision for stage in manifest.stages}
    shape = manifest.pipeline.shape
    benchmark = Benchmark(
        spec, tuple(others), runs, seconds, manifest.backend, precisions, shape, bundle.digest
    )
    noise = too_noisy(picture.samples_ms, {name: r.samples_ms for name, r in picture.rivals.items()})
    return BenchmarkReport(
        environment_of(manifest.target, cores, {}), benchmark, (picture,), (noise,) if noise else ()
    )


def table(reports: Sequence[BenchmarkReport]) -> str:
    """Returns the table in Markdown, with a column for each report and a row for each bundle.

    A cell holds how many times as long a picture takes without the rewrite, as `ratio_text` writes it.
    """
    names = (*(f"without {rewrite}" for rewrite in REWRITES), ALL, WHOLE)
    return table_of(reports, "all rewrites", names)


def table_of(reports: Sequence[BenchmarkReport], own: str, others: Sequence[str]) -> str:
    """Returns a table in Markdown: the milliseconds of our `own` bundle, and the ratios of the others."""
    heads = [
        f"{r.benchmark.spec.base} {r.benchmark.shape}, {r.benchmark.backend} {r.benchmark.precisions['step']}"
        for r in reports
    ]
    rows = [[own, *(ms_text(median(r.cases[0].samples_ms)) for r in reports)]]
    for name in others:
        rows.append([name, *(ratio_text(report, name) for report in reports)])
    return "\n".join(markdown_table(["", *heads], rows))


def publish(
    report: BenchmarkReport, kind: str, table: Callable[[Sequence[BenchmarkReport]], str], place: str
) -> None:
    """Keeps a report, and fills the table of all reports of its kind at a place of the page."""
    spec = report.benchmark.spec
    report.save(RESULTS / f"{kind}-{spec.base}-{spec.backend}-{spec.precision}.json")
    for warning in report.notes:
        note(f"warning: {warning}", always=True)
    reports = [read_report(path) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]
    write_atomically(PAGE, filled(PAGE.read_text(encoding="utf-8"), table(reports), place))
    print(PAGE)


def ratio_text(report: BenchmarkReport, name: str) -> str:
    """Returns the median ratio of a bundle's time to ours with its quartiles; "" if it was not measured."""
    picture = report.cases[0]
    if name not in picture.rivals:
        return ""
    pairs = ratios(picture.samples_ms, picture.rivals[name].samples_ms)
    low, middle, high = np.quantile(pairs, (0.25, 0.5, 0.75))
    return f"{middle:.3f} × ({low:.3f}–{high:.3f})"


@click.command()
@click.option("--base", default="demo", show_default=True)
@click.option("--backend", default="onnxruntime", show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--weights", help="random, for a base whose weights are not here.")
@click.option(
    "--each/--all", default=True, help="Leave out each rewrite alone too, or only all of them at once."
)
@click.option("--one-graph", is_flag=True, help="Also measure the complete picture as one graph.")
@click.option("--runs", type=int, default=40, show_default=True)
@click.option("--seconds", type=float, default=600, show_default=True)
def main(
    base: str,
    backend: str,
    precision: str,
    weights: str | None,
    each: bool,
    one_graph: bool,
    runs: int,
    seconds: float,
) -> None:
    """Measures the rewrites, keeps the samples, and fills the table."""
    spec = BuildSpec(base, backend=backend, precision=precision, weights=weights)
    report = measure(spec, without_rewrites(spec, each, one_graph), runs, seconds)
    publish(report, "rewrites", table, "bench")


if __name__ == "__main__":
    main()
