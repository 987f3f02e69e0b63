"""What each rewrite for LCM gains: a bundle with all of them in turn with bundles that lack one, and all.

With --one-graph also in turn with the whole picture as one graph.

`python -m lcm_compile.benchmarks.pages.rewrites_table --base demo --backend onnxruntime` in a clone builds
the bundles, keeps the raw samples in benchmarks/results/, and fills the table of docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import click
import numpy as np

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
ALL = "without any"
WHOLE = "as one graph"


def measure(spec: BuildSpec, each: bool, one_graph: bool, runs: int, seconds: float) -> BenchmarkReport:
    """Pictures of a spec's bundle and, in turn, of those without rewrites, and perhaps of one graph.

    Errors as `build`'s.
    """
    lacking = {f"without {name}": (name,) for name in REWRITES} if each else {}
    specs = {name: replace(spec, without=left) for name, left in {**lacking, ALL: tuple(REWRITES)}.items()}
    if one_graph:
        specs[WHOLE] = replace(spec, whole_loop=True)
    with BuildProgress() as parts:
        whole = build(spec, report=parts)
        others = {name: build(other, report=parts) for name, other in specs.items()}
    manifest, cores = whole.manifest, physical_cores()
    drawers = {name: Maker(draw_with_bundle, (b.folder,)) for name, b in {SELF: whole, **others}.items()}
    with Bar("draw in turn") as bar:
        measured = take_warm(
            drawers, manifest.pipeline.sample_prompt, cores, runs, seconds, lambda _, *done: bar.update(*done)
        )
    picture = picture_case(whole, others, (), measured)
    precisions = {stage.contract.name: stage.precision for stage in manifest.stages}
    shape = manifest.pipeline.shape
    asked = Benchmark(spec, tuple(others), runs, seconds, manifest.backend, precisions, shape, whole.digest)
    noise = too_noisy(picture.samples_ms, {name: r.samples_ms for name, r in picture.rivals.items()})
    return BenchmarkReport(
        environment_of(manifest.target, cores, {}), asked, (picture,), (noise,) if noise else ()
    )


def table(reports: Sequence[BenchmarkReport]) -> str:
    """Markdown: how many times as long a picture takes without each rewrite, with the quartiles of pairs."""
    heads = [
        f"{r.benchmark.spec.base} {r.benchmark.shape}, {r.benchmark.backend} {r.benchmark.precisions['step']}"
        for r in reports
    ]
    lines = [["", *heads], ["---", *("--:" for _ in heads)]]
    lines.append(["all rewrites", *(ms_text(median(r.cases[0].samples_ms)) for r in reports)])
    for name in (*(f"without {rewrite}" for rewrite in REWRITES), ALL, WHOLE):
        lines.append([name, *(ratio_text(report, name) for report in reports)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio_text(report: BenchmarkReport, name: str) -> str:
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
@click.option("--weights", help="random, for a base that is not here.")
@click.option("--each/--all", default=True, help="Each rewrite alone too, or all of them at once only.")
@click.option("--one-graph", is_flag=True, help="The whole picture as one graph too.")
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
    """Measures, keeps the samples, and fills the table."""
    spec = BuildSpec(base, backend=backend, precision=precision, weights=weights)
    report = measure(spec, each, one_graph, runs, seconds)
    report.save(RESULTS / f"rewrites-{base}-{backend}-{precision}.json")
    for warning in report.notes:
        note(f"warning: {warning}")
    reports = [read_report(path) for path in sorted(RESULTS.glob("rewrites-*.json"))]
    write_atomically(PAGE, filled(PAGE.read_text(encoding="utf-8"), table(reports)))
    print(PAGE)


if __name__ == "__main__":
    main()
